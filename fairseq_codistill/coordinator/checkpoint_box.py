"""Owns which checkpoints are under way: one to each peer at a time, and the last ones of each peer that have come."""

from collections.abc import Iterable

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.wire import Message

# So many sends are passed over while a peer has not confirmed the last checkpoint; then the confirmation, or the
# checkpoint itself, counts as lost.
PATIENCE = 8

# Checkpoints of one peer that are kept until they are taken: models that wait for each other are one exchange apart at
# most, so this is the one that is due and the next.
NUM_KEPT = 2


class CheckpointBox:
    """What has come and was not taken yet, and what has been sent and was not confirmed yet.

    A slow link thus costs freshness, and never more memory than a few checkpoints.
    """

    def __init__(self) -> None:
        self._came: dict[int, list[Message]] = {}  # oldest first
        self._passed_over: dict[int, int] = {}  # peers that have not confirmed -> sends passed over since

    def may_send(self, model: int) -> bool:
        """Whether a new checkpoint may be sent to ``model``; a refusal is counted."""
        if model not in self._passed_over:
            return True
        self._passed_over[model] += 1
        return self._passed_over[model] > PATIENCE

    def on_sent(self, model: int) -> None:
        self._passed_over[model] = 0

    def on_confirmed(self, model: int) -> None:
        """Also when the peer is a new process, which has nothing to confirm."""
        self._passed_over.pop(model, None)

    def put(self, message: Message) -> bool:
        """Keep a checkpoint that came; returns whether it pushed out an older one."""
        kept = self._came.setdefault(message.model, [])
        kept.append(message)
        pushed_out = len(kept) > NUM_KEPT
        del kept[:-NUM_KEPT]
        return pushed_out

    def take(self, models: Iterable[int], until: BatchKey | None = None) -> dict[int, Message]:
        """The newest of each of ``models`` that has come since the last call; with ``until`` none made after it."""
        found = {}
        for model in models:
            kept = self._came.get(model, [])
            ready = [place for place, message in enumerate(kept) if until is None or message.key <= until]
            if ready:
                found[model] = kept[ready[-1]]
                self._came[model] = kept[ready[-1] + 1 :]
        return found
