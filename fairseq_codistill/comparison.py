"""Owns what is said of how far peers are from this model: the sums of a batch, in training and in validation.

It decides neither what is compared nor what is distilled.
"""

from collections.abc import Sequence

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
        "codistill_rows": number(num_rows - found.num_nonfinite),
        "codistill_compared": number(found.num_compared),
        "codistill_peers": float(num_peers),
    }


def number(count: int | Tensor) -> float | Tensor:
    """A float, but on an accelerator a tensor still: nobody waits for it before it is logged."""
    return count.float() if isinstance(count, Tensor) else float(count)


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
