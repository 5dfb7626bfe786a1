"""Coordinated images: the same on all models, whatever loads them, and a fingerprint that sees the pixels."""

import pickle
import random

import numpy as np
import pytest
import torch
from fairseq_codistill.vision.config import DataConfig
from fairseq_codistill.vision.data import AugmentedImages, eval_transform, train_loader, train_transform, valid_loader
from fairseq_codistill.vision.datasets import load_images, load_unlabelled
from fairseq_codistill.vision.options import parse_options
from fairseq_codistill.vision.plan import plan_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.keys import DataOrder
from fairseq_codistill.sampling import BatchSpan, Draw, Timetable, augmentation_seed

CODISTILLED = "--no-save --codistill-num-models 2 --codistill-addresses 127.0.0.1:1,127.0.0.1:2 --batch-size 8".split()


def batches(*flags, rank=0, world_size=1, start=0, stop=3):
    config = parse_options([*CODISTILLED, "--num-workers", "0", *flags])
    images = load_images(config)
    table = Timetable(len(images.train), config.data_divisor, config.batch_size, world_size, config.codistill_data_seed)
    return list(train_loader(config, images, table, rank, start, stop, pin_memory=False))


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert one.fingerprint == other.fingerprint


@given(
    st.integers(20, 90), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(0, 30)
)
def test_ranks_share_each_pass_without_overlap(num_images, divisor, batch_size, world_size, seed, start):
    if num_images // divisor < batch_size * world_size:
        return
    table = Timetable(num_images, divisor, batch_size, world_size, seed)
    stop = start + table.updates_per_pass
    ranks = [list(BatchSpan(table, rank, start, stop)) for rank in range(world_size)]
    draws = [draw for mine in ranks for batch in mine for draw in batch]
    assert len(set(draws)) == len(draws) == table.updates_per_pass * batch_size * world_size
    assert {draw.sample for draw in draws} <= set(table.samples.tolist())
    assert len(table.samples) == num_images // divisor
    # Beginning anywhere gives the rest of the same batches, which is all that resuming needs.
    middle = (start + stop) // 2
    assert list(BatchSpan(table, 0, middle, stop)) == ranks[0][middle - start :]


def test_two_passes_have_two_orders_and_a_data_seed_has_its_own():
    table, other = Timetable(100, 1, 10, 1, 1), Timetable(100, 1, 10, 1, 2)
    assert sorted(table.order(1)) == sorted(table.order(2)) == list(range(100))
    assert table.order(1) != table.order(2)
    assert table.order(1) != other.order(1)
    assert table.order(1) == Timetable(100, 1, 10, 1, 1).order(1)


def test_the_clock_counts_epochs_of_the_whole_data_and_passes_of_the_part():
    table = Timetable(100, 4, 5, 1, 1)
    assert (table.updates_per_epoch, table.updates_per_pass) == (20, 5)
    assert table.progress(30) == 1.5
    assert [table.epoch(elapsed) for elapsed in (0, 19, 20)] == [1, 1, 2]
    order = DataOrder(table.updates_per_pass)
    assert [tuple(order.key(elapsed)) for elapsed in (0, 4, 5, 19)] == [(1, 0, 0), (1, 4, 0), (2, 0, 0), (4, 4, 0)]


def test_too_few_images_for_one_update_are_an_error():
    with pytest.raises(ConfigError, match="there are only 25 samples"):
        Timetable(100, 4, 13, 2, 1)


@pytest.mark.parametrize("augmentation", ["goyal --color-jitter 0.4", "cifar", "crop", "none"])
def test_models_with_other_seeds_and_loaders_see_the_same_pixels(augmentation):
    flags = ["--augmentation", *augmentation.split()]
    torch.manual_seed(1)
    random.seed(1)
    first = batches(*flags, "--seed", "1")
    torch.manual_seed(2)
    random.seed(2)
    assert_same(first, batches(*flags, "--seed", "2", "--num-workers", "2"))
    assert_same(first[2:], batches(*flags, start=2))


def test_the_augmentation_differs_between_images_passes_and_data_seeds():
    seeds = [augmentation_seed(*of) for of in ((1, Draw(1, 3)), (1, Draw(2, 3)), (1, Draw(1, 4)), (2, Draw(1, 3)))]
    assert len(set(seeds)) == 4
    plain, cropped = batches("--augmentation", "none"), batches("--augmentation", "crop")
    assert torch.equal(plain[0].targets, cropped[0].targets)
    assert plain[0].fingerprint != cropped[0].fingerprint


def test_loading_leaves_the_generators_of_the_training_process_alone():
    images = load_images(parse_options(["--no-save"]))
    dataset = AugmentedImages(images.train, train_transform("goyal", 8, 0.4), data_seed=1)
    states = torch.get_rng_state(), random.getstate()
    first = dataset[Draw(1, 0)][0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.rand(5)
    assert torch.equal(dataset[Draw(1, 0)][0], first)
    assert not torch.equal(dataset[Draw(2, 0)][0], first)


def test_an_image_is_augmented_alike_alone_and_in_any_batch():
    images = load_images(parse_options(["--no-save"]))
    dataset = AugmentedImages(images.train, train_transform("goyal", 8, 0.4), data_seed=1)
    draws = [Draw(1, 3), Draw(1, 0), Draw(2, 3)]
    states = torch.get_rng_state(), random.getstate()
    together = dataset.__getitems__(draws)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for draw, (image, target, number) in zip(draws, together, strict=True):
        alone = dataset[draw]
        assert torch.equal(image, alone[0])
        assert (target, number) == alone[1:]


def test_ranks_of_all_models_see_their_share_of_the_same_update():
    one = batches("--batch-size", "16", "--augmentation", "cifar")
    halves = [batches("--augmentation", "cifar", rank=rank, world_size=2) for rank in (0, 1)]
    for whole, *parts in zip(one, *halves, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))


def test_every_validation_image_is_in_one_share():
    config = parse_options(["--no-save", "--num-workers", "0"])
    images = load_images(config)
    shares = [sum(len(b.targets) for b in valid_loader(config, images, rank, 3, False)) for rank in range(3)]
    assert shares == [120, 120, 120]
    assert (len(images.train), images.num_classes) == (1437, 10)


def test_fake_images_are_the_same_every_time_and_of_the_size_that_is_asked_for():
    config = parse_options("--no-save --dataset fake --fake-images 40 --fake-classes 7 --image-size 16".split())
    first, second = load_images(config), load_images(config)
    assert (len(first.train), len(first.valid), first.num_classes) == (40, 5, 7)
    for index in (0, 39):
        assert torch.equal(first.train[index][0], second.train[index][0])
        assert first.train[index][0].shape == (3, 16, 16)
    assert not torch.equal(first.train[0][0], first.train[7][0])  # the same class
    assert not torch.equal(first.train[0][0], first.valid[0][0])


def make_folder(folder, splits=("train", "val"), classes=("cat", "dog"), size=(12, 10)):
    generator = np.random.default_rng(0)
    for split in splits:
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.mark.parametrize("validation", ["val", "test"])
def test_a_folder_of_images_is_read(tmp_path, validation):
    folder = make_folder(tmp_path, ("train", validation))
    got = batches("--dataset", f"imagefolder:{folder}", "--image-size", "8", "--batch-size", "4", stop=2)
    assert [tuple(batch.images.shape) for batch in got] == [(4, 3, 8, 8)] * 2
    assert sorted(torch.cat([batch.targets for batch in got]).tolist()) == [0] * 4 + [1] * 4


def test_cifar_is_read_as_a_folder_of_images(tmp_path):
    folders = make_folder(tmp_path, ("train", "test"), [f"class{i}" for i in range(10)], (32, 32))
    images = load_images(parse_options(["--no-save", "--dataset", f"cifar10:{folders}"]))
    pixels, target = images.train[5]
    assert (tuple(pixels.shape), pixels.dtype, target) == ((3, 32, 32), torch.uint8, 1)
    stored = np.asarray(Image.open(folders / "train/class1/1.png"))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), stored)
    assert (images.image_size, images.augmentation, images.num_classes) == (32, "cifar", 10)


def test_small_images_of_other_classes_have_theirs_and_of_other_sizes_are_told_of(tmp_path):
    folder = make_folder(tmp_path, ("train", "test"), ("cat", "dog", "fox"), (32, 32))
    options = parse_options(["--no-save", "--dataset", f"cifar10:{folder}"])
    assert load_images(options).num_classes == 3
    assert plan_of(["--no-save", "--dataset", f"cifar10:{folder}"]).classes.value == 3
    Image.new("RGB", (40, 24)).save(folder / "train/dog/2.png")
    with pytest.raises(ConfigError, match=r"differ in size \(32 x 32, 40 x 24\); give imagefolder:"):
        load_images(options)


def test_cifar_is_read_as_torchvision_unpacks_it(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (6, 10, 3072), dtype=np.uint8)
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": rows[number], "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    # These are not the real files, whose digests torchvision knows.
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    images = load_images(parse_options(["--no-save", "--dataset", f"cifar10:{tmp_path}"]))
    assert (len(images.train), len(images.valid)) == (50, 10)
    pixels, target = images.train[13]
    assert target == 3
    assert np.array_equal(pixels.numpy().reshape(-1), rows[1, 3])


@pytest.mark.parametrize("kind", ["cifar10", "imagefolder"])
def test_a_folder_without_images_is_named(tmp_path, kind):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_images(parse_options(["--no-save", "--dataset", f"{kind}:{tmp_path}"]))


def test_transforms_give_uint8_of_the_size_for_photographs_and_tensors():
    photograph = Image.fromarray(np.zeros((50, 70, 3), np.uint8))
    for image in (photograph, torch.zeros(3, 50, 70, dtype=torch.uint8)):
        for augmentation in ("goyal", "cifar", "crop", "none"):
            for transform in (train_transform(augmentation, 24, 0.4), eval_transform(augmentation, 24)):
                assert transform(image).shape == (3, 24, 24)
                assert transform(image).dtype == torch.uint8


def test_a_transfer_set_without_labels_is_checked_before_training(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    (tmp_path / "pictures/b.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"b\.png"):
        load_unlabelled(DataConfig(dataset=f"imagefolder:{tmp_path}"))
    assert len(load_unlabelled(DataConfig(dataset=f"imagefolder:{tmp_path}", skip_broken=True))) == 1
