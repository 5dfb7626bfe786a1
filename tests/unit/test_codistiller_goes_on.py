"""What a loop of its own goes on by: the clock inside an update, the order of its batches, what its peers weigh."""

import math

import numpy as np
import pytest
import torch
from test_codistiller import ADDRESSES, NUM_CLASSES, met

from fairseq_codistill import Codistiller, ConfigError, CoordinatedBatches
from fairseq_codistill.coordinator.keys import DataOrder
from fairseq_codistill.testing import Script, ScriptedTransport


def test_nothing_is_skipped_in_the_middle_of_an_update():
    peers = met(CoordinatedBatches(100, 2), update_freq=4)
    peers.coordinator.num_behind = lambda elapsed, within_reach=True: 5
    skipped = []
    for _ in range(4):
        peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2))
        skipped.append(peers.skip())
    assert skipped == [0, 0, 0, 20]


def test_batches_are_drawn_by_the_data_seed_of_the_environment_and_another_one_is_told(monkeypatch, caplog):
    met(CoordinatedBatches(100, 2))
    met(CoordinatedBatches(100, 2, data_seed=7), data_seed=7)
    assert "draws by" not in caplog.text
    met(CoordinatedBatches(100, 2), data_seed=7)
    assert "data-seed is 7, and CoordinatedBatches draws by 1" in caplog.text
    monkeypatch.setenv("CODISTILL_DATA_SEED", "7")
    assert list(CoordinatedBatches(100, 2)) == list(CoordinatedBatches(100, 2, data_seed=7))
    assert list(CoordinatedBatches(100, 2)) != list(CoordinatedBatches(100, 2, data_seed=1))
    monkeypatch.setenv("CODISTILL_DATA_SEED", "seven")
    with pytest.raises(ConfigError, match="CODISTILL_DATA_SEED is 'seven'"):
        CoordinatedBatches(100, 2)


@pytest.mark.parametrize("batches", [None, 100])
def test_batches_of_ones_own_make_up_an_update_on_all_models_alike(batches):
    assert met(batches, update_freq=4)._clock.settings()["update_freq"] == 4


@pytest.mark.parametrize(
    ("batches", "update_freq", "message"),
    [
        (CoordinatedBatches(100, 4), 1, "batches per epoch is 25, and was 50"),
        (CoordinatedBatches(100, 1, world_size=2), 1, None),
        (CoordinatedBatches(100, 2, world_size=2), 1, "batches per epoch is 25, and was 50"),
        (CoordinatedBatches(101, 2), 1, "num_samples of CoordinatedBatches is 101, and was 100"),
        (CoordinatedBatches(100, 2), 2, "update_freq is 2, and was 1"),
        (40, 1, "batches per epoch is 40, and was 50"),
        (None, 1, None),
        (DataOrder(40, [1]), 1, None),
    ],
)
def test_a_checkpoint_of_other_batches_is_refused_as_its_count_is_another_place(batches, update_freq, message):
    before = met(CoordinatedBatches(100, 2))
    for _ in range(60):
        before.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2))
    ranks = batches.table.world_size if isinstance(batches, CoordinatedBatches) else 1
    after = Codistiller(num_models=1, update_freq=update_freq, rank=0, world_size=ranks)
    after.load_state_dict(before.state_dict())
    assert after.state_dict()["batches"] == before.state_dict()["batches"]  # saved again before it has met
    if message is None:
        after.meet(torch.nn.Linear(2, NUM_CLASSES), batches)
        assert after.state_dict()["count"] == 60
        return
    with pytest.raises(ConfigError, match=message):
        after.meet(torch.nn.Linear(2, NUM_CLASSES), batches)


def test_data_of_ones_own_may_grow():
    own = {"own_data": True, "exchange": "checkpoints"}
    before = met(CoordinatedBatches(100, 2), **own)
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits, codec="fp32"))
    settings = {"num_models": 2, "addresses": ADDRESSES, "codec": "fp32", **own}
    after = Codistiller(transport=transport, **settings)
    after.load_state_dict(before.state_dict())
    after.meet(torch.nn.Linear(2, NUM_CLASSES), CoordinatedBatches(104, 2))
    for update_freq, message in ((2, "update_freq is 2, and was 1"), (4, "batches per epoch is 52, and was 50")):
        state = (
            met(CoordinatedBatches(100, 2), update_freq=4, **own).state_dict()
            if update_freq == 4
            else before.state_dict()
        )
        again = Codistiller(transport=transport, update_freq=update_freq, **settings)
        again.load_state_dict(state)
        with pytest.raises(ConfigError, match=message):
            again.meet(torch.nn.Linear(2, NUM_CLASSES), CoordinatedBatches(104, 2))


def test_a_checkpoint_of_before_batches_were_noted_goes_on():
    after = Codistiller(num_models=1)
    after.load_state_dict({"count": 60, "replicas": {}})
    after.meet(torch.nn.Linear(2, NUM_CLASSES), CoordinatedBatches(100, 2))
    assert after.state_dict()["count"] == 60


def test_a_position_may_be_a_whole_number_of_numpy():
    seen = []
    peers = met(predict=lambda key, logits: seen.append(key) or logits + 1, interval=1)
    for position in np.arange(2):
        peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2), position=position)
    assert repr([tuple(key) for key in seen]) == "[(1, 0, 0), (1, 1, 0)]"
    with pytest.raises(TypeError):
        peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2), position=2.0)


def test_what_the_peers_weigh_goes_on_from_a_checkpoint():
    before = met(peer_weights="validation")
    before.tell_validation(2.0)
    state = before.state_dict()
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits, codec="fp32"))
    after = Codistiller(num_models=2, addresses=ADDRESSES, codec="fp32", peer_weights="validation", transport=transport)
    after.load_state_dict(state)
    after.meet(torch.nn.Linear(2, NUM_CLASSES))
    after.coordinator.peers[1].hello["validation"] = 4.0
    assert after.coordinator.peer_weight(1) == pytest.approx(math.exp(-2))
    after.coordinator.peers[1].hello["validation"] = math.inf
    assert after.coordinator.peer_weight(1) == 0.0
    assert after.state_dict()["replicas"] == state["replicas"] == {"validation": 2.0}


def test_what_a_model_said_of_its_validation_before_it_met_the_others_is_told_when_it_does():
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits, codec="fp32"))
    peers = Codistiller(num_models=2, addresses=ADDRESSES, codec="fp32", peer_weights="validation", transport=transport)
    peers.tell_validation(1.0)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES))
    peers.coordinator.peers[1].hello["validation"] = 9.0
    assert peers.coordinator.peer_weight(1) == pytest.approx(math.exp(-8))


@pytest.mark.parametrize(
    ("mine", "theirs", "weight"),
    [(1.0, math.nan, 0.0), (math.nan, 1.0, 1.0), (math.nan, math.nan, 1.0), (math.inf, math.inf, 1.0)],
)
def test_a_peer_whose_validation_is_not_a_number_counts_nothing(mine, theirs, weight):
    peers = met(peer_weights="validation")
    peers.tell_validation(mine)
    peers.coordinator.peers[1].hello["validation"] = theirs
    assert peers.coordinator.peer_weight(1) == weight


@pytest.mark.parametrize("batches", [None, 1000, "sampler"])
def test_a_loop_that_says_how_far_it_is_goes_on_there(batches):
    sampler = CoordinatedBatches(2000, 2) if batches == "sampler" else None
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits, codec="fp32"))
    peers = Codistiller(num_models=2, addresses=ADDRESSES, burn_in=100, codec="fp32", transport=transport)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES), sampler or batches, elapsed=500)
    assert sampler is None or sampler.elapsed == 500
    peers.term(torch.zeros(2, NUM_CLASSES, requires_grad=True), range(2))
    assert peers.sums["codistill_weight"] == 1.0  # burn-in is over
    assert peers._clock.next() == ((1, 501, 0), 501)


@pytest.mark.parametrize(
    ("setting", "method"), [({"parts": "2"}, "forward_backward()"), ({"lookahead": True}, "look_ahead()")]
)
def test_a_setting_that_a_method_does_which_the_loop_never_calls_is_told_once(setting, method, caplog):
    peers = met(**setting)
    for _ in range(3):
        peers.loss(torch.zeros(2, NUM_CLASSES, requires_grad=True), torch.tensor([0, 1]), range(2))
    (told,) = [record.message for record in caplog.records if "which this loop has not called" in record.message]
    assert method in told


def test_a_loop_that_calls_what_its_settings_are_for_is_told_nothing(caplog):
    peers = met(lookahead=True)
    net, inputs, targets = torch.nn.Linear(2, NUM_CLASSES), torch.ones(2, 2), torch.tensor([0, 1])
    for _ in range(3):
        loss = peers.loss(net(inputs), targets, range(2))
        peers.look_ahead(net, inputs, targets, range(2))
        loss.backward()
    assert "has not called" not in caplog.text


def test_a_loop_that_counts_by_itself_names_what_must_be_equal_of_its_batches():
    """fairseq's epochs may differ in length, and a model that was started again may be in another one."""
    for order in (DataOrder(120, [1]), DataOrder(98, [1])):
        peers = met(order, update_freq=1)
        assert "batches per epoch" not in peers._clock.settings()
    assert met(40)._clock.settings()["batches per epoch"] == 40
