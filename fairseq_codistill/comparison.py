"""Owns what is said of how far peers are from this model: the sums of a batch, in training and in validation.

It decides neither what is compared nor what is distilled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_codistill import figures
from fairseq_codistill.coordinator.predictions import PeerPredictions
from fairseq_codistill.losses.chunked import ChunkedLoss, chunked_loss
from fairseq_codistill.losses.generalised import Divergence


def agreement(found: ChunkedLoss, num_peers: int, num_rows: int) -> figures.Sums:
    """What a loss tells of ``num_peers`` peers, whose predictions have ``num_rows`` rows together."""
    return {
        "codistill_divergence": found.divergences.sum(),
        "codistill_agreeing": found.num_agreeing,
        "codistill_rows": number(num_rows - found.num_nonfinite, found.divergences),
        "codistill_compared": number(found.num_compared, found.divergences),
        "codistill_peers": float(num_peers),
    }


def number(count: int | Tensor, like: Tensor) -> Tensor:
    """() float32 where ``like`` is, whether or not anybody answered: ranks reduce the figures of a step together.

    Nobody waits for it before it is logged.
    """
    if isinstance(count, Tensor):
        return count.to(like.device, torch.float32)
    return like.new_full((), float(count), dtype=torch.float32)


def compared(logits: Tensor, peers: Sequence[PeerPredictions], divergence: Divergence) -> figures.Sums:
    """The sums of a validation batch.

    Args:
        logits: (num_rows, num_classes) of this model, without gradient.
        peers: what each of them predicts for those rows.
        divergence: that is told.
    """
    sums = figures.no_comparison(logits)
    if peers:
        sums.update(agreement(chunked_loss(logits, peers, divergence), len(peers), len(peers) * logits.size(0)))
    return sums
