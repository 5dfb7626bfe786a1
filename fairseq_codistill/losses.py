"""Owns the divergences between a model's predictions and a peer's: pure functions, tensors in, tensors out.

Every divergence is summed over the rows (target tokens, images) so that the caller divides by its own sample size,
and treats the peer as a constant. Nothing here knows of models, peers that are late, weights or schedules.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_squared_divergence(predictions: Tensor, peer_predictions: Tensor) -> Tensor:
    """Squared distance of the logits, averaged over classes and summed over rows.

    The peer is a constant: no gradient reaches it. The logits are compared as they are, not centred.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        peer_predictions: same shape, logits of one peer for the same rows.

    Returns:
        () float32; callers divide by their sample size.

    Raises:
        ValueError: the shapes differ.

    Source: Algorithm 1, line 4, with the divergence of appendix A.3.
    """
    _check_shapes(predictions, peer_predictions)
    difference = F.mse_loss(predictions.float(), peer_predictions.detach().float(), reduction="sum")
    return difference / max(predictions.size(-1), 1)


def kl_divergence(predictions: Tensor, peer_predictions: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(peer ‖ mine) of the softmax distributions, in nats, summed over rows.

    The peer is a constant: no gradient reaches it.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        peer_predictions: same shape, logits of one peer for the same rows.

    Returns:
        () float32; callers divide by their sample size.

    Raises:
        ValueError: the shapes differ.

    Source: Zhang et al. 2018 (deep mutual learning) and Anil et al. 2018, the divergences the paper compares with.
    """
    _check_shapes(predictions, peer_predictions)
    lprobs = F.log_softmax(predictions.float(), dim=-1)
    peer_lprobs = F.log_softmax(peer_predictions.detach().float(), dim=-1)
    return F.kl_div(lprobs, peer_lprobs, reduction="sum", log_target=True)


DIVERGENCE_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_divergence,
    "kl": kl_divergence,
}


def finite_rows(peer_predictions: Tensor) -> Tensor:
    """Which rows hold finite logits only.

    Args:
        peer_predictions: (num_rows, num_classes).

    Returns:
        (num_rows,) bool; a False row must not be distilled from.
    """
    return torch.isfinite(peer_predictions).all(dim=-1)


def num_agreeing_rows(predictions: Tensor, peer_predictions: Tensor) -> Tensor:
    """() float32, number of rows whose largest logit is the same class in both (num_rows, num_classes) inputs."""
    return (predictions.argmax(dim=-1) == peer_predictions.argmax(dim=-1)).sum().float()


def _check_shapes(predictions: Tensor, peer_predictions: Tensor) -> None:
    if predictions.dim() != 2 or predictions.shape != peer_predictions.shape:
        raise ValueError(
            f"predictions are {tuple(predictions.shape)} and the peer's are {tuple(peer_predictions.shape)}; "
            "both must be the same (num_rows, num_classes)"
        )
