"""Owns reading the checkpoint of a teacher: the architecture that the file names, and its weights."""

import dataclasses
from typing import Any

from torch import nn

from fairseq_codistill.config import ConfigError

from .config import VisionConfig
from .datasets import Images
from .models import load_weights, make_model, refuse_size
from .origin import for_pixels, origin_of, pixels_of


def load_teacher(config: VisionConfig, file: str, images: Images, image_size: int) -> nn.Module:
    """The model of a checkpoint, on the CPU, for images as they come: normalised by the mean and std of the data set.

    Args:
        config: validated options of the model that is taught.
        file: a checkpoint of this program (its moving average, where it has one) or of timm, also as safetensors.
        images: the data set.
        image_size: side of the images after augmentation, in pixels.

    Raises:
        ConfigError: it cannot be read, is of another architecture, of other classes, or does not take such images.
    """
    named = origin_of(file)
    dataset, num_classes = named.pop("dataset", ""), images.num_classes
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
    return for_pixels(model, images, pixels_of(model, dataset), f"teacher {file}")
