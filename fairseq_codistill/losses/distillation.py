"""Owns the distillation term of one batch: which divergence fits what a peer sent, and the figures to log.

Framework-neutral: the fairseq criterion and ``vision`` call it with their predictions and what the coordinator
collected.
"""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from fairseq_codistill.coordinator.predictions import Columns, PeerPredictions, Tokens, TopK
from fairseq_codistill.losses import divergences
from fairseq_codistill.losses.chunked import ChunkedLoss, chunked_loss


@dataclasses.dataclass
class Distillation:
    """What the peers' predictions for one batch come to.

    Attributes:
        loss: () float32, mean over the peers of the divergence, summed over rows; None if no peer answered.
        divergence: () float32, sum over the peers, detached.
        num_agreeing: () float32, rows whose largest logit is the same class here and there, over all peers.
        num_rows: rows that were distilled from, over all peers.
        num_compared: rows for which agreement could be told (not for sampled codecs), over all peers.
        num_nonfinite: rows of peers that were left out because they were not finite.
        num_peers: peers that answered.
    """

    loss: Tensor | None
    divergence: Tensor
    num_agreeing: Tensor
    num_rows: int = 0
    num_compared: int = 0
    num_nonfinite: int = 0
    num_peers: int = 0

    @classmethod
    def of(cls, found: ChunkedLoss, loss: Tensor, num_rows: int) -> "Distillation":
        """What was found in ``num_rows`` rows of each peer, and the mean divergence."""
        num_peers = found.divergences.numel()
        return cls(
            loss=loss,
            divergence=found.divergences.sum(),
            num_agreeing=found.num_agreeing,
            num_rows=num_peers * num_rows - found.num_nonfinite,
            num_compared=found.num_compared,
            num_nonfinite=found.num_nonfinite,
            num_peers=num_peers,
        )


def distil(predictions: Tensor, peers: Iterable[PeerPredictions], divergence: str) -> Distillation:
    """Mean divergence from the peers, which are constants: no gradient reaches them.

    Args:
        predictions: (num_rows, num_classes) logits of this model, with gradient.
        peers: what each peer sent for the same rows.
        divergence: ``mse`` or ``kl``.

    Raises:
        ValueError: what a peer sent has another shape, or does not determine that divergence.
    """
    sent = list(peers)
    if not sent:
        zero = predictions.new_zeros((), dtype=torch.float32)
        return Distillation(loss=None, divergence=zero, num_agreeing=zero)
    found = chunked_loss(predictions, sent, divergence)
    return Distillation.of(found, found.total, predictions.size(0))


def peer_divergence(predictions: Tensor, peer: PeerPredictions, divergence: str) -> Tensor:
    """The divergence from one peer as a plain function of whole tensors, in the form that fits what travelled.

    Args:
        predictions: (num_rows, num_classes) logits of this model.
        peer: what the peer sent for the same rows, on the same device.
        divergence: ``mse`` or ``kl``.

    Returns:
        () float32, summed over rows.

    Raises:
        ValueError: what travelled does not determine that divergence.
    """
    if isinstance(peer, Tensor):
        return divergences.DIVERGENCE_FUNCTIONS[divergence](predictions, peer)
    if isinstance(peer, Columns) and divergence == "mse":
        return divergences.sampled_columns_divergence(predictions, peer.values, peer.classes)
    if isinstance(peer, Tokens) and divergence == "kl":
        return divergences.sampled_tokens_divergence(predictions, peer.classes)
    if isinstance(peer, TopK) and divergence == "mse":
        return divergences.top_k_squared_divergence(predictions, peer.values, peer.classes)
    if isinstance(peer, TopK) and divergence == "kl":
        return divergences.top_k_kl_divergence(predictions, peer.values, peer.classes, peer.log_norm)
    raise ValueError(f"{type(peer).__name__} does not determine the divergence {divergence!r}")
