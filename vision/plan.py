"""Owns what ``codistill-vision`` says of itself before it runs, which ``codistill-launch --dry-run`` asks for.

No data are read, and no weights are made.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.programs import Assumed, ProgramPlan

if TYPE_CHECKING:
    from torch import nn

    from .config import VisionConfig

IMAGENET_CLASSES, CIFAR_CLASSES = 1000, 10


def plan_of(arguments: Sequence[str]) -> ProgramPlan:
    """From the arguments of the command line, presets included.

    Raises:
        ConfigError: an option cannot be read.
    """
    from .options import parse_options

    try:
        config = parse_options(arguments)
    except SystemExit as error:  # argparse has written why
        raise ConfigError("codistill-vision cannot read its options; what is wrong with them is above") from error
    classes = count_classes(config)
    return ProgramPlan(
        classes=classes,
        rows=Assumed(config.batch_size * config.update_freq, _rows_source(config)),
        parameter_shapes=lambda: parameter_shapes(config, classes.value or CIFAR_CLASSES),
        model=config.model,
        codec=config.codistill_codec,
        interval=config.codistill_interval,
        exchange=config.codistill_exchange,
        has_batch_norm=lambda: has_batch_norm(config, classes.value or CIFAR_CLASSES),
    )


def _rows_source(config: "VisionConfig") -> str:
    times = f" x --update-freq {config.update_freq}" if config.update_freq > 1 else ""
    return f"--batch-size {config.batch_size}{times}, images of one device"


def count_classes(config: "VisionConfig") -> Assumed:
    """Folders of the data where they are here; what is usual for the data set elsewhere."""
    kind, _, folder = config.dataset.partition(":")
    if kind == "fake":
        return Assumed(config.fake_classes, "--fake-classes")
    train = Path(folder) / "train"
    if kind in ("imagefolder", "cifar10") and train.is_dir():
        return Assumed(sum(entry.is_dir() for entry in train.iterdir()), f"folders in {train}")
    if kind == "imagefolder":
        return Assumed(IMAGENET_CLASSES, "those of ImageNet: the folder of --dataset is not here")
    return Assumed(CIFAR_CLASSES, f"--dataset {kind}")


def parameter_shapes(config: "VisionConfig", num_classes: int) -> list[tuple[int, ...]]:
    """Shapes of the trained parameters.

    Raises:
        ConfigError: there is no such model.
    """
    model = empty_model(config, num_classes)
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]


def has_batch_norm(config: "VisionConfig", num_classes: int) -> bool:
    """Whether the parts of a batch would have statistics of their own.

    Raises:
        ConfigError: there is no such model.
    """
    from fairseq_codistill import split_step

    return split_step.has_batch_norm(empty_model(config, num_classes))


def empty_model(config: "VisionConfig", num_classes: int) -> "nn.Module":
    """The model without weights.

    Raises:
        ConfigError: there is no such model.
    """
    import torch

    from .models import make_model

    # Files of weights, and weights to download, would be read; none of them changes a shape.
    bare = dataclasses.replace(config, first_group="", pretrained=False, initial_checkpoint="")
    with torch.device("meta"):
        return make_model(bare, num_classes)
