"""Owns the divergences between two softmax distributions beyond the plain one: either direction, their mixture, heat.

Pure functions, tensors in, tensors out, the peer a constant, summed over rows in nats. What they are called with are
events: all classes, or those that travelled and all others as one.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_codistill.choices import DIVERGENCES
from fairseq_codistill.losses.divergences import all_others


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Which divergence, and what belongs to it.

    Attributes:
        name: ``mse`` of the logits; ``kl`` = KL(peer ‖ mine); ``reverse_kl`` = KL(mine ‖ peer); ``js``, the generalised
            Jensen-Shannon divergence β KL(peer ‖ M) + (1 − β) KL(mine ‖ M) with M = β peer + (1 − β) mine.
        temperature: τ, which divides the logits of both; the divergence is multiplied by τ², so that its gradient stays
            of one size (Hinton et al. 2015).
        beta: β of ``js``, between 0 and 1. Divided by β it becomes ``kl`` as β goes to 0, by 1 − β ``reverse_kl`` as β
            goes to 1 (Agarwal et al. 2024, GKD).

    Raises:
        ValueError: there is no such divergence.
    """

    name: str
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ValueError(f"no divergence {self.name!r}; there are {', '.join(DIVERGENCES)}")

    @property
    def is_plain(self) -> bool:
        """Whether it is one that ``sweep`` computes by itself."""
        return self.name == "mse" or (self.name == "kl" and self.temperature == 1)


def dense_divergence(predictions: Tensor, peer_predictions: Tensor, divergence: Divergence) -> Tensor:
    """Between the softmax distributions of whole logits.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        peer_predictions: same shape, logits of one peer for the same rows.
        divergence: not ``mse``.

    Returns:
        () float32 (float64 where the logits are).
    """
    heat = divergence.temperature
    return heat**2 * between_events(
        F.log_softmax(_float(predictions) / heat, dim=1),
        F.log_softmax(_float(peer_predictions.detach()) / heat, dim=1),
        divergence,
    )


def top_k_divergence(
    predictions: Tensor, peer_values: Tensor, classes: Tensor, peer_log_norm: Tensor, divergence: Divergence
) -> Tensor:
    """Over K + 1 events: the classes that travelled and all others together. A lower bound of the dense divergence.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        peer_values: (num_rows, K) logits of one peer, divided by the temperature where they were sent.
        classes: (num_rows, K) int64, their classes.
        peer_log_norm: (num_rows,) logsumexp of all the peer's logits, likewise divided.
        divergence: not ``mse``.

    Returns:
        () float32 (float64 where the logits are).
    """
    heat = divergence.temperature
    lprobs = F.log_softmax(_float(predictions) / heat, dim=1)
    kept = lprobs.gather(1, classes)
    peer_kept = peer_values.detach().to(kept.dtype) - peer_log_norm.to(kept.dtype).unsqueeze(1)
    if classes.size(1) < predictions.size(1):
        others, peer_others = all_others(lprobs, classes, peer_kept)
        kept, peer_kept = torch.cat([kept, others], dim=1), torch.cat([peer_kept, peer_others.log()], dim=1)
    return heat**2 * between_events(kept, peer_kept, divergence)


def drawn_divergence(predictions: Tensor, tokens: Tensor, divergence: Divergence) -> Tensor:
    """Cross entropy at a temperature towards classes drawn from the peer's softmax at that temperature.

    Its expectation over the draws is τ² · (KL(peer ‖ mine) + the peer's entropy), the latter without gradient.

    Args:
        predictions: (num_rows, num_classes) logits of this model, any float dtype.
        tokens: (num_rows, K) int64 classes.
        divergence: ``kl``, the only one for which drawn classes give an unbiased estimate.

    Returns:
        () float32 (float64 where the logits are).
    """
    heat = divergence.temperature
    lprobs = F.log_softmax(_float(predictions) / heat, dim=1)
    return -(heat**2) * lprobs.gather(1, tokens).mean(dim=1).sum()


def between_events(lprobs: Tensor, peer_lprobs: Tensor, divergence: Divergence) -> Tensor:
    """Between two distributions over the same events.

    Args:
        lprobs: (num_rows, num_events) log-probabilities of this model.
        peer_lprobs: same shape, of the peer.
        divergence: ``kl``, ``reverse_kl`` or ``js``.

    Returns:
        () summed over rows, in nats, at temperature 1.
    """
    if divergence.name == "kl":
        return F.kl_div(lprobs, peer_lprobs, reduction="sum", log_target=True)
    if divergence.name == "reverse_kl":
        return F.kl_div(peer_lprobs, lprobs, reduction="sum", log_target=True)
    if divergence.name != "js":
        raise ValueError(f"the divergence {divergence.name!r} is none of distributions")
    beta = divergence.beta
    mixed = torch.logaddexp(peer_lprobs + math.log(beta), lprobs + math.log1p(-beta))
    from_peer = F.kl_div(mixed, peer_lprobs, reduction="sum", log_target=True)
    return beta * from_peer + (1 - beta) * F.kl_div(mixed, lprobs, reduction="sum", log_target=True)


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
