"""Owns the forms in which a batch goes through the exchange: as it is named, as it is under way, as it comes out."""

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from fairseq_codistill import figures
from fairseq_codistill.coordinator.keys import SampleMarks
from fairseq_codistill.coordinator.predictions import PeerPredictions


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch, as the models name it to each other.

    Attributes:
        key: data position, (epoch, position, micro-batch).
        elapsed: updates' worth of batches before it, since the start of training.
        fingerprint: 16 bytes, see :func:`~fairseq_codistill.coordinator.keys.fingerprint`.
        epoch: that α grows with; 0: that of the key.
        parts: how many such batches make up the one that the loop has: those of a split step are cut from it.
        part: which of them it is; the key is that of the batch that the loop has.
        samples: what each of its samples is called, where the predictions of teachers are kept.
        is_shared: whether it is of a transfer set. Where there is one, nothing else is exchanged.
    """

    key: tuple[int, int, int]
    elapsed: int
    fingerprint: bytes
    epoch: int = 0
    parts: int = 1
    part: int = 0
    samples: SampleMarks | None = None
    is_shared: bool = False


@dataclasses.dataclass(frozen=True)
class Distilled:
    """What a batch at which peers answered comes to, summed over its rows, in nats.

    Attributes:
        total: () supervised loss + α · mean over the peers of D + Σ over the teachers of weight · D, or without the
            first where no target was given; the only one with a gradient.
        nll: () cross entropy without smoothing, 0 without a target.
    """

    total: Tensor
    nll: Tensor


@dataclasses.dataclass(frozen=True)
class Pending:
    """A batch whose predictions were sent, while those of the peers are still to be waited for.

    Attributes:
        batch: which one.
        sums: of this batch, see :attr:`Exchanger.sums`.
        forward: with checkpoints: a copy of a peer -> its (num_positions, num_classes) logits.
        is_exchanged: whether peers are asked, and not only teachers.
        taught: what the teachers predict, by the weight of the mean over those of a group.
    """

    batch: Batch
    sums: figures.Sums
    forward: Callable[[nn.Module], Tensor] | None
    is_exchanged: bool = True
    taught: list[tuple[float, list[PeerPredictions]]] = dataclasses.field(default_factory=list)
