"""Owns the loss of a batch that nobody teaches, in the memory of one that somebody does."""

from torch import Tensor

from fairseq_codistill.lesson import Distilled
from fairseq_codistill.losses.chunked import chunked_loss


def supervised(logits: Tensor, rows: Tensor | None, target: Tensor, smoothing: float = 0.0) -> Distilled:
    """What :meth:`~fairseq_codistill.exchanger.Exchanger.finish` gives, without peers and teachers.

    Args:
        logits: (num_positions, num_classes) with gradient.
        rows: (num_rows,) int64, the positions that count; None for all.
        target: (num_rows,) int64 classes.
        smoothing: label smoothing, spread over the other classes as fairseq does.
    """
    found = chunked_loss(logits, (), "mse", 0.0, rows, target, smoothing)
    return Distilled(found.total, found.nll)
