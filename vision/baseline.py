"""Owns the answer to "is my set-up one whose result is known?": one model alone, one epoch, and a band for its top-1.

The bands are measured (``results/baseline``), never guessed: where nothing was measured the answer is that it is not
known. A result inside a band does not prove a set-up right; one outside it has something wrong with it, or another
version of something.
"""

import dataclasses
import enum
from collections.abc import Callable
from functools import partial
from typing import Any

from .config import VisionConfig
from .data import pixel_settings
from .engine import Trainer
from .step import smoothing_at

PARTS = 4  # of the epoch, at whose ends what changes in it is compared


class Verdict(enum.IntEnum):
    """What it comes to; the value is the exit code."""

    INSIDE = 0
    NOT_KNOWN = 3
    OUTSIDE = 4  # 1 and 2 are errors


@dataclasses.dataclass(frozen=True)
class Band:
    """What one epoch of a set-up came to.

    Attributes:
        name: of the set-up.
        setup: see :func:`setup_of`.
        low: percent, top-1 of the validation images.
        high: likewise.
        source: where the figures come from.
    """

    name: str
    setup: dict[str, Any]
    low: float
    high: float
    source: str


PLAIN: dict[str, Any] = {
    "classes": 10,
    "--color-jitter": 0.0,
    "--auto-augment": "",
    "--mixup": 0.0,
    "--cutmix": 0.0,
    "--model-kwargs": [],
    "starting from weights": False,
    "--view": "",
    "--drop-rate": 0.0,
    "--data-fraction": "1/1",
    "--momentum": 0.9,
    "--weight-decay": 1e-4,
    "--norm-weight-decay": False,
    "--label-smoothing": 0.0,
    "--ema-decay": 0.0,
}
DIGITS = {
    **PLAIN,
    "--dataset": "digits",
    "training images": 1437,
    "validation images": 360,
    "--image-size": 8,
    "--augmentation": "crop",
    "--model": "wrn10_1",
    "batch of an update": 16,
    "updates of an epoch": 356,
    "--optimizer": "momentum",
    "learning rate in the epoch": [0.02] * (PARTS + 1),
}
SMALL_CIFAR = {
    **PLAIN,
    "--dataset": "cifar10",
    "training images": 10_000,
    "validation images": 10_000,
    "--image-size": 16,
    "--augmentation": "cifar",
    "--model": "wrn16_1",
    "batch of an update": 64,
    "updates of an epoch": 156,
    "--optimizer": "sgd",
    "learning rate in the epoch": [0.1] * (PARTS + 1),
}
BANDS = (
    Band("digits, wrn10_1, --stretch 4", DIGITS, 77.9, 100.0, "8 seeds, results/baseline/digits.json"),
    Band(
        "10,000 of CIFAR-10 at 16 pixels, wrn16_1_goyal",
        SMALL_CIFAR,
        24.16,
        42.24,
        "8 seeds, results/baseline/cifar10.json",
    ),
)

# Published, of whole trainings: nobody published what they had after an epoch.
PUBLISHED = {
    ("resnet50", "imagefolder", 1000, 224): (
        "after all 90 epochs ResNet50 has 76.4 % top-1 (Goyal et al. 2017, table 1: error 23.60 ± 0.12 at a batch of "
        "256), and 76.13 % by all_reduce of 16 x 32 (the codistillation paper)"
    )
}


def trial_of(config: VisionConfig) -> VisionConfig:
    """The same options for one model alone, which writes nothing."""
    alone = dataclasses.replace(config, codistill_num_models=1, codistill_model_index=0, codistill_addresses="")
    untaught = dataclasses.replace(alone, codistill_teacher="", codistill_teacher_cache="")
    return dataclasses.replace(untaught, no_save=True, max_updates=0)


def setup_of(trainer: Trainer) -> dict[str, Any]:
    """What the result of the first epoch depends on, but for seed, ``--amp`` and the batch of normalisation layers."""
    config, images, place = trainer.config, trainer.images, trainer.place
    num_updates = trainer.timetable.updates_per_epoch
    rates = [trainer.rate_at(num_updates * part // PARTS) for part in range(PARTS + 1)]
    return {
        "--dataset": config.dataset.partition(":")[0],
        "training images": len(images.train),
        "validation images": len(images.valid),
        "classes": images.num_classes,
        **pixel_settings(config, images),
        "--model": config.model,
        "--model-kwargs": list(config.model_kwargs),
        "starting from weights": bool(config.pretrained or config.initial_checkpoint or config.first_group),
        "--view": config.view,
        "--drop-rate": config.drop_rate,
        "batch of an update": config.batch_size * config.update_freq * place.world_size,
        "updates of an epoch": num_updates,
        "--data-fraction": f"1/{config.data_divisor}",
        "--optimizer": config.optimizer,
        "--momentum": config.momentum,
        "learning rate in the epoch": [round(rate, 6) for rate in rates],
        "--weight-decay": _in_epoch(trainer.decay_at, num_updates),
        "--norm-weight-decay": config.norm_weight_decay,
        "--label-smoothing": _in_epoch(partial(smoothing_at, config, trainer.timetable), num_updates),
        "--ema-decay": config.ema_decay,
        # Named where they are used: no band has them.
        **({"--freeze-first-group": True} if config.freeze_first_group else {}),
        **({"--comm-hook": config.comm_hook} if config.comm_hook != "none" else {}),
    }


def _in_epoch(value_at: Callable[[int], float], num_updates: int) -> float | list[float]:
    """Its value at the start of every part of the first epoch and at its last update; one number where it is constant.

    Args:
        value_at: updates done so far -> value of the next one.
        num_updates: of the epoch.
    """
    values = [round(value_at(min(num_updates * part // PARTS, num_updates - 1)), 9) for part in range(PARTS + 1)]
    return values if len(set(values)) > 1 else values[0]


def judge(setup: dict[str, Any], top1: float, bands: tuple[Band, ...] = BANDS) -> tuple[Verdict, str]:
    """What the first epoch says.

    Args:
        setup: of the run.
        top1: percent, after one epoch.
        bands: that are known.

    Returns:
        the verdict, and a line for the user.
    """
    differences = {band.name: differing(setup, band.setup) for band in bands}
    for band in bands:
        if not differences[band.name]:
            is_inside = band.low <= top1 <= band.high
            place = "inside" if is_inside else "outside"
            line = f"top-1 after one epoch is {top1:.2f} %, {place} {band.low:.2f} to {band.high:.2f} ({band.source})"
            return (Verdict.INSIDE if is_inside else Verdict.OUTSIDE), f"{band.name}: {line}"
    line = f"top-1 after one epoch is {top1:.2f} %; what it should be is not known for this set-up"
    key = (setup["--model"], setup["--dataset"], setup["classes"], setup["--image-size"])
    if key in PUBLISHED:
        line += f". Published: {PUBLISHED[key]}"
    elif differences:
        nearest = min(differences, key=lambda name: len(differences[name]))
        line += f". The nearest that is known, {nearest}, differs in {'; '.join(differences[nearest][:4])}"
    return Verdict.NOT_KNOWN, line


def differing(setup: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names and both values of what differs between two set-ups."""
    return [
        f"{name} ({setup.get(name)!r}, there {other.get(name)!r})"
        for name in {**other, **setup}
        if setup.get(name) != other.get(name)
    ]
