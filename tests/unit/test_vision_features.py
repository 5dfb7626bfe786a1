"""Accumulated gradients, moving averages, mixing, policies of augmentation, initial weights: alike on all models."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from fairseq_codistill.vision.data import Batch, train_loader
from fairseq_codistill.vision.datasets import load_images
from fairseq_codistill.vision.distributed import Place
from fairseq_codistill.vision.engine import Trainer
from fairseq_codistill.vision.exchange import PeerExchange
from fairseq_codistill.vision.mixing import Mixing
from fairseq_codistill.vision.models import make_model
from fairseq_codistill.vision.options import parse_options
from fairseq_codistill.vision.prefetch import in_groups, on_device
from fairseq_codistill.vision.step import Step
from torch.nn import functional

from fairseq_codistill.config import ConfigError
from fairseq_codistill.sampling import Timetable

PLACE = Place(0, 1, torch.device("cpu"))
# Nothing in it depends on other images of the batch.
WITHOUT_BATCH_NORM = (
    "--model vit_tiny_patch16_224 --model-kwargs img_size=8 patch_size=4 embed_dim=48 num_heads=3 depth=1"
).split()
MODELS = "--codistill-num-models 2 --codistill-addresses 127.0.0.1:1,127.0.0.1:2".split()


def make_trainer(*flags, limit=None):
    unsaved = [] if "--save-dir" in flags else ["--no-save"]
    config = parse_options([*unsaved, "--model", "wrn10_1", "--num-workers", "0", *flags])
    images = load_images(config)
    table = Timetable(len(images.train), 1, config.batch_size * config.update_freq, 1, 1)
    torch.manual_seed(config.seed)
    model = make_model(config, images.num_classes)
    if limit is not None:
        model.register_buffer("limit", torch.tensor(limit))
    return Trainer(config, PLACE, images, model, table, PeerExchange(config, PLACE, table))


def train(trainer, num_updates):
    start = trainer.elapsed
    loader = train_loader(trainer.config, trainer.images, trainer.timetable, 0, start, start + num_updates, False)
    for batches in in_groups(loader, trainer.config.update_freq):
        trainer.update(batches)
        trainer.elapsed += 1
    return trainer


def batches_of(*flags, **places):
    config = parse_options(["--no-save", "--batch-size", "8", "--num-workers", "0", *MODELS, *flags])
    images = load_images(config)
    table = Timetable(len(images.train), 1, config.batch_size * config.update_freq, 1, 1)
    return list(train_loader(config, images, table, 0, places.get("start", 0), 3, pin_memory=False))


# -- gradient accumulation


def test_an_update_of_four_batches_is_one_of_a_batch_four_times_as_large():
    settings = [*WITHOUT_BATCH_NORM, "--augmentation", "cifar", "--lr-batch-size", "64", "--lr", "0.5"]
    whole = train(make_trainer(*settings, "--batch-size", "32"), 5)
    parts = train(make_trainer(*settings, "--batch-size", "8", "--update-freq", "4"), 5)
    assert whole.stop_at == parts.stop_at
    assert whole._schedule_record() == parts._schedule_record()
    for (name, mine), theirs in zip(parts.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4, msg=name)
    records = [trainer.sums.train_record(PLACE) for trainer in (whole, parts)]
    for key in ("loss", "nll_loss", "top1"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-5)


def test_the_images_of_an_update_are_the_same_however_it_is_cut():
    whole = batches_of("--batch-size", "16")
    parts = batches_of("--batch-size", "4", "--update-freq", "4")
    assert len(parts) == 4 * len(whole)
    assert torch.equal(torch.cat([batch.images for batch in parts]), torch.cat([batch.images for batch in whole]))
    later = batches_of("--batch-size", "4", "--update-freq", "4", start=2)
    assert [batch.fingerprint for batch in later] == [batch.fingerprint for batch in parts[8:]]


def test_a_part_of_an_update_at_the_end_is_left_out():
    assert list(in_groups(iter("abcdefg"), 3)) == [["a", "b", "c"], ["d", "e", "f"]]


# -- moving average


def test_the_moving_average_is_that_of_its_definition_and_is_what_is_evaluated():
    trainer = make_trainer("--ema-decay", "0.7", "--lr", "0.5")
    train(trainer, 1)
    expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}  # the first is taken whole
    for _ in range(3):
        train(trainer, 1)
        for name, value in trainer.model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.7 * expected[name] + 0.3 * value
    found = trainer.ema.module.state_dict()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, msg=name)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    alone = trainer.logits(trainer.ema.module, trainer.normalised(images))
    assert torch.equal(trainer.predict(images), alone)
    assert not torch.equal(trainer.predict(images), trainer.logits(trainer.model, trainer.normalised(images)))


def test_a_buffer_that_is_infinite_by_design_is_so_in_the_average_and_in_one_that_goes_on(tmp_path):
    """gemma4_vit_* of timm clamp by such."""
    flags = ("--ema-decay", "0.7", "--save-dir", str(tmp_path))
    trainer = train(make_trainer(*flags, limit=[-torch.inf, 2.0]), 3)
    state = trainer.ema.module.state_dict()
    assert state["limit"].tolist() == [-torch.inf, 2.0]
    state["limit"][0] = torch.nan  # as earlier versions left it
    trainer.finite = SimpleNamespace(holds=lambda state: True)
    trainer.save()
    assert make_trainer(*flags, limit=[-torch.inf, 2.0]).ema.module.limit.tolist() == [-torch.inf, 2.0]


def test_without_a_decay_there_is_no_average():
    trainer = make_trainer()
    assert trainer.ema is None
    assert trainer.evaluated is trainer.model


# -- mixup and cutmix


@pytest.mark.parametrize("flags", ["--mixup 0.8", "--cutmix 1.0", "--mixup 0.2 --cutmix 1"])
def test_models_with_other_seeds_mix_alike_at_every_position_and_ranks_do_not(flags):
    def mixed(seed, elapsed, micro_batch=0, rank=0):
        config = parse_options(["--no-save", "--seed", str(seed), *flags.split()])
        np.random.seed(seed)
        torch.manual_seed(seed)
        images = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).view(4, 3, 8, 8)
        return Mixing(config, 10, rank)(images, torch.tensor([3, 1, 4, 9]), elapsed, micro_batch)

    first = mixed(1, 7)
    for one, other in zip(first, mixed(2, 7), strict=True):
        assert torch.equal(one, other)
    others = [mixed(1, 8)[0], mixed(1, 7, micro_batch=1)[0], mixed(1, 7, rank=1)[0]]
    assert not any(torch.equal(first[0], other) for other in others)
    torch.testing.assert_close(first[1].sum(dim=1), torch.ones(4))


def test_mixing_leaves_the_generator_of_numpy_alone():
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    Mixing(parse_options("--no-save --mixup 0.5".split()), 10, 0)(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), 0, 0)
    assert np.random.rand() == expected


def test_the_loss_of_mixed_images_is_that_of_both_their_classes():
    trainer = make_trainer("--mixup", "1", "--batch-size", "8", "--label-smoothing", "0.1")
    images, targets = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8)
    trainer.model.eval()
    step = Step(trainer, Batch(images, targets, b""), 0)
    found = step.finish(step.forward())
    inputs, shares = trainer.mixing(trainer.normalised(images), targets, 0, 0)
    assert shares.max() < 1
    smooth = shares * 0.9 + 0.01
    expected = -(smooth * functional.log_softmax(trainer.model(inputs), dim=1)).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


# -- policies of augmentation


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5", "augmix-m5", "original"])
def test_a_policy_of_timm_draws_alike_on_all_models_whatever_loads_the_images(policy):
    flags = ["--auto-augment", policy]
    ours = batches_of(*flags, "--seed", "1")
    np.random.seed(5)
    theirs = batches_of(*flags, "--seed", "2", "--num-workers", "2")
    plain = batches_of()
    assert len(ours) == len(theirs) == 3
    for one, other, without in zip(ours, theirs, plain, strict=True):
        assert one.fingerprint == other.fingerprint
        assert torch.equal(one.images, other.images)
        assert not torch.equal(one.images, without.images)
        assert one.images.shape == without.images.shape


@pytest.mark.parametrize("policy", ["rand-x9", "none_such"])
def test_an_unknown_policy_is_named_before_training(policy):
    with pytest.raises(ConfigError, match=f"--auto-augment is '{policy}', which timm cannot read"):
        make_trainer("--auto-augment", policy)


def test_pixels_are_known_by_what_is_in_force(tmp_path):
    flags = ("--save-dir", str(tmp_path))
    make_trainer(*flags).save()
    make_trainer(*flags, "--augmentation", "crop", "--image-size", "8", "--color-jitter", "0.4")  # of goyal alone
    for flag, value in (
        ("--augmentation", "cifar"),
        ("--image-size", "16"),
        ("--auto-augment", "rand-m9"),
        ("--cutmix", "1"),
    ):
        with pytest.raises(ConfigError, match=f"{flag} is '?{value}.* was trained with"):
            make_trainer(*flags, flag, value)


# -- weights to start from


def test_weights_of_timm_are_taken_and_a_classifier_of_another_size_begins_anew(tmp_path):
    torch.manual_seed(3)
    stored = timm.create_model("resnet18", num_classes=7)
    torch.save(stored.state_dict(), tmp_path / "weights.pth")
    config = parse_options(["--no-save", "--initial-checkpoint", str(tmp_path / "weights.pth")])
    model = make_model(config, 10)
    assert torch.equal(model.layer4[0].conv1.weight, stored.layer4[0].conv1.weight)
    assert model.fc.weight.shape == (10, 512)
    whole = make_model(config, 7)
    assert torch.equal(whole.fc.weight, stored.fc.weight)


def test_safetensors_are_taken(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    stored = timm.create_model("resnet18", num_classes=10)
    safetensors.save_file(stored.state_dict(), str(tmp_path / "model.safetensors"))
    model = make_model(parse_options(["--no-save", "--initial-checkpoint", str(tmp_path / "model.safetensors")]), 10)
    assert torch.equal(model.fc.weight, stored.fc.weight)


@pytest.mark.parametrize("has_average", [True, False])
def test_a_checkpoint_of_this_program_is_taken_its_average_first(tmp_path, has_average):
    raw, average = (make_trainer("--seed", seed).model.state_dict() for seed in ("1", "2"))
    torch.save({"model": raw, "ema": average if has_average else {}}, tmp_path / "checkpoint_best.pt")
    flags = ["--no-save", "--model", "wrn10_1", "--initial-checkpoint", str(tmp_path / "checkpoint_best.pt")]
    found = make_model(parse_options(flags), 10).state_dict()
    for name, value in (average if has_average else raw).items():
        assert torch.equal(found[name], value), name


def test_weights_of_another_model_or_of_none_are_one_line(tmp_path):
    torch.save(timm.create_model("resnet34", num_classes=10).state_dict(), tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty.pt").touch()
    unreadable = [(name, "cannot be read") for name in ("text.pth", "none.pth", "text.safetensors", "empty.pt")]
    for name, message in (("other.pth", "is of another model"), *unreadable):
        with pytest.raises(ConfigError, match=message) as error:
            make_model(parse_options(["--no-save", "--initial-checkpoint", str(tmp_path / name)]), 10)
        assert "\n" not in str(error.value)


# -- the way to the device


@pytest.mark.parametrize(
    "kind", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_batches_reach_the_device_whole_and_in_order(kind):
    device = torch.device(kind)
    batches = [
        Batch(torch.full((2, 3, 4, 4), at, dtype=torch.uint8), torch.tensor([at, at]), bytes([at])) for at in range(5)
    ]
    found = list(on_device(iter(batches), device))
    assert [batch.fingerprint for batch in found] == [bytes([at]) for at in range(5)]
    for at, batch in enumerate(found):
        assert batch.images.device.type == batch.targets.device.type == kind
        assert batch.images.unique().tolist() == batch.targets.unique().tolist() == [at]
    assert list(on_device(iter([]), device)) == []
