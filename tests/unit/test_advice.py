"""What is said of settings that can work and may not be what was meant."""

import dataclasses
import datetime

import pytest
import torch.distributed as dist

from fairseq_codistill import ranks
from fairseq_codistill.advice import changed_settings, check_timeout, idle_settings, of_batches, whole_predictions
from fairseq_codistill.config import CodistillationConfig, ConfigError


def config(**changes):
    return CodistillationConfig(codistill_num_models=2, codistill_addresses="a:1,b:2", **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codistill_codec": "topk:8"}, "--codistill-codec was 'fp16' and is 'topk:8'"),
        ({"codistill_divergence": "kl"}, "--codistill-divergence was 'mse' and is 'kl'"),
        ({"codistill_interval": 5}, "--codistill-interval was 1 and is 5"),
        ({"codistill_lookahead": True}, "--codistill-lookahead was False and is True"),
        ({"codistill_weight": 0.5}, "--codistill-weight was 1.0 and is 0.5"),
        ({"codistill_num_models": 3}, "--codistill-num-models was 2 and is 3"),
    ],
)
def test_a_run_that_goes_on_otherwise_is_told_the_old_and_the_new_value(changes, said):
    before = dataclasses.asdict(config())
    assert changed_settings(before, dataclasses.replace(config(), **changes)) == [said]


def test_a_run_that_goes_on_as_it_was_is_told_nothing():
    before = dataclasses.asdict(config())
    elsewhere = dataclasses.replace(config(), codistill_addresses="c:1,d:2", codistill_timeout=1.0)
    assert changed_settings(before, elsewhere) == []
    assert changed_settings({}, config(codistill_codec="fp32")) == []  # a checkpoint of before there was codistillation


def test_saved_copies_of_the_peers_go_on_with_as_many_models_only():
    before = dataclasses.asdict(config(codistill_exchange="checkpoints"))
    three = config(codistill_exchange="checkpoints")
    three.codistill_num_models = 3
    with pytest.raises(ConfigError, match=r"--codistill-num-models was 2 and is 3.*Give it 2 again"):
        changed_settings(before, three)
    three.codistill_exchange = "predictions"
    assert len(changed_settings(before, three)) == 2


@pytest.mark.parametrize(
    ("changes", "num_updates", "said"),
    [
        ({}, 100, None),
        ({}, 1, None),
        ({"codistill_weight": 0.0}, None, "nothing will be exchanged or distilled"),
        ({"codistill_interval": 100}, None, None),  # nobody knows how long the run is
        ({"codistill_interval": 100}, 101, None),
        ({"codistill_interval": 100}, 100, "one exchange will be made"),
        ({"codistill_interval": 100, "codistill_burn_in": 1}, 100, "100 updates, 1 of them burn-in: nothing will be"),
        ({"codistill_interval": 100, "codistill_burn_in": 1}, 101, "one exchange will be made"),
        ({"codistill_burn_in": 50}, 100, None),
        ({"codistill_burn_in": 100}, 100, "--codistill-burn-in is 100"),
    ],
)
def test_a_run_in_which_next_to_nothing_is_exchanged_is_told_so(changes, num_updates, said):
    warnings = idle_settings(config(**changes), num_updates)
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_a_transfer_set_whose_last_update_is_short_is_told():
    assert of_batches(config(), {}, 10, 4, False) == of_batches(config(), {}, 12, 4, True) == []
    assert of_batches(config(), {}, 0, 3, True) == []
    [warning] = of_batches(config(), {}, 10, 4, True)
    assert "an epoch has 10 batches, and an update 4" in warning


@pytest.mark.parametrize(("growth", "num_batches", "is_idle"), [(1.1, 0, True), (1.1, 10, False), (1.0, 0, False)])
def test_a_weight_that_never_grows_as_no_epoch_ends_is_told(growth, num_batches, is_idle):
    warnings = of_batches(config(codistill_weight_growth=growth), {}, num_batches, 1, False)
    assert ["--codistill-weight-growth is 1.1" in warning for warning in warnings] == [True] * is_idle


def test_one_model_alone_is_told_nothing():
    assert idle_settings(CodistillationConfig(codistill_weight=0.0), 5) == []


@pytest.mark.parametrize(
    ("codec", "num_classes", "is_whole"),
    [("columns:10", 10, True), ("columns:9", 10, False), ("topk:11", 10, True), ("fp16", 10, False)],
)
def test_a_part_that_is_all_of_it_is_told(codec, num_classes, is_whole):
    warning = whole_predictions(config(codistill_codec=codec), num_classes)
    assert (warning is not None) == is_whole
    assert warning is None or f"{num_classes} classes" in warning


@pytest.mark.parametrize("timeout", [480.0, 600.0, 1e4])
def test_a_wait_for_peers_that_the_ranks_of_this_model_would_not_outlast_is_refused(timeout):
    message = "--codistill-timeout is .*wait 600 s for each other.*Set --codistill-timeout below 480"
    with pytest.raises(ConfigError, match=message):
        check_timeout(config(codistill_timeout=timeout), 600.0)
    check_timeout(config(codistill_timeout=479.0), 600.0)
    check_timeout(config(codistill_timeout=timeout), None)


def test_how_long_the_ranks_of_a_model_wait_is_read_from_their_process_group(monkeypatch):
    assert ranks.group_timeout_s(2) is None
    timeout = datetime.timedelta(seconds=77)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        assert ranks.group_timeout_s(2) is None, "one rank waits for nobody"
        monkeypatch.setattr(ranks, "rank_and_world_size", lambda: (0, 2))
        assert ranks.group_timeout_s(2) == 77.0
    finally:
        dist.destroy_process_group()
