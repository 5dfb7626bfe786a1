"""Owns reading the checkpoint of a teacher: the architecture that the file names, and its weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairseq_codistill.config import ConfigError

from .config import VisionConfig
from .models import load_weights, make_model, refuse_size


def load_teacher(config: VisionConfig, file: str, num_classes: int, image_size: int) -> nn.Module:
    """The model of a checkpoint, on the CPU.

    Args:
        config: validated options of the model that is taught.
        file: a checkpoint of this program (its moving average, where it has one) or of timm, also as safetensors.
        num_classes: of the data.
        image_size: side of its images, in pixels.

    Raises:
        ConfigError: it cannot be read, is of another architecture, of other classes, or does not take such images.
    """
    named = _architecture(file)
    own = {
        "model": config.teacher_model or config.model,
        "model_kwargs": [] if config.teacher_model else config.model_kwargs,
    }
    if named and config.teacher_model and named.get("model") != config.teacher_model:
        raise ConfigError(
            f"--teacher-model is {config.teacher_model!r}, but {file} is of {named['model']}; leave the option out"
        )
    plain = VisionConfig(no_save=True)
    settings: dict[str, Any] = {name: getattr(plain, name) for name in ("view", "num_views", "first_group")}
    bare = dataclasses.replace(plain, **{**settings, **own, **named})
    try:
        model = make_model(bare, num_classes)
        anew = load_weights(model, file)
    except ConfigError as error:
        text = str(error).replace("--initial-checkpoint", "--codistill-teacher")
        raise ConfigError(text.replace("than --model", "than --teacher-model")) from error
    if anew:
        raise ConfigError(
            f"--codistill-teacher is {file!r}, whose {', '.join(sorted(anew))} are of another size: it must know the "
            f"{num_classes} classes of --dataset"
        )
    refuse_size(model, bare.model, image_size, "--teacher-model" if config.teacher_model else "--codistill-teacher")
    return model


def _architecture(file: str) -> dict[str, Any]:
    """What a file says of its architecture; nothing where it holds weights alone."""
    if Path(file).suffix == ".safetensors":
        return {}
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - whoever reads the weights tells what is wrong
        return {}
    options = stored.get("options") if isinstance(stored, dict) else None
    if isinstance(options, dict):
        known = ("model", "model_kwargs", "view", "num_views", "codistill_model_index")
        return {name: options[name] for name in known if name in options}
    return {"model": stored["arch"], "model_kwargs": []} if isinstance(stored, dict) and "arch" in stored else {}
