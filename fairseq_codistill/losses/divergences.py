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


def sampled_columns_divergence(predictions: Tensor, peer_values: Tensor, columns: Tensor) -> Tensor:
    """Squared distance of the logits of some classes, averaged over these and summed over rows.

    Where the classes are drawn uniformly, it is an unbiased estimate of :func:`mean_squared_divergence`.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        peer_values: (num_rows, S) logits of one peer.
        columns: (S,) int64, the classes of ``peer_values``.

    Returns:
        () float32; callers divide by their sample size.
    """
    return mean_squared_divergence(predictions.index_select(1, columns), peer_values)


def sampled_tokens_divergence(predictions: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy towards classes drawn from a peer's softmax, averaged over draws and summed over rows, in nats.

    Its expectation over the draws is :func:`kl_divergence` plus the peer's entropy, which has no gradient here.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        tokens: (num_rows, K) int64 classes.

    Returns:
        () float32; callers divide by their sample size.
    """
    drawn = predictions.gather(1, tokens).float().mean(dim=1)
    return (torch.logsumexp(predictions.float(), dim=1) - drawn).sum()


def top_k_squared_divergence(predictions: Tensor, peer_values: Tensor, classes: Tensor) -> Tensor:
    """As :func:`mean_squared_divergence`, with the classes that did not travel contributing nothing.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        peer_values: (num_rows, K) logits of one peer.
        classes: (num_rows, K) int64, their classes.

    Returns:
        () float32, a lower bound of the dense divergence; callers divide by their sample size.
    """
    difference = predictions.gather(1, classes).float() - peer_values.detach().float()
    return difference.square().sum() / max(predictions.size(1), 1)


def all_others(
    logits: Tensor, classes: Tensor, peer_kept: Tensor, log_norm: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """All classes that did not travel, as one event: this model's log-probability and the peer's probability.

    Where this model masks every one of them by -inf there is no such event, and both are what rounding left the peer.

    Args:
        logits: (num_rows, num_classes) of this model, as floats.
        classes: (num_rows, K) int64 that travelled, fewer than there are.
        peer_kept: (num_rows, K) log-probabilities of the peer.
        log_norm: (num_rows, 1) logsumexp of the logits, where they are not normalised.

    Returns:
        (num_rows, 1) each.
    """
    peer_others = (1 - peer_kept.exp().sum(dim=1, keepdim=True)).clamp(min=1e-7)  # what rounding may have made negative
    rest = logits.scatter(1, classes, -torch.inf)
    is_none = rest.detach().amax(dim=1, keepdim=True).isneginf()
    others = torch.logsumexp(rest.masked_fill_(is_none, 0.0), dim=1, keepdim=True) - log_norm
    return torch.where(is_none, peer_others.log(), others), peer_others


def top_k_kl_divergence(predictions: Tensor, peer_values: Tensor, classes: Tensor, peer_log_norm: Tensor) -> Tensor:
    """KL(peer ‖ mine) over K + 1 events: the classes that travelled and all others together; in nats, over rows.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        peer_values: (num_rows, K) logits of one peer.
        classes: (num_rows, K) int64, their classes.
        peer_log_norm: (num_rows,) logsumexp of all the peer's logits.

    Returns:
        () float32, a lower bound of the dense divergence; callers divide by their sample size.
    """
    logits = predictions.float()
    log_norm = torch.logsumexp(logits, dim=1, keepdim=True)
    lprobs = logits.gather(1, classes) - log_norm
    peer_lprobs = peer_values.detach().float() - peer_log_norm.float().unsqueeze(1)
    divergence = (peer_lprobs.exp() * (peer_lprobs - lprobs)).sum()
    if classes.size(1) < logits.size(1):
        others, peer_others = all_others(logits, classes, peer_lprobs, log_norm)
        divergence = divergence + (peer_others * (peer_others.log() - others)).sum()
    return divergence


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
