"""Owns what weights say of where they come from: architecture, data set, and how the pixels were normalised there.

A teacher that knows pixels by another mean and std gets them so. The model that is trained never does: whatever takes
its checkpoint would have to know.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoints import DATASET_KEY, WEIGHTS
from .config import VisionConfig
from .datasets import STATISTICS, Images

logger = logging.getLogger("vision.origin")


class Pixels(NamedTuple):
    """How images are normalised: (value - mean) / std.

    Attributes:
        mean: of the red, green and blue channel, where white is 1.
        std: likewise.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def is_same(self, other: "Pixels") -> bool:
        """Whether they are alike but for rounding."""
        pairs = zip([*self.mean, *self.std], [*other.mean, *other.std], strict=True)
        return all(math.isclose(one, two, abs_tol=1e-4) for one, two in pairs)

    def __str__(self) -> str:
        mean, std = ("/".join(f"{value:.3f}" for value in values) for values in self)
        return f"mean {mean} and std {std}"


def origin_of(file: str) -> dict[str, Any]:
    """What a file says of its weights, by the names of our options; nothing where it holds weights alone."""
    try:
        if Path(file).suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                said = opened.metadata()
            if not said and Path(file).name == WEIGHTS:  # as earlier versions of this program wrote them
                return {"dataset": "unknown"}
            return {"dataset": said[DATASET_KEY]} if said and DATASET_KEY in said else {}
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - whoever reads the weights tells what is wrong
        return {}
    options = stored.get("options") if isinstance(stored, dict) else None
    if isinstance(options, dict):
        known = ("model", "model_kwargs", "view", "num_views", "codistill_model_index", "dataset")
        return {name: options[name] for name in known if name in options}
    return {"model": stored["arch"], "model_kwargs": []} if isinstance(stored, dict) and "arch" in stored else {}


def pixels_of(model: nn.Module, dataset: str = "") -> Pixels | None:
    """What weights were trained on.

    Args:
        model: that holds them, as timm made it where it did.
        dataset: the ``--dataset`` of this program that they were trained with; empty where they are of timm.

    Returns:
        None where nothing says it.
    """
    if kind := dataset.partition(":")[0]:
        return Pixels(*STATISTICS[kind]) if kind in STATISTICS else None
    made = getattr(model, "pretrained_cfg", None) or {}
    return Pixels(made["mean"], made["std"]) if made.get("mean") and made.get("std") else None


class Rescaled(nn.Module):
    """A model for pixels that are normalised by another mean and std than it knows.

    Args:
        module: (batch, 3, size, size) float32 -> anything.
        given: how images come.
        known: how the model knows them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, given: Pixels, known: Pixels):
        super().__init__()
        mean, std, known_mean, known_std = (
            torch.tensor(tuple(values), dtype=torch.float64) for values in (*given, *known)
        )
        self.module = module
        self.register_buffer("scale", (std / known_std).float().view(1, 3, 1, 1))
        self.register_buffer("shift", ((mean - known_mean) / known_std).float().view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Any:
        """What the model says of (batch, 3, size, size) images."""
        return self.module(images * self.scale + self.shift)


def for_pixels(model: nn.Module, images: Images, known: Pixels | None, name: str) -> nn.Module:
    """A model that takes images as those of a data set come: itself, or what rescales them for it.

    Args:
        model: any.
        images: the data set.
        known: how the model knows them; None where nothing says it.
        name: of the model in the log.
    """
    given = Pixels(images.mean, images.std)
    if known is None or known.is_same(given):
        return model
    logger.info("%s knows pixels normalised by %s, and gets those of %s so", name, known, given)
    return Rescaled(model, given, known)


def tell_other_pixels(config: VisionConfig, model: nn.Module, images: Images) -> None:
    """Warn where the weights that training starts from were trained on pixels of another mean and std.

    Args:
        config: validated options.
        model: as made.
        images: the data set, by whose mean and std they are normalised.
    """
    if not (config.pretrained or config.initial_checkpoint):
        return
    dataset = origin_of(config.initial_checkpoint).get("dataset", "") if config.initial_checkpoint else ""
    known, given = pixels_of(model, dataset), Pixels(images.mean, images.std)
    if known is not None and not known.is_same(given):
        flag = f"--initial-checkpoint is {config.initial_checkpoint!r}" if config.initial_checkpoint else "--pretrained"
        logger.warning(
            "%s: these weights of %s were trained on pixels normalised by %s; here they are normalised by %s, those of "
            "--dataset, which training has to make up for. Weights with the latter do not need it: "
            "timm.get_pretrained_cfg(NAME) says what they have",
            flag,
            config.model,
            known,
            given,
        )
