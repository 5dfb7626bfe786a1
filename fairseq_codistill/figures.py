"""Owns the figures of codistillation: summed over batches and ranks where they arise, turned into means for a log.

One set of names for every training loop. Nothing here decides anything.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
Sums = dict[str, Any]
# Tensors stay tensors and floats floats at every step: fairseq reduces the two kinds in separate collectives, which the
# ranks must enter alike.
TEACHER_SUM = "codistill_teacher_loss"  # where there are teachers, and so on all ranks or none
TENSOR_SUMS = tuple(f"codistill_{name}" for name in "loss divergence agreeing rows compared nonfinite".split())
FLOAT_SUMS = tuple(
    f"codistill_{name}"
    for name in ("weight peers exchanges skipped wait_ms staleness mbit behind lagging batches updates").split()
)


class Mean(NamedTuple):
    """A figure as it is logged: its value, what a mean over several logs weighs it with, and its decimals."""

    value: float
    weight: float
    digits: int


def no_sums(
    like: Tensor, weight: float = 0.0, batches_per_update: int = 1, parts: int = 1, has_teachers: bool = False
) -> Sums:
    """The sums of a batch at which nothing was exchanged.

    Args:
        like: a tensor of the device to sum on.
        weight: α in force.
        batches_per_update: micro-batches that make up an update.
        parts: of a split step that make up a micro-batch.
        has_teachers: whether there are any, which adds a figure.
    """
    zero = like.detach().new_zeros((), dtype=torch.float32)
    batches = 1.0 / parts
    counted = {"codistill_weight": weight, "codistill_batches": batches}
    counted["codistill_updates"] = batches / batches_per_update
    taught = {TEACHER_SUM: zero} if has_teachers else {}
    return {**dict.fromkeys(TENSOR_SUMS, zero), **dict.fromkeys(FLOAT_SUMS, 0.0), **counted, **taught}


# Of a validation batch: how far the peers are from this model, and whether any was there. Nothing is distilled.
COMPARED = ("codistill_mse", "codistill_agreement", "codistill_peers")
COMPARED_BATCHES = "codistill_compared_batches"


def no_comparison(like: Tensor) -> Sums:
    """The sums of a validation batch that was compared with nobody's predictions."""
    zero = like.detach().new_zeros((), dtype=torch.float32)
    tensors = dict.fromkeys((f"codistill_{name}" for name in ("divergence", "agreeing", "rows", "compared")), zero)
    return {**tensors, "codistill_peers": 0.0, "codistill_exchanges": 1.0, COMPARED_BATCHES: 1.0}


def compared_means(sums: Callable[[str], float]) -> dict[str, Mean]:
    """What to log of validation batches; nothing of what could not be told."""
    found = means(sums, 1.0)
    return {name: found[name] for name in COMPARED if found[name].weight > 0}


def with_shared(own: Sums, shared: Sums, scale: float) -> Sums:
    """The sums of a batch that is trained on, and of one of the transfer set beside it.

    Args:
        scale: what the loss of the latter is multiplied by.
    """
    counted_once = ("codistill_batches", "codistill_updates", "codistill_behind", "codistill_lagging")
    found = dict(own)
    for name, value in shared.items():
        if name not in counted_once:
            found[name] = own[name] + (value * scale if name == "codistill_loss" else value)
    return found


@functools.cache
def _warn_of_nothing_learned(whom: str) -> None:
    """Once: it is said where figures are read, for at a step nobody waits for an accelerator to count."""
    logger.warning(
        "codistillation: nothing was learned from the %s, all of whose predictions were left out because they or "
        "this model's are not finite. Where a class is masked by -inf in the logits, give it a large negative value, "
        "such as -1e4 (not with int8, whose steps would be that coarse), or use --codistill-codec tokens:K, counts:K "
        "or, with a K of no more than the classes that are not masked, topk:K",
        whom,
    )


def means(
    sums: Callable[[str], float] | Mapping[str, float], num_rows: float, unit: float = 1.0, has_teachers: bool = False
) -> dict[str, Mean]:
    """What to log of sums over micro-batches, updates and ranks.

    Args:
        sums: of every name above; or a function that gives it.
        num_rows: what the loss is divided by: target tokens, images.
        unit: nats in one unit of the loss, ln 2 where it is logged in bits.
        has_teachers: whether there are any.

    Returns:
        name in the log -> mean; of ``codistill_skipped`` and ``codistill_nonfinite`` the sum.
    """
    total = sums if callable(sums) else lambda name: sums[name]
    rows, batches = total("codistill_rows"), total("codistill_batches")
    compared, exchanges, peers = total("codistill_compared"), total("codistill_exchanges"), total("codistill_peers")
    if total("codistill_nonfinite") > 0 and rows == 0 and (peers > 0 or not has_teachers):
        _warn_of_nothing_learned("peers")
    if total("codistill_nonfinite") > 0 and has_teachers and total(TEACHER_SUM) == 0:
        _warn_of_nothing_learned("teachers")
    updates = total("codistill_updates")  # a fraction where the last update of an epoch has fewer micro-batches
    taught = {TEACHER_SUM: Mean(total(TEACHER_SUM) / max(num_rows, 1) / unit, num_rows, 4)} if has_teachers else {}
    return {
        **taught,
        "codistill_loss": Mean(total("codistill_loss") / max(num_rows, 1) / unit, num_rows, 4),
        "codistill_mse": Mean(total("codistill_divergence") / max(rows, 1), rows, 4),
        "codistill_agreement": Mean(total("codistill_agreeing") / max(compared, 1), compared, 4),
        "codistill_weight": Mean(total("codistill_weight") / max(exchanges, 1), exchanges, 3),
        "codistill_peers": Mean(peers / max(exchanges, 1), exchanges, 3),
        "codistill_wait_ms": Mean(total("codistill_wait_ms") / max(updates, 1e-9), updates, 3),
        "codistill_staleness": Mean(total("codistill_staleness") / max(peers, 1), peers, 1),
        "codistill_skipped": Mean(total("codistill_skipped"), batches, 3),
        "codistill_nonfinite": Mean(total("codistill_nonfinite"), batches, 1),
        "codistill_mbit": Mean(total("codistill_mbit") / max(updates, 1e-9), updates, 3),
    }
