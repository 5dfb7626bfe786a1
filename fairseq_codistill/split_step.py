"""Owns the order of a split step: all forwards, then each part's backward while the next one's messages are under way.

With parts A and B: forward A, post A, forward B, post B, collect A, backward A, collect B, backward B. The gradient is
that of the whole batch, and nothing is stale. It knows of no batch, no loss and no optimizer.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fairseq_codistill.config import CodistillationConfig, ConfigError

MAX_PARTS = 4
Begun = TypeVar("Begun")


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer takes its statistics from the batch, and so would take them from each part."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def is_checkpointed(model: nn.Module) -> bool:
    """Whether activations are computed anew in the backward pass, as fairseq, transformers and timm mark it."""
    return any(
        hasattr(module, "precheckpoint_forward")
        or getattr(module, "gradient_checkpointing", False) is True
        or getattr(module, "grad_checkpointing", False) is True
        for module in model.modules()
    )


def why_whole(model: nn.Module, world_size: int) -> str:
    """Why no batch of the model is cut unless one asks for it by number; empty where it may be."""
    if has_batch_norm(model):
        return "the model has batch normalisation, which would see the parts"
    if world_size > 1 and is_checkpointed(model):
        return "activations are checkpointed, and with several ranks the gradients of parts are taken apart"
    return ""


def takes_parts(model: nn.Module, config: CodistillationConfig) -> bool:
    """Whether a model may be called with parts of a batch, as it is called: with its wrapper.

    A wrapper that notes which parameters are used does so in hooks, which gradients that are taken apart never run. It
    would leave those of a layer that the last part does without as each rank has them.

    Raises:
        ConfigError: batches are to be cut by number.
    """
    name = next((name for name in ("find_unused_parameters", "static_graph") if getattr(model, name, None) is True), "")
    if name and config.is_codistilled and config.codistill_parts != "auto" and config.most_parts > 1:
        raise ConfigError(
            f"--codistill-parts is {config.codistill_parts}, and the model's DistributedDataParallel has {name}, which "
            f"misses the gradients of parts; give --codistill-parts 1 on all models, or leave {name} out"
        )
    return not name


def part_bounds(num_samples: int, num_parts: int) -> list[tuple[int, int]]:
    """(start, stop) of each part; a batch too small to split is one part.

    >>> part_bounds(5, 2), part_bounds(3, 4)
    ([(0, 3), (3, 5)], [(0, 3)])
    """
    if num_samples < num_parts:
        return [(0, num_samples)]
    small, larger = divmod(num_samples, num_parts)
    sizes = [small + 1] * larger + [small] * (num_parts - larger)
    stops = [sum(sizes[: part + 1]) for part in range(num_parts)]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def run_split_step(
    num_parts: int,
    forward: Callable[[int], Begun],
    finish: Callable[[int, Begun], Tensor],
    backward: Callable[[Tensor], None],
    model: nn.Module,
    scaled: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Run all parts of a batch; gradients add up in the parameters as they do over micro-batches.

    Under DistributedDataParallel only the last forward arms the reduction, so the gradients of the parts before it are
    taken without it and added before the last backward sends the sum.

    Args:
        num_parts: how many.
        forward: number of a part -> what :func:`finish` needs; it posts the predictions.
        finish: that -> () loss of the part, with the peers' term; it waits.
        backward: of a loss, with whatever scaling belongs to it.
        model: as it is called, with its wrapper.
        scaled: the same scaling as a function, for the parts whose gradients are taken without the reduction; default:
            by the factor that ``backward`` has, which a number that depends on no parameter is sent through to learn.
    """
    begun: list[Begun | None] = []
    reduces = bool(getattr(model, "require_backward_grad_sync", False)) and hasattr(model, "no_sync")
    for part in range(num_parts):
        is_armed = not reduces or part == num_parts - 1
        with contextlib.nullcontext() if is_armed else model.no_sync():  # type: ignore[operator]
            begun.append(forward(part))
    for part in range(num_parts):
        state = begun[part]
        assert state is not None
        loss = finish(part, state)
        if reduces and part < num_parts - 1:
            if scaled is not None:
                _add_gradients(scaled(loss), model.parameters())
            elif (scale := _scale_of(backward, loss)) is not None:
                _add_gradients(loss * scale, model.parameters())
        else:
            backward(loss)
        begun[part] = state = None  # its activations are needed no more


def _scale_of(backward: Callable[[Tensor], None], loss: Tensor) -> Tensor | None:
    """() what ``backward`` multiplies a loss by: a loss scale, one over the batches of an update.

    None where it leaves this loss out, as some do with one that is not finite: times 0 it would still be no number.

    Raises:
        ConfigError: it does not say.
    """
    probe = loss.detach().clone().requires_grad_()
    with torch.enable_grad():
        backward(probe)
    if probe.grad is not None:
        return probe.grad
    if bool(loss.isfinite()):
        raise ConfigError(
            "forward_backward's backward gave a number that it was called with no gradient (because of inputs=?), so "
            "what it multiplies a loss by is not known; give scaled=, a function that does only that, or parts=1"
        )
    return None


def _add_gradients(loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """As ``loss.backward()``, without the hooks of a data-parallel wrapper."""
    leaves = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        gradients: list[Tensor | None] = list(torch.autograd.grad(loss, leaves, allow_unused=True))
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        raise ConfigError(
            "a batch was cut in parts under DistributedDataParallel, which reentrant checkpoints of activations do not "
            f"survive ({error}); give --codistill-parts 1, or torch's checkpoint use_reentrant=False"
        ) from error
    for index, leaf in enumerate(leaves):
        gradient, gradients[index] = gradients[index], None
        if gradient is not None:
            # A copy: two parameters that are added up have one gradient, and one that is summed up an expanded number.
            leaf.grad = gradient.clone() if leaf.grad is None else leaf.grad.add_(gradient)
