"""Owns the loss of one batch with its gradient, computed together and a few rows at a time by ``sweep``.

Supervised loss and divergences need the softmax of the same logits, and as separate steps of autograd each keeps
tensors of the size of the logits. Together, the gradient is the only one. ``divergences`` has the same as plain
functions of whole tensors; the tests hold the two against each other.

Why no library: at the time of writing those that fuse a softmax with distillation (Liger Kernel and its kin) are Triton
kernels, which do not run on a CPU, start from hidden states and take a single teacher; torchtune's chunked KL takes a
single teacher as well and leaves every chunk's tensors to autograd; ``torch.compile`` needs a compiler where it trains.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_codistill.coordinator.predictions import Columns, PeerPredictions, Steps, Tokens
from fairseq_codistill.losses.generalised import Divergence
from fairseq_codistill.losses.sweep import Sweep, may_ask


@dataclasses.dataclass
class ChunkedLoss:
    """What :func:`chunked_loss` found; sums over the rows, in nats where they are entropies.

    Attributes:
        total: () supervised loss + weight · mean over the peers of D; the only one with a gradient.
        supervised: () label-smoothed cross entropy; 0 without a target.
        nll: () cross entropy without smoothing; 0 without a target.
        divergences: (num_peers,) D of each peer.
        num_agreeing: () rows whose largest logit is the same class here and there, over all peers.
        num_compared: rows for which that could be told, over all peers; on an accelerator a () tensor, as the next.
        num_nonfinite: rows of peers that were left out because they were not finite.
    """

    total: Tensor
    supervised: Tensor
    nll: Tensor
    divergences: Tensor
    num_agreeing: Tensor
    num_compared: int | Tensor
    num_nonfinite: int | Tensor


def chunked_loss(
    logits: Tensor,
    peers: Sequence[PeerPredictions],
    divergence: str | Divergence,
    weight: float = 1.0,
    rows: Tensor | None = None,
    target: Tensor | None = None,
    epsilon: float = 0.0,
    peer_weights: Sequence[float] | None = None,
) -> ChunkedLoss:
    """Label-smoothed cross entropy + weight · mean over the peers of D, and its gradient, chunk by chunk.

    The peers are constants and may lie on another device: a chunk of theirs is moved at a time. Half-precision logits
    are computed with in float32, and so is their gradient, until the factor of the backward pass is in it: a loss scale
    therefore works as ever. The gradient exists from the forward pass on, and cannot be
    differentiated again (``create_graph=True`` is a RuntimeError in the backward pass).

    Args:
        logits: (num_positions, num_classes), any float dtype, with gradient.
        peers: what each peer sent for the rows.
        divergence: which one; a name alone is at temperature 1.
        weight: α.
        rows: (num_rows,) int64, the positions that count, such as those that are not padding; None for all of them.
        target: (num_rows,) int64 classes; None for no supervised loss.
        epsilon: label smoothing, spread as fairseq's ``label_smoothed_nll_loss`` does.
        peer_weights: of each peer in the mean, 1 where nothing is said; the mean is still over their number.

    Returns:
        the sums, float32 (float64 where the logits are).

    Raises:
        ValueError: what a peer sent has another shape, or does not determine that divergence.
    """
    form = Divergence(divergence) if isinstance(divergence, str) else divergence
    num_rows = logits.size(0) if rows is None else rows.size(0)
    for peer in peers:
        check_determines(peer, form.name)
        if isinstance(peer, (Tensor, Steps)) and peer.shape != (num_rows, logits.size(1)):
            raise ValueError(f"{num_rows} rows of {logits.size(1)} logits, but the peer's are {tuple(peer.shape)}")
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        sweep = Sweep(logits.detach(), peers, form, weight, target, epsilon, num_rows, peer_weights)
        gradient = sweep.run(rows)
        supervised = sweep.confidence * sweep.nll + sweep.smoothing * sweep.smooth
        mean = weighted_mean(sweep.divergences, peer_weights)
        total = supervised + weight * mean if peers else supervised
    return ChunkedLoss(
        total=_WithGradient.apply(logits, total, gradient),  # type: ignore[no-untyped-call]
        supervised=supervised,
        nll=sweep.nll,
        divergences=sweep.divergences,
        num_agreeing=sweep.num_agreeing,
        num_compared=sweep.num_compared,
        num_nonfinite=sweep.num_nonfinite,
    )


def weighted_mean(divergences: Tensor, peer_weights: Sequence[float] | None) -> Tensor:
    """() mean of the (num_peers,) divergences, each times its peer's weight."""
    if peer_weights is None:
        return divergences.mean()
    pairs = zip(peer_weights, divergences.unbind(), strict=True)  # one that counts nothing may have overflown
    return torch.stack([share * each if share else torch.zeros_like(each) for share, each in pairs]).mean()


def check_determines(peer: PeerPredictions, divergence: str) -> None:
    """Raises:
    ValueError: what travelled does not determine that divergence.
    """
    if (isinstance(peer, Columns) and divergence != "mse") or (isinstance(peer, Tokens) and divergence != "kl"):
        raise ValueError(f"{type(peer).__name__} does not determine the divergence {divergence!r}")


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # torch's once_differentiable is silent where the factor is a plain 1
            raise RuntimeError("the distilled loss has no second derivative: its gradient was computed with its value")
        (gradient,) = ctx.saved_tensors
        if gradient.dtype == ctx.dtype and may_ask(factor) and factor.item() == 1.0:
            return gradient, None, None
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=ctx.dtype)), None, None
