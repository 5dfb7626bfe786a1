"""Image files that cannot be read: named before training, left out on request, and the same everywhere."""

import json

import numpy as np
import pytest
import torch
from fairseq_codistill.vision import train
from fairseq_codistill.vision.broken import KEPT_NAME, KEPT_TRANSFER_NAME, BrokenImageError, read_image
from fairseq_codistill.vision.data import train_loader, valid_loader
from fairseq_codistill.vision.datasets import load_images
from fairseq_codistill.vision.distributed import Place
from fairseq_codistill.vision.options import parse_options
from PIL import Image

from fairseq_codistill.config import ConfigError
from fairseq_codistill.sampling import Timetable


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / label / f"{number}.jpg")
    return tmp_path / "images"


def cut_off(path):
    """A JPEG without its end: its first bytes are those of an image."""
    path.write_bytes(path.read_bytes()[:-200])


def options(folder, *flags):
    fixed = ["--no-save", "--dataset", f"imagefolder:{folder}", "--image-size", "8", "--batch-size", "4"]
    return parse_options([*fixed, *flags])


def train_batches(folder, *flags):
    config = options(folder, *flags)
    images = load_images(config)
    table = Timetable(len(images.train), 1, 4, 1, 1)
    return list(train_loader(config, images, table, 0, 0, table.updates_per_pass, pin_memory=False))


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_a_truncated_jpeg_is_named_in_one_line_whatever_process_loads_it(folder, num_workers):
    broken = folder / "train/dog/3.jpg"
    cut_off(broken)
    with pytest.raises(BrokenImageError, match="truncated") as error:
        train_batches(folder, "--num-workers", num_workers)
    assert str(error.value).startswith(f"{broken} cannot be read: ")
    assert "put a readable image in its place, and the same --save-dir goes on" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_image_is_found_before_training(folder):
    (folder / "val/cat/9.png").write_text("this is a web page")
    (folder / "train/dog/8.jpg").touch()
    with pytest.raises(ConfigError, match="^2 of 26 files cannot be opened as images: ") as error:
        load_images(options(folder))
    assert f"{folder / 'val/cat/9.png'} (not an image)" in str(error.value)
    assert str(folder / "train/dog/8.jpg") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_folder_is_one_line(folder, split):
    (folder / split / "fox").mkdir()
    with pytest.raises(ConfigError, match="fox") as error:
        load_images(options(folder))
    assert "\n" not in str(error.value)
    assert str(folder / split) in str(error.value)


def test_a_class_that_only_one_split_has_is_named(folder):
    (folder / "train/fox").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train/fox/1.png")
    with pytest.raises(ConfigError, match="train/ has 3 classes and val/ 2; only one of them has fox"):
        load_images(options(folder))


def test_broken_files_are_left_out_alike_by_all_who_load_them_and_counted(folder):
    cut_off(folder / "train/dog/3.jpg")
    cut_off(folder / "val/cat/0.jpg")
    (folder / "train/cat/7.jpg").write_text("no image")
    config = options(folder, "--skip-broken", "--num-workers", "0")
    images = load_images(config)
    assert (len(images.train), len(images.valid), images.num_broken) == (11, 11, 3)
    shares = [sum(len(b.targets) for b in valid_loader(config, images, rank, 2, False)) for rank in range(2)]
    assert shares == [6, 5]
    models = "--skip-broken --codistill-num-models 2 --codistill-addresses 127.0.0.1:1,127.0.0.1:2".split()
    ours = train_batches(folder, *models, "--num-workers", "0")
    theirs = train_batches(folder, *models, "--num-workers", "3")
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.fingerprint == other.fingerprint


def test_the_list_of_broken_files_is_kept_and_looked_at_again(folder, tmp_path, monkeypatch):

    def num_broken():
        return load_images(options(folder, "--skip-broken"), kept_in=tmp_path / KEPT_NAME).num_broken

    whole = (folder / "train/dog/3.jpg").read_bytes()
    cut_off(folder / "train/dog/3.jpg")
    assert num_broken() == 1
    assert list(json.loads((tmp_path / KEPT_NAME).read_text())["broken"]) == [str(folder / "train/dog/3.jpg")]

    looked_at = []
    decode = Image.open
    monkeypatch.setattr(Image, "open", lambda path: looked_at.append(path) or decode(path))
    assert num_broken() == 1
    assert looked_at == [str(folder / "train/dog/3.jpg")]
    (folder / "train/dog/3.jpg").write_bytes(whole)
    assert num_broken() == 0
    looked_at.clear()
    Image.new("RGB", (8, 8)).save(folder / "train/dog/9.png")  # another set of files
    assert num_broken() == 0
    assert len(looked_at) == 25


def test_a_quick_look_is_not_taken_for_a_thorough_one(folder, tmp_path):
    assert load_images(options(folder), kept_in=tmp_path / KEPT_NAME).num_broken == 0
    cut_off(folder / "train/dog/3.jpg")  # the folder's time stays
    assert load_images(options(folder, "--skip-broken"), kept_in=tmp_path / KEPT_NAME).num_broken == 1


def test_nothing_is_left_to_skip_without_files(tmp_path):
    with pytest.raises(ConfigError, match="--skip-broken is set, but"):
        parse_options(["--no-save", "--dataset", "digits", "--skip-broken"])


def test_a_split_of_which_every_image_is_broken_is_an_error(folder):
    for path in (folder / "val").rglob("*.jpg"):
        cut_off(path)
    with pytest.raises(ConfigError, match="left out every image of .*val"):
        load_images(options(folder, "--skip-broken"))


def test_a_broken_image_of_a_set_that_is_held_in_memory_is_named_before_training(tmp_path):
    for split in ("train", "test"):
        for label in range(10):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for number in range(2):
                Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / split / str(label) / f"{number}.jpg")
    cut_off(tmp_path / "train/4/1.jpg")
    flags = ["--no-save", "--dataset", f"cifar10:{tmp_path}"]
    cut_off(tmp_path / "test/7/0.jpg")
    with pytest.raises(
        ConfigError, match=r"1 of 20 images of .*/train cannot be read: .*train/4/1.jpg; mend or remove"
    ):
        load_images(parse_options(flags))
    images = load_images(parse_options([*flags, "--skip-broken"]))
    assert (len(images.train), images.num_broken) == (19, 2)


def test_grey_images_of_16_bits_keep_their_levels_and_numbers_of_no_known_range_are_refused(tmp_path):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        found = np.array(read_image(str(tmp_path / name)))
        assert found.shape == (16, 16, 3)
        assert (found[..., 0].flatten() == np.arange(256)).all()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(BrokenImageError, match=r"float.tiff cannot be read: its numbers are of mode F"):
        read_image(str(tmp_path / "float.tiff"))


@pytest.mark.parametrize("largest", [65535, 1023])
def test_a_pgm_of_16_bits_keeps_its_levels_and_passes_the_check(folder, largest):
    levels = np.linspace(0, largest, 16).astype(">u2")
    path = folder / "train/cat/9.pgm"
    path.write_bytes(b"P5 4 4 %d\n" % largest + levels.tobytes())
    found = np.array(read_image(str(path)))[..., 0].flatten()
    assert np.abs(found - np.linspace(0, 255, 16)).max() <= 1
    assert len(load_images(options(folder)).train) == 13


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_no_known_range_are_found_before_training(folder, dtype):
    Image.fromarray(np.full((8, 8), 7, dtype)).save(folder / "train/dog/9.tiff")
    with pytest.raises(ConfigError, match=r"9\.tiff \(its numbers are of mode [IF], whose range is not known"):
        load_images(options(folder))
    assert load_images(options(folder, "--skip-broken")).num_broken == 1


def test_files_that_are_left_out_for_their_suffix_are_counted_and_hidden_ones_are_not(folder, caplog):
    load_images(options(folder))
    (folder / "train/dog/.DS_Store").touch()
    load_images(options(folder))
    assert not caplog.records
    for name in ("1.GIF", "2.gif", "notes.txt", "README"):
        (folder / "train/dog" / name).touch()
    assert len(load_images(options(folder)).train) == 12
    (record,) = caplog.records
    assert record.getMessage().startswith(f"4 files below {folder / 'train'} are left out, ")
    assert "(.gif: 2, .txt: 1, no suffix: 1)" in record.getMessage()


def test_what_was_found_of_a_transfer_set_is_kept_in_a_file_of_its_own(folder, tmp_path, monkeypatch):
    def enough(*_):
        raise ConfigError("enough")

    models = "--codistill-num-models 2 --codistill-addresses 127.0.0.1:1,127.0.0.1:2 --batch-size 4 --cpu".split()
    transfer = ["--transfer-dataset", f"imagefolder:{folder / 'val'}"]
    flags = ["--model", "wrn10_1", "--image-size", "8", "--dataset", f"imagefolder:{folder}", *models, *transfer]
    config = parse_options([*flags, "--save-dir", str(tmp_path)])
    monkeypatch.setattr(train, "PeerExchange", enough)
    place, looked_at, decode = Place(0, 1, torch.device("cpu")), [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: looked_at.append(path) or decode(path))
    for num_looked_at in (12 + 12 + 12, 0):
        with pytest.raises(ConfigError, match="enough"):
            train.run(config, place, None)
        assert len(looked_at) == num_looked_at
        assert {path.name for path in tmp_path.glob("*.json")} == {KEPT_NAME, KEPT_TRANSFER_NAME}
        looked_at.clear()
