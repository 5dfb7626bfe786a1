"""Weights get pixels as they know them: teachers are given them so, of the model that is trained it is told."""

import dataclasses

import pytest
import safetensors.torch
import timm
import torch
from fairseq_codistill.vision.checkpoints import LAST, WEIGHTS, Checkpoint, save, save_weights
from fairseq_codistill.vision.config import VisionConfig
from fairseq_codistill.vision.datasets import STATISTICS, load_images
from fairseq_codistill.vision.options import parse_options
from fairseq_codistill.vision.origin import Pixels, Rescaled, for_pixels, tell_other_pixels
from fairseq_codistill.vision.teachers import load_teacher

KNOWS_HALF = "test_resnet"  # of timm, whose weights were trained on pixels of mean and std 0.5


def normalised(pixels, mean, std):
    shape = (1, 3, 1, 1)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def stored(folder, dataset):
    """A model, what is saved of a training of it, and the settings of one that it teaches."""
    torch.manual_seed(2)
    model = timm.create_model(KNOWS_HALF, num_classes=10).eval()
    torch.save(model.state_dict(), folder / "timm.pth")
    options = dataclasses.asdict(VisionConfig(model=KNOWS_HALF, dataset=dataset))
    checkpoint = Checkpoint(model.state_dict(), {}, {}, 1, {}, 0.0, options)
    save(folder, LAST, checkpoint)
    save_weights(folder, checkpoint)
    safetensors.torch.save_file(model.state_dict(), folder / "timm.safetensors", {"format": "pt"})
    safetensors.torch.save_file(model.state_dict(), folder / "of_the_hub.safetensors")  # as timm exports them
    (folder / "earlier").mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "earlier" / WEIGHTS)
    return model, parse_options(["--no-save", "--dataset", "fake", "--model", KNOWS_HALF])


@pytest.mark.parametrize(
    ("file", "dataset", "known"),
    [
        ("timm.pth", "fake", "digits"),  # as the configuration of timm says it
        ("timm.safetensors", "fake", "digits"),
        ("of_the_hub.safetensors", "fake", "digits"),
        (f"earlier/{WEIGHTS}", "fake", "fake"),  # of which nothing is known
        (LAST, "imagefolder:elsewhere", "fake"),
        (LAST, "cifar10:elsewhere", "cifar10"),
        (WEIGHTS, "imagefolder:elsewhere", "fake"),
        (WEIGHTS, "cifar10:elsewhere", "cifar10"),
    ],
)
def test_a_teacher_sees_pixels_normalised_as_it_was_trained_on_them(tmp_path, file, dataset, known):
    model, config = stored(tmp_path, dataset)
    images = load_images(config)
    pixels = torch.rand(2, 3, 32, 32)
    teacher = load_teacher(config, str(tmp_path / file), images, 32).eval()
    assert isinstance(teacher, Rescaled) == (known != "fake")
    with torch.no_grad():
        found = teacher(normalised(pixels, images.mean, images.std))
        torch.testing.assert_close(found, model(normalised(pixels, *STATISTICS[known])), atol=1e-5, rtol=1e-4)


def test_a_model_for_the_same_pixels_or_for_nobody_knows_which_stays_as_it_is():
    model, images = torch.nn.Identity(), load_images(parse_options(["--no-save", "--dataset", "fake"]))
    rounded = Pixels([0.48500001, 0.456, 0.406], [0.229, 0.224, 0.225])
    for known in (rounded, None):
        assert for_pixels(model, images, known, "a teacher") is model


@pytest.mark.parametrize(
    ("dataset", "flags", "told"),
    [
        ("fake", ["--pretrained"], "--pretrained"),
        ("fake", ["--initial-checkpoint", "timm.pth"], "--initial-checkpoint is 'timm.pth'"),
        ("fake", ["--initial-checkpoint", LAST], ""),
        ("fake", [], ""),
        ("digits", ["--pretrained"], ""),
    ],
)
def test_weights_that_training_starts_from_are_told_of_where_they_know_other_pixels(
    tmp_path, monkeypatch, caplog, dataset, flags, told
):
    model, _ = stored(tmp_path, "fake")
    monkeypatch.chdir(tmp_path)
    config = parse_options(["--no-save", "--dataset", dataset, "--model", KNOWS_HALF, *flags])
    tell_other_pixels(config, model, load_images(config))
    assert len(caplog.records) == bool(told)
    if told:
        assert caplog.records[0].getMessage().startswith(told)
        assert "mean 0.500/0.500/0.500 and std 0.500/0.500/0.500; here" in caplog.text
        assert "by mean 0.485/0.456/0.406 and std 0.229/0.224/0.225, those of --dataset" in caplog.text
