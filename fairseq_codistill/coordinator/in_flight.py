"""Owns the positions that were posted and not collected yet, and the exchanges kept for batches that are fed again."""

import collections
import dataclasses

from torch import Tensor

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.predictions import Exchange


@dataclasses.dataclass
class Posted:
    """A position that was posted.

    Attributes:
        batch_fingerprint: of its batch.
        shape: (num_rows, num_classes) of its predictions.
        exchange: what it brings.
        targets: (num_rows,) int64 classes of the batch, where it has any.
    """

    batch_fingerprint: bytes
    shape: tuple[int, int]
    exchange: Exchange = dataclasses.field(default_factory=lambda: Exchange(predictions={}))
    targets: Tensor | None = None


class InFlight:
    """Of one rank.

    Args:
        num_kept: how many exchanges of the update at hand to keep.
        looks_ahead: whether positions of the next update may be posted while this one is still at hand.

    Attributes:
        latest: the latest position so far, None before the first.
    """

    def __init__(self, num_kept: int, looks_ahead: bool = False):
        self.latest: BatchKey | None = None
        self._looks_ahead = looks_ahead
        self.num_kept = max(1, num_kept)
        self._pending: dict[BatchKey, Posted] = {}
        self._posted_last: BatchKey | None = None
        self._kept: collections.OrderedDict[BatchKey, Exchange] = collections.OrderedDict()

    def advance(self, key: BatchKey) -> bool:
        """This rank is at ``key``; returns whether it is there for the first time."""
        self._posted_last = key
        if self.latest is not None and key <= self.latest:
            return False
        if not self._looks_ahead:
            self._forget_before(key)
        self.latest = key
        return True

    def _forget_before(self, key: BatchKey) -> None:
        """An update that was begun is the only one that may be fed again."""
        for old in [other for other in self._kept if other[:2] < key[:2]]:
            del self._kept[old]

    def add(self, key: BatchKey, posted: Posted) -> None:
        """``key`` is to be collected."""
        self._pending[key] = posted

    def take(self, key: BatchKey | None) -> tuple[BatchKey, Posted | None]:
        """The position to collect, and what was posted for it; None if it was collected before.

        What is pending of earlier updates is given up.

        Args:
            key: position; None for the one posted last.
        """
        key = self._posted_last if key is None else key
        assert key is not None, "collect() follows post()"
        assert self.latest is not None, "collect() follows post()"
        assert key <= self.latest, f"collect() follows post(): nothing was posted for {key}"
        posted = self._pending.pop(key, None)
        if posted is not None:
            self._pending = {other: value for other, value in self._pending.items() if other[:2] >= key[:2]}
            self._forget_before(key)
            self._kept[key] = posted.exchange
            while len(self._kept) > self.num_kept:
                self._kept.popitem(last=False)
        return key, posted

    def again(self, key: BatchKey, num_peers: int) -> Exchange:
        """What ``key`` brought the first time; nothing where that is too long ago to be kept."""
        kept = self._kept.get(key)
        if kept is None:
            return Exchange(predictions={}, num_skipped=num_peers)
        return dataclasses.replace(kept, wait_s=0.0, sent_bytes=0)
