"""Schedules as the trainer applies them, figures as it logs them, bits as they leave."""

import signal
from types import SimpleNamespace

import pytest
import torch
from fairseq_codistill.vision.datasets import load_images
from fairseq_codistill.vision.distributed import Place
from fairseq_codistill.vision.engine import Trainer, learning_rate, update_seed
from fairseq_codistill.vision.exchange import PeerExchange
from fairseq_codistill.vision.metrics import Sums, evaluate
from fairseq_codistill.vision.models import make_model
from fairseq_codistill.vision.options import parse_options
from fairseq_codistill.vision.step import finite_buffers

from fairseq_codistill.codistiller import Batch, Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey, fingerprint
from fairseq_codistill.coordinator.meter import all_reduce_bits, prediction_bits
from fairseq_codistill.coordinator.wire import HEADER_BYTES
from fairseq_codistill.sampling import Timetable
from fairseq_codistill.testing import Script, ScriptedTransport

PLACE = Place(0, 1, torch.device("cpu"))
RESNET50_PARAMETERS = 25_557_032


def make_trainer(*flags):
    config = parse_options(["--no-save", "--model", "wrn10_1", "--num-workers", "0", *flags])
    images = load_images(config)
    table = Timetable(len(images.train), config.data_divisor, config.batch_size, 1, 1, config.stretch)
    torch.manual_seed(config.seed)
    model = make_model(config, images.num_classes)
    return Trainer(config, PLACE, images, model, table, PeerExchange(config, PLACE, table))


def test_the_preset_of_goyal_has_the_rates_of_the_paper():
    """A model of 8 x 32 images: no scaling, so nothing to warm up to; one of 8,192: from 0.1 to 3.2."""
    config = parse_options(["--config", "resnet50_goyal", "--no-save"])
    for epoch, rate in ((0, 0.1), (29.9, 0.1), (30, 0.01), (60, 0.001), (80, 0.0001)):
        assert learning_rate(config, epoch, 256) == pytest.approx(rate)
    for epoch, rate in ((0, 0.1), (2.5, 1.65), (5, 3.2), (30, 0.32)):
        assert learning_rate(config, epoch, 8192) == pytest.approx(rate)


def test_the_cosine_and_the_shifted_presets_change_the_rate_alone():
    config = parse_options("--config resnet50_goyal cosine --no-save".split())
    assert [learning_rate(config, epoch, 256) for epoch in (10, 45, 90)] == pytest.approx(
        [0.0969846, 0.05, 0], abs=1e-6
    )
    config = parse_options("--config resnet50_goyal shifted --no-save".split())
    rates = [learning_rate(config, epoch, 256) for epoch in (35, 36, 75, 76, 88)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.0001])


def test_a_warm_up_from_0_reaches_the_peak_even_of_a_small_batch():
    config = parse_options("--no-save --lr 0.1 --warmup-epochs 2 --warmup-lr 0 --lr-schedule constant".split())
    assert [learning_rate(config, epoch, 128) for epoch in (0, 1, 2, 9)] == pytest.approx([0, 0.025, 0.05, 0.05])


def test_the_optimizer_follows_both_schedules():
    flags = "--lr 1 --lr-batch-size 0 --lr-milestones 1 2 --weight-decay 5e-4 1e-5 0 --weight-decay-milestones 1 2"
    trainer = make_trainer(*flags.split(), "--batch-size", "143")  # ten updates an epoch
    seen = []
    for elapsed in (0, 9, 10, 20):
        trainer.elapsed = elapsed
        trainer._set_schedules()
        groups = trainer.stored_optimizer.param_groups
        decays = {group["is_decayed"]: group["weight_decay"] for group in groups}
        assert decays[False] == 0
        assert len({group["lr"] for group in groups}) == 1
        seen.append((groups[0]["lr"], decays[True]))
    assert seen == [(1, 5e-4), (1, 5e-4), (0.1, 1e-5), (pytest.approx(0.01), 0)]


def test_a_part_of_the_data_makes_the_same_number_of_updates():
    whole, part = (make_trainer("--epochs", "4", "--data-fraction", fraction) for fraction in ("1", "1/4"))
    assert whole.stop_at == part.stop_at == 4 * (1437 // 32)
    assert part.timetable.updates_per_pass == 1437 // 4 // 32
    assert learning_rate(whole.config, 3.0, 32) == learning_rate(part.config, 3.0, 32)


def test_twice_the_batch_at_twice_the_stretch_makes_the_same_updates_at_the_same_rates():
    small = make_trainer("--epochs", "4", "--batch-size", "16", "--lr-batch-size", "0", "--lr-milestones", "2")
    large = make_trainer(*"--epochs 4 --batch-size 32 --stretch 2 --lr-batch-size 0 --lr-milestones 2 --lr 0.1".split())
    assert abs(small.stop_at - large.stop_at) <= 4  # of the images that do not fill a batch
    for elapsed in (0, 100, 200):
        rates = [learning_rate(t.config, t.timetable.progress(elapsed), 1) for t in (small, large)]
        assert rates[0] == rates[1]


def test_a_communication_hook_needs_ranks_to_communicate():
    with pytest.raises(ConfigError, match="--comm-hook is 'fp16', but this model has one rank"):
        make_trainer("--comm-hook", "fp16")


def test_random_numbers_are_a_function_of_seed_rank_and_update():
    assert len({update_seed(seed, rank, at) for seed in (1, 2) for rank in (0, 1) for at in (0, 1, 2)}) == 12
    assert update_seed(1, 2, 3) == update_seed(1, 2, 3)


def test_evaluation_counts_the_first_and_the_first_five():
    logits = torch.zeros(3, 7)
    logits[0, 2], logits[1, :5], logits[2, :] = 5, torch.arange(5, 0, -1), torch.arange(7, 0, -1)
    targets = torch.tensor([2, 4, 6])  # first, fifth, seventh

    class Batch:
        pass

    batch = Batch()
    batch.images, batch.targets = torch.arange(3), targets
    record = evaluate(lambda images: logits[images], [batch], PLACE)
    assert (record["valid_top1"], record["valid_top5"]) == pytest.approx((100 / 3, 200 / 3))
    assert record["valid_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)))
    assert record["valid_images"] == 3


def test_training_figures_are_means_over_images_exchanges_and_peers():
    sums = Sums(PLACE.device)
    for _ in range(2):
        sums.add(updates=1, images=4, loss=torch.tensor(8.0), nll_loss=torch.tensor(6.0), correct=torch.tensor(1))
        sums.add(codistill_batches=1, codistill_updates=1)
    sums.add(codistill_exchanges=1, codistill_weight=0.5, codistill_peers=2, codistill_mbit=3.0, codistill_rows=8)
    sums.add(codistill_divergence=torch.tensor(12.0), codistill_agreeing=2, codistill_compared=8)
    sums.add(codistill_loss=torch.tensor(4.0), codistill_wait_ms=10)
    record = sums.train_record(PLACE)
    expected = {
        "loss": 2.0,
        "nll_loss": 1.5,
        "top1": 25.0,
        "codistill_loss": 0.5,
        "codistill_mse": 1.5,
        "codistill_agreement": 0.25,
        "codistill_weight": 0.5,
        "codistill_peers": 2.0,
        "codistill_wait_ms": 5.0,
        "codistill_mbit": 1.5,
    }
    assert {name: record[name] for name in expected} == expected
    sums.restart()
    assert sums.train_record(PLACE)["loss"] == 0


def test_the_wait_and_the_bits_are_those_of_an_update_of_several_batches():
    sums = Sums(PLACE.device)
    sums.add(updates=1, images=8, codistill_exchanges=1)
    for _ in range(4):
        sums.add(codistill_batches=1, codistill_updates=0.25, codistill_wait_ms=10, codistill_mbit=2.0)
    record = sums.train_record(PLACE)
    assert (record["codistill_wait_ms"], record["codistill_mbit"]) == (40.0, 8.0)


def test_an_evaluation_is_no_time_of_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fairseq_codistill.vision.metrics.time.monotonic", lambda: now[0])
    sums = Sums(PLACE.device)
    sums.add(images=100)
    with sums.paused():
        now[0] = 90.0
    now[0] = 91.0
    assert sums.train_record(PLACE)["images_per_s"] == 100


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_mixed_precision_and_channels_last_train(amp):
    trainer = make_trainer("--amp", amp, "--channels-last", "--lr", "1")
    loader = trainer_batches(trainer, 12)
    losses = []
    for batch in loader:
        trainer.sums.restart()
        trainer.update([batch])
        trainer.elapsed += 1
        losses.append(trainer.sums.train_record(PLACE)["loss"])
    assert sum(losses[-3:]) < sum(losses[:3])
    assert trainer.predict(batch.images).dtype == torch.float32


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_models_in_mixed_precision_teach_each_other(amp):
    addresses = "127.0.0.1:29600,127.0.0.1:29700"
    options = f"--codistill-num-models 2 --codistill-addresses {addresses} --codistill-codec fp32 --batch-size 8"
    trainer = make_trainer("--amp", amp, *options.split())
    script = Script(1, addresses, lambda key, logits: logits + 1)
    trainer.exchange.peers = Codistiller(trainer.config, rank=0, world_size=1, transport=ScriptedTransport(script))
    trainer.exchange.meet(trainer.images, trainer.model, 0, 4)
    for update, batch in enumerate(trainer_batches(trainer, 4)):
        trainer.sums.restart()
        trainer.update([batch])
        trainer.elapsed += 1
        record = trainer.sums.train_record(PLACE)
        assert record["codistill_peers"] == 1
        assert record["codistill_mse"] == pytest.approx(1, rel=1e-4)
        assert record["codistill_loss"] > 0
        assert len(script.received[0]) == update + 1
    trainer.exchange.peers.close("finished")


def trainer_batches(trainer, count):
    from fairseq_codistill.vision.data import train_loader

    return train_loader(trainer.config, trainer.images, trainer.timetable, 0, 0, count, pin_memory=False)


def test_the_predictions_of_resnet50_take_the_bits_of_the_formula_and_a_header():
    addresses = "127.0.0.1:29600,127.0.0.1:29700"
    config = CodistillationConfig(codistill_num_models=2, codistill_addresses=addresses, codistill_codec="fp32")
    script = Script(1, addresses, lambda key, logits: logits + 1)
    coordinator = Coordinator(config, transport=ScriptedTransport(script))
    coordinator.meet(Identity({}, {}, "parameters", 1))
    predictions = torch.randn(32, 1000)
    coordinator.post(BatchKey(1, 0, 0), fingerprint(torch.arange(32), torch.arange(32)), predictions)
    exchange = coordinator.collect()
    assert torch.equal(script.received[0][BatchKey(1, 0, 0)], predictions)
    bits, formula = exchange.sent_bytes * 8, prediction_bits(2, 32, 1000, 1)
    assert formula == 32 * 1000 * 32
    assert bits == formula + 8 * HEADER_BYTES
    assert bits == pytest.approx(formula, rel=0.01)
    assert all_reduce_bits(RESNET50_PARAMETERS) / bits > 1500
    coordinator.close()


def test_the_parameters_of_resnet50_are_those_of_the_formula():
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert sum(parameter.numel() for parameter in model.parameters()) == RESNET50_PARAMETERS


def settings_told(flags, monkeypatch):
    """What must be equal on models with these flags, whatever they train on."""
    told = []
    config = parse_options(["--no-save", "--model", "wrn10_2", *flags.split()])
    one = PeerExchange(config, PLACE, Timetable(64, 1, 32, 1, 1))
    monkeypatch.setattr(one.peers, "meet", lambda *_, settings, **__: told.append(settings))
    one.meet(load_images(config), make_model(config, 10), 0, 4)
    return told[0]


@pytest.mark.parametrize(("exchange", "is_compared"), [("checkpoints", True), ("predictions", False)])
def test_models_of_equal_shapes_that_compute_other_things_copy_nobody(exchange, is_compared, monkeypatch):
    told = [settings_told(f"--view {view} --codistill-exchange {exchange}", monkeypatch) for view in ("0", "5")]
    assert (told[0] != told[1]) is is_compared


@pytest.mark.parametrize("own", ["--codistill-own-data", ""])
def test_models_with_data_of_their_own_copy_nobody_whose_pixels_are_normalised_otherwise(own, monkeypatch):
    copied = f"--codistill-exchange checkpoints --image-size 8 {own}"
    told = [settings_told(f"--dataset {name} {copied}", monkeypatch) for name in ("digits", "fake")]
    assert (told[0] != told[1]) is bool(own)  # without it the data sets are compared
    if own:
        assert told[0]["mean and std of the images"] == [0.5] * 6


def test_alpha_ends_at_its_ceiling_and_is_in_the_log_once_an_epoch(caplog):
    config = parse_options(
        "--no-save --codistill-weight 2 --codistill-weight-growth 1.5 --codistill-weight-max 4".split()
    )
    exchange = PeerExchange(config, PLACE, Timetable(64, 1, 32, 1, 1))
    exchange.peers.coordinator = SimpleNamespace(is_due=lambda elapsed: True)
    with caplog.at_level("INFO"):
        weights = [
            exchange.peers.weight(Batch((1, elapsed, 0), elapsed, b"", epoch=exchange._timetable.epoch(elapsed)))
            for elapsed in range(8)
        ]
    assert weights == [2, 2, 3, 3, 4, 4, 4, 4]
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"codistillation: alpha is {alpha} in epoch {epoch}" for epoch, alpha in enumerate((2, 3, 4, 4), 1)]


def test_ranks_that_find_different_checkpoints_are_refused(monkeypatch):
    monkeypatch.setattr(Place, "gather", lambda place, mine: [5000, mine])
    with pytest.raises(
        ConfigError, match=r"checkpoints of updates \[5000, 0\] in it; give a folder that all of them see"
    ):
        make_trainer()


def test_ranks_ask_each_other_at_every_update_where_updates_are_slow_and_at_every_tenth_elsewhere(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fairseq_codistill.vision.engine.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Place, "largest", lambda place, value: value)
    trainer, stop = make_trainer(), SimpleNamespace(number=0)
    trainer.place = Place(0, 2, torch.device("cpu"))
    asked = []
    for update in range(1, 51):
        now[0] += 0.1 if update <= 20 else 2.0
        trainer.elapsed = update
        if trainer._ranks_ask_now():
            asked.append(update)
        trainer._signal_to_any_rank(stop)
    assert asked == [*range(1, 11), 20, *range(30, 51)]


@pytest.mark.parametrize("is_left_over", [False, True])
def test_a_signal_during_an_evaluation_is_followed_by_no_update(monkeypatch, is_left_over):
    """The evaluation is that after five updates, or the one that an earlier start left out."""
    trainer, stop = make_trainer("--batch-size", "143", "--eval-epochs", "0.5"), SimpleNamespace(number=0)
    log = SimpleNamespace(write=lambda *_, **__: None, advance=lambda *_: None)

    def evaluate(_):
        assert trainer.elapsed == 5
        trainer.evaluated_at, stop.number = 5, signal.SIGTERM

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    if is_left_over:
        trainer.elapsed = 5
    assert trainer.train(log, stop) == "SIGTERM"
    assert trainer.elapsed == 5


def test_the_shortest_training_makes_an_update():
    assert make_trainer("--dataset", "digits", "--epochs", "0.001").stop_at == 1


def test_a_batch_that_overflows_in_fp16_leaves_no_trace_in_running_means():
    model = torch.nn.BatchNorm1d(2)
    model.register_buffer("limit", torch.tensor(torch.inf))
    for is_needed in (True, False):
        with finite_buffers(model, is_needed):
            model(torch.tensor([[1.0, torch.inf], [3.0, 2.0]]))
        assert model.running_mean[0] > 0
        assert model.running_mean[1].isfinite() == is_needed
    assert model.limit == torch.inf
