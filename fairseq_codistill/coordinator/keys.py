"""Owns the identity of a batch: its data position, and the fingerprint of what is in it.

The position is the clock of codistillation. It must never depend on the number of updates a model made, on time, or
on anything else that differs between models.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # positions are also known to processes that load no torch
    from torch import Tensor

FINGERPRINT_BYTES = 16
ENDLESS = 2**31  # batches of an epoch that nobody counts


class BatchKey(NamedTuple):
    """A data position. Keys of one run are ordered as the batches are.

    Attributes:
        epoch: from 1.
        position: updates' worth of batches before this one in the epoch, from 0.
        micro_batch: index inside the update (fairseq's ``--update-freq``), from 0.
    """

    epoch: int
    position: int
    micro_batch: int = 0

    def __str__(self) -> str:
        return f"epoch {self.epoch} position {self.position} micro-batch {self.micro_batch}"


class DataOrder:
    """How the batches of a run are counted: the same on all models, whatever each of them skipped.

    Args:
        num_batches: batches of one rank in an epoch.
        update_freq: batches of one update, one value an epoch, the last one for all that follow.
    """

    def __init__(self, num_batches: int, update_freq: Sequence[int] = (1,)):
        self.num_batches = num_batches
        self._update_freq = list(update_freq)

    @property
    def most_batches_per_update(self) -> int:
        """Of any epoch."""
        return max(self._update_freq)

    def batches_per_update(self, epoch: int) -> int:
        """Of an epoch, counted from 1."""
        return self._update_freq[min(epoch, len(self._update_freq)) - 1]

    def updates_per_epoch(self, epoch: int) -> int:
        """The last one of an epoch may have fewer batches."""
        return -(-self.num_batches // self.batches_per_update(epoch))

    def elapsed(self, epoch: int, position: int) -> int:
        """Updates' worth of batches before a position, since the start of training, over all epochs."""
        varying = min(epoch, len(self._update_freq))
        before = sum(self.updates_per_epoch(earlier) for earlier in range(1, varying))
        return before + (epoch - varying) * self.updates_per_epoch(epoch) + position

    def key(self, elapsed: int) -> BatchKey:
        """The position before which ``elapsed`` updates' worth of batches lie: the inverse of :meth:`elapsed`."""
        epoch = 1
        while epoch < len(self._update_freq) and elapsed >= self.updates_per_epoch(epoch):
            elapsed -= self.updates_per_epoch(epoch)
            epoch += 1
        epochs, position = divmod(elapsed, max(1, self.updates_per_epoch(epoch)))
        return BatchKey(epoch + epochs, position)


def fingerprint(sample_ids: "Tensor", targets: "Tensor", pixels: "Tensor | None" = None) -> bytes:
    """Digest of a batch: equal on two models exactly when they hold the same examples with the same targets in order.

    Args:
        sample_ids: (batch,) integer ids of the examples.
        targets: (num_rows,) integer targets without padding, in batch order.
        pixels: uint8 tensor of any shape, the inputs where they are drawn at random (augmented images).

    Returns:
        16 bytes.
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for tensor in (sample_ids, targets):
        values = tensor.detach().cpu().long().contiguous()
        digest.update(values.numel().to_bytes(8, "little"))
        digest.update(values.numpy().tobytes())
    if pixels is not None:
        digest.update(repr(tuple(pixels.shape)).encode())
        digest.update(pixels.detach().cpu().byte().contiguous().numpy().data)
    return digest.digest()


def part_fingerprint(whole: bytes, start: int, stop: int) -> bytes:
    """Of some samples of a batch: equal on two models exactly when the batches are, and what is cut from them.

    Args:
        whole: :func:`fingerprint` of the batch.
        start, stop: the samples.

    Returns:
        16 bytes.
    """
    digest = hashlib.blake2b(whole, digest_size=FINGERPRINT_BYTES, person=b"part")
    digest.update(start.to_bytes(8, "little") + stop.to_bytes(8, "little"))
    return digest.digest()


class SampleMarks(NamedTuple):
    """The samples of a batch, each by itself, for what is kept of them.

    Attributes:
        marks: 16 bytes of each sample, equal exactly where the sample is.
        num_rows: rows of predictions of each sample.
        ids: of each sample, where one id is always the same sample; empty where it is drawn anew, as augmented images.
    """

    marks: tuple[bytes, ...]
    num_rows: tuple[int, ...]
    ids: tuple[int, ...] = ()


def sample_marks(
    sample_ids: "Tensor", targets: "Tensor", num_rows: Sequence[int], inputs: "Sequence[Tensor] | Tensor | None" = None
) -> SampleMarks:
    """What each sample of a batch is called.

    Args:
        sample_ids: (batch,) integer ids.
        targets: (sum of num_rows,) integer targets in batch order; empty where there are none.
        num_rows: rows of each sample.
        inputs: of each sample, integers of any shape; where they are images, ids do not name a sample.
    """
    marks, start = [], 0
    for index, count in enumerate(num_rows):
        own = targets[start : start + count] if targets.numel() else targets
        digest = hashlib.blake2b(fingerprint(sample_ids[index : index + 1], own), digest_size=FINGERPRINT_BYTES)
        if inputs is not None:
            values = inputs[index].detach().cpu().contiguous()
            digest.update(repr((tuple(values.shape), str(values.dtype))).encode())
            digest.update(values.numpy().tobytes())
        marks.append(digest.digest())
        start += count
    return SampleMarks(tuple(marks), tuple(int(count) for count in num_rows), tuple(sample_ids.tolist()))


def parameters_digest(parameters: "Iterable[Tensor]") -> str:
    """Hex digest of the values of all parameters: equal for two models that start as one."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in parameters:
        values = parameter.detach()
        if hasattr(values, "to_local"):  # sharded: rank r holds the same share of every model
            values = values.to_local()
        digest.update(values.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
