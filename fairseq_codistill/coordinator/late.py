"""Owns the form of a payload whose bytes are still on their way off an accelerator. It imports no torch."""

from typing import Protocol


class Event(Protocol):
    """What torch's events are, as far as is needed here."""

    def synchronize(self) -> None:
        """Wait until it has happened."""

    def query(self) -> bool:
        """Whether it has happened."""
        ...


class LatePayload:
    """Bytes that are there once an event has happened. A transport that can asks in a thread of its own.

    Args:
        view: where they will be.
        event: that they are.
    """

    def __init__(self, view: memoryview, event: Event):
        self._view, self._event = view, event

    def __len__(self) -> int:
        return len(self._view)

    def __bytes__(self) -> bytes:
        return bytes(self.wait())

    @property
    def is_there(self) -> bool:
        """Whether waiting would take no time."""
        return self._event.query()

    def wait(self) -> memoryview:
        """The bytes."""
        self._event.synchronize()
        return self._view


Payload = bytes | memoryview | LatePayload


def bytes_of(payload: Payload) -> bytes | memoryview:
    """A payload that is there; waits for one that is late."""
    return payload.wait() if isinstance(payload, LatePayload) else payload
