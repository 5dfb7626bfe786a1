"""Owns what ``--dry-run`` knows of ``codistill-vision``: its settings, presets included, and the size of its model.

It imports the vision module only when that is the program; no data are read, and no weights are made.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fairseq_codistill.config import ConfigError

if TYPE_CHECKING:
    from vision.config import VisionConfig

IMAGENET_CLASSES, CIFAR_CLASSES = 1000, 10


class NumClasses(NamedTuple):
    """How many classes the predictions have, and how that is known."""

    value: int
    source: str


def vision_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows ``codistill-vision`` (or ``python -m vision.train``); None for any other program."""
    for position, argument in enumerate(command[:4]):
        path = argument.replace(os.sep, "/")
        if os.path.basename(path) == "codistill-vision" or path.endswith(("vision.train", "vision/train.py")):
            return list(command[position + 1 :])
    return None


def vision_config(command: Sequence[str]) -> "VisionConfig | None":
    """The options that ``codistill-vision`` would see, presets included; None for any other program.

    Raises:
        ConfigError: an option cannot be read.
    """
    arguments = vision_arguments(command)
    if arguments is None:
        return None
    from vision.options import parse_options

    try:
        return parse_options(arguments)
    except SystemExit as error:  # argparse has written why
        raise ConfigError("codistill-vision cannot read its options; what is wrong with them is above") from error


def count_classes(config: "VisionConfig") -> NumClasses:
    """Folders of the data where they are here; what is usual for the data set elsewhere."""
    kind, _, folder = config.dataset.partition(":")
    if kind == "fake":
        return NumClasses(config.fake_classes, "--fake-classes")
    train = Path(folder) / "train"
    if kind == "imagefolder" and train.is_dir():
        return NumClasses(sum(entry.is_dir() for entry in train.iterdir()), f"folders in {train}")
    if kind == "imagefolder":
        return NumClasses(IMAGENET_CLASSES, "those of ImageNet: the folder of --dataset is not here")
    return NumClasses(CIFAR_CLASSES, f"--dataset {kind}")


def parameter_shapes(config: "VisionConfig", num_classes: int) -> list[tuple[int, ...]]:
    """Shapes of the trained parameters, of a model without weights.

    Raises:
        ConfigError: there is no such model.
    """
    import dataclasses

    import torch

    from vision.models import make_model

    # A checkpoint of the first group, and weights to download, would be read; neither changes a shape.
    bare = dataclasses.replace(config, first_group="", pretrained=False)
    with torch.device("meta"):
        model = make_model(bare, num_classes)
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
