"""Owns the predictions that have come and were not collected yet, and which positions are still to be collected.

Bounded: of each peer it keeps the next ``CAPACITY`` updates' worth of positions, counted from the oldest that is to be
collected, and what else is to be collected; beyond so many bytes only the latter. It knows neither who is waited for
nor what is in a message.
"""

from collections.abc import Iterable

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.wire import Message

CAPACITY = 8  # updates' worth of positions kept of one peer; in lock-step two are enough
MAX_BYTES = 2**30  # likewise


class Shelf:
    """A box for each model, in which messages lie by position.

    Args:
        models: the peers.
        keys_per_update: positions of one update: micro-batches and their parts.
        max_bytes: of payloads kept of one peer, beyond ``at_once`` messages and those of positions to be collected.
        at_once: parts of a batch, which a peer sends before it waits.

    Attributes:
        boxes: model -> position -> message.
    """

    def __init__(self, models: Iterable[int], keys_per_update: int = 1, max_bytes: int = MAX_BYTES, at_once: int = 1):
        self._capacity, self._max_bytes, self._at_once = CAPACITY * keys_per_update, max_bytes, at_once
        self.boxes: dict[int, dict[BatchKey, Message]] = {model: {} for model in models}
        self._open: set[BatchKey] = set()  # posted here, and not collected yet
        self._newest: BatchKey | None = None  # position this rank has come to

    @property
    def current(self) -> BatchKey | None:
        """The oldest position that messages are still worth having for; None before the first."""
        return min(self._open, default=self._newest)

    def reach(self, key: BatchKey) -> None:
        """This rank has come to ``key``."""
        self._newest = key if self._newest is None else max(self._newest, key)

    def open(self, key: BatchKey) -> None:
        """``key`` is to be collected: until then what comes for it and for later positions is kept."""
        self.reach(key)
        self._open.add(key)

    def begin(self, key: BatchKey) -> int:
        """``key`` is collected now; what is still open of earlier updates was given up.

        Returns:
            messages thrown away, since their time has passed.
        """
        self.open(key)
        self._open = {other for other in self._open if other[:2] >= key[:2]}
        oldest, num_stale = self.current, 0
        for box in self.boxes.values():
            for old in [other for other in box if oldest is not None and other < oldest]:
                del box[old]
                num_stale += 1
        return num_stale

    def take(self, key: BatchKey, models: Iterable[int]) -> dict[int, Message]:
        """Model -> message for ``key``, of those that have come; it is no longer to be collected."""
        self._open.discard(key)
        return {model: self.boxes[model].pop(key) for model in models if key in self.boxes[model]}

    def put(self, message: Message) -> int:
        """Keep a message of one of the models; returns how many were thrown away, this one or a later one."""
        current = self.current
        if current is not None and message.key < current:
            return 1
        box = self.boxes[message.model]
        box[message.key] = message
        num_dropped = 0
        if len(box) > self._capacity + max(0, len(self._open) - 1):
            # Whoever catches up with a peer that is ahead needs the oldest first, and what is asked for now anyway.
            del box[max((key for key in box if key not in self._open), default=max(box))]
            num_dropped = 1
        while self._is_overfull(box):
            last = max(box)
            if last in self._open:
                break
            del box[last]
            num_dropped += 1
        return num_dropped

    def _is_overfull(self, box: dict[BatchKey, Message]) -> bool:
        num_ahead = sum(key not in self._open for key in box)
        return num_ahead > self._at_once and sum(len(kept.payload) for kept in box.values()) > self._max_bytes
