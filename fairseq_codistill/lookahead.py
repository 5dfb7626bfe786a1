"""Owns the look ahead: which batch comes next, and a forward pass of it that leaves no trace in the model.

It exchanges nothing and computes no loss. For lines whose one-way delay is longer than a forward pass.
"""

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import nn

Item = TypeVar("Item")
# Where wrappers are defined that call the module they hold and do nothing else to its output.
WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "fairseq.", "fairscale.", "accelerate.", "deepspeed.", "apex.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers of libraries for data-parallel training.

    One that is not known stays: its forward pass may do more than call what it holds.

    >>> unwrapped(nn.DataParallel(nn.Linear(2, 3)))
    Linear(in_features=2, out_features=3, bias=True)
    """
    while True:
        inside = getattr(model, "_orig_mod", model)  # of torch.compile, which stays where it is around no other
        if not (isinstance(getattr(inside, "module", None), nn.Module) and _is_of_a_library(inside)):
            return model
        model = inside.module  # type: ignore[assignment]


def _is_of_a_library(wrapper: nn.Module) -> bool:
    return any(f"{kind.__module__}.".startswith(WRAPPERS) for kind in type(wrapper).__mro__)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """No gradient, and afterwards buffers (running statistics) and random numbers are as they were.

    Args:
        model: in whatever mode; it predicts as it does in training, with dropout.

    Yields:
        the model without the wrapper that would arm a reduction of gradients for what has none.
    """
    model = unwrapped(model)
    # Copies are given to the pass, not taken of what it changes: the backward pass of the batch at hand may need these.
    kept = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    buffers = [buffer for _, _, buffer in kept if buffer is not None]
    on_gpu = {buffer.device.index for buffer in (*buffers, *model.parameters()) if buffer.device.type == "cuda"}
    others = random.getstate(), np.random.get_state()  # noqa: NPY002 - layers that are dropped are drawn from it
    with torch.no_grad(), torch.random.fork_rng(sorted(index for index in on_gpu if index is not None)):
        try:
            for owner, name, buffer in kept:
                owner[name] = None if buffer is None else buffer.clone()
            yield model
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002
            for owner, name, buffer in kept:
                owner[name] = buffer


def with_next(items: Iterable[Item]) -> Iterator[tuple[Item, Item | None]]:
    """Each with the one that follows it, None after the last.

    Give it one pass at a time. A generator that goes from one pass to the next begins the next before the last batch of
    this one was trained on, and :class:`~fairseq_codistill.CoordinatedBatches` then hands out that batch once more;
    such a generator counts what it hands out and calls its ``move_to`` before each pass.

    >>> list(with_next("abc"))
    [('a', 'b'), ('b', 'c'), ('c', None)]
    """
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield item, following
        item = following
    yield item, None
