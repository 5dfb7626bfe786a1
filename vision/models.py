"""Owns the making of models and optimizers from their names. timm makes all but the wide residual networks."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from fairseq_codistill.config import ConfigError
from fairseq_codistill.whole_files import reason

from .checkpoints import AVERAGE, UNREADABLE
from .config import VisionConfig
from .wide_resnet import WideResNet, parse_name

logger = logging.getLogger("vision.models")


def make_model(config: VisionConfig, num_classes: int) -> nn.Module:
    """The model that ``--model`` names, on the CPU, initialised from torch's global generator.

    Raises:
        ConfigError: there is no such model, or a setting does not go with it.
    """
    wide = parse_name(config.model)
    if wide is None:
        _refuse_views(config)
        model = _timm_model(config, num_classes)
    else:
        model = _wide_model(config, wide, num_classes)
    if config.initial_checkpoint:
        load_weights(model, config.initial_checkpoint)
    return model


def load_weights(model: nn.Module, file: str) -> set[str]:
    """Start from weights of the same architecture, but for the classifier where that is of another size.

    Args:
        model: as made, of which the classifier stays if the stored one does not fit.
        file: of timm, as a state or a checkpoint, also as safetensors; or a checkpoint of this program, whose moving
            average is taken where it has one.

    Returns:
        names of parameters of the classifier that begin anew.

    Raises:
        ConfigError: it cannot be read, or is of another architecture.
    """
    flag = f"--initial-checkpoint is {file!r}"
    try:
        state = _stored_weights(file)
    except UNREADABLE as error:
        raise ConfigError(f"{flag}, which cannot be read: {(str(error).splitlines() or ['it is empty'])[0]}") from error
    own = model.state_dict()
    heads = _classifiers(model)
    anew = {name for name in state if name in own and state[name].shape != own[name].shape and name.startswith(heads)}
    fitting = {name: value for name, value in state.items() if name not in anew}
    uncounted = {name for name in own if name.endswith("num_batches_tracked")}  # old files have none
    missing = sorted(set(own) - set(fitting) - anew - uncounted)
    foreign = sorted(name for name, value in fitting.items() if name not in own or value.shape != own[name].shape)
    if missing or foreign:
        raise ConfigError(
            f"{flag}, which is of another model than --model: {len(missing)} parameters are not in it "
            f"({', '.join(missing[:3])}), {len(foreign)} in it do not fit ({', '.join(foreign[:3])})"
        )
    model.load_state_dict(fitting, strict=False)
    left = f"; {', '.join(sorted(anew))} of another size: begins anew" if anew else ""
    logger.info("weights from %s%s", file, left)
    return anew


def _stored_weights(file: str) -> dict[str, Tensor]:
    if Path(file).suffix == ".pt":  # this program's own may hold a moving average
        stored = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(stored, dict) and isinstance(stored.get("model"), dict):
            return stored.get(AVERAGE) or stored.get("ema") or stored["model"]
    return dict(load_state_dict(file, device="cpu", weights_only=True))


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters of the classifier."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "classifier"
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _wide_model(config: VisionConfig, wide: tuple[int, int], num_classes: int) -> nn.Module:
    if config.pretrained or config.model_kwargs:
        raise ConfigError(f"--model is {config.model!r}: --pretrained and --model-kwargs are for models of timm")
    view = None
    if config.view:
        split = config.codistill_model_index if config.view == "model" else int(config.view)
        view = (split, config.num_views)
    model = WideResNet(*wide, num_classes, config.drop_rate, view, config.freeze_first_group)
    if config.first_group:
        try:
            stored = torch.load(config.first_group, map_location="cpu", weights_only=True)["model"]
        except UNREADABLE as error:
            raise ConfigError(
                f"--first-group is {config.first_group!r}, which cannot be read ({reason(error)}); give a "
                "checkpoint of a wide residual network that codistill-vision trained"
            ) from error
        model.load_first_group(stored, config.first_group)
    return model


def refuse_size(model: nn.Module, name: str, size: int, flag: str = "--model") -> None:
    """Try one blank image on a model of timm that is made for images of one size, where they have another.

    Args:
        model: on the CPU.
        name: as timm knows it.
        size: side of the images, in pixels.
        flag: that names it.

    Raises:
        ConfigError: it does not take them.
    """
    made = getattr(model, "pretrained_cfg", None) or {}
    expected = made.get("input_size", (3, size, size))[-1]
    if not made.get("fixed_input_size") or expected == size:
        return
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        other = f", or --model-kwargs img_size={size} where the model knows it" if flag == "--model" else ""
        raise ConfigError(
            f"{flag} is {name!r}, made for images of {expected} pixels; those of {size} it does not take ({said}): "
            f"set --image-size {expected}{other}"
        ) from error
    finally:
        model.train(was_training)


def make_optimizer(config: VisionConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``--optimizer`` names; ``is_decayed`` in its groups tells where weight decay goes.

    Raises:
        ConfigError: timm has no such optimizer, or it takes second derivatives.
    """
    largest = max(config.weight_decay)
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=largest,
            momentum=config.momentum,
            filter_bias_and_bn=not config.norm_weight_decay,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"--optimizer is {config.optimizer!r}: {error}") from error
    if getattr(optimizer, "is_second_order", False):  # as timm marks those whose gradients need a graph of their own
        raise ConfigError(
            f"--optimizer is {config.optimizer!r}, which takes second derivatives; no update here computes them: give "
            "one of first order, such as adamw"
        )
    for group in optimizer.param_groups:
        group["is_decayed"] = group["weight_decay"] > 0
    return optimizer


class Distance:
    """How far the trained parameters have gone from where they started (figure 7 of the paper).

    Args:
        model: at its start. A copy of its parameters is kept on their device.
    """

    def __init__(self, model: nn.Module):
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._start = [parameter.detach().clone() for parameter in self._parameters]

    def __call__(self) -> float:
        """Euclidean norm of the difference, over all trained parameters together."""
        pairs = zip(self._parameters, self._start, strict=True)
        squares: list[Tensor] = [(now.detach() - start).float().square().sum() for now, start in pairs]
        return float(torch.stack(squares).sum().sqrt())


def _timm_model(config: VisionConfig, num_classes: int) -> nn.Module:
    keywords: dict[str, Any] = {}
    for pair in config.model_kwargs:
        name, _, value = pair.partition("=")
        try:
            keywords[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--model-kwargs has {pair!r}, whose value is no YAML; give name=value") from error
    if not timm.is_model(config.model):
        similar = timm.list_models(f"*{config.model[:6]}*")[:5]
        hint = f"; similar ones are {', '.join(similar)}" if similar else ""
        raise ConfigError(f"--model is {config.model!r}, which timm does not know (nor is it wrnDEPTH_WIDTH){hint}")
    try:
        return timm.create_model(
            config.model,
            pretrained=config.pretrained,
            num_classes=num_classes,
            drop_rate=config.drop_rate,
            **keywords,
        )
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        pretrained = ", --pretrained" if config.pretrained else ""
        given = f"--model is {config.model!r}, --model-kwargs {config.model_kwargs}{pretrained}"
        raise ConfigError(f"{given}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _refuse_views(config: VisionConfig) -> None:
    for flag, value in (
        ("--view", config.view),
        ("--first-group", config.first_group),
        ("--freeze-first-group", config.freeze_first_group),
    ):
        if value:
            raise ConfigError(f"{flag} is {value!r} with --model {config.model}; it is for wide residual networks only")
