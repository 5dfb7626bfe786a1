"""Owns which checkpoints are under way: one to each peer at a time, and the last one of each peer that has come."""

from collections.abc import Iterable

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.wire import Message

# So many sends are passed over while a peer has not confirmed the last checkpoint; then the confirmation, or the
# checkpoint itself, counts as lost.
PATIENCE = 8


class CheckpointBox:
    """What has come and was not taken yet, and what has been sent and was not confirmed yet.

    A slow link thus costs freshness, and never more memory than a few checkpoints.
    """

    def __init__(self) -> None:
        self._came: dict[int, Message] = {}
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
        pushed_out = message.model in self._came
        self._came[message.model] = message
        return pushed_out

    def take(self, models: Iterable[int], until: BatchKey | None = None) -> dict[int, Message]:
        """Those of ``models`` that have come since the last call; with ``until`` none made after it."""
        found = {}
        for model in models:
            message = self._came.get(model)
            if message is not None and (until is None or message.key <= until):
                found[model] = self._came.pop(model)
        return found
