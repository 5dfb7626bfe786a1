"""Owns the interface of what moves messages. Implementations: ``zeromq``, ``gloo`` and ``relay``."""

import abc
import time
from collections.abc import Mapping

from fairseq_codistill.coordinator.wire import Header

INTERRUPTED_LINGER_S = 0.5  # what an end may take after an interrupt: enough for a goodbye to a peer that reads
ENCRYPTION_BYTES = 64  # more than what ZeroMQ's encryption adds to a frame


class Transport(abc.ABC):
    """Moves frames between ranks of the same number. Implementations own sockets or process groups, nothing else.

    Attributes:
        num_refused_connections: of those who have not the key of the run.
        sender: model that the last message came from, where the transport can tell by other means than the message.
        authenticates: whether what it hands out is what one of the models sent, every byte of it, so that messages
            need no checksum of their own.
        takes_late_payloads: whether it waits for them in a thread of its own; else it is given bytes that are there.
        checksum: of the payload that came last, where the transport has taken it already.
        hears_launcher: whether a message in the name of the launcher can be its own.
        is_interrupted: whether nothing is waited for any more.
        remedy: what to do about a peer that is lost for good, a sentence.
    """

    remedy = "Restart all models"

    num_refused_connections = 0
    sender: int | None = None
    authenticates = False
    takes_late_payloads = False
    checksum: int | None = None
    hears_launcher = False
    is_interrupted = False

    @abc.abstractmethod
    def send(self, peer_model: int, header: Header, payload: bytes | memoryview) -> bool:
        """Hand a message over without blocking.

        Args:
            peer_model: index of the receiving model.
            header: fixed header; one that is late is turned into bytes in a thread of the transport, if it has one.
            payload: raw bytes; the caller must not change them afterwards. Late ones only if it takes them.

        Returns:
            False if it cannot be queued now (no connection, queue full): it is dropped.
        """

    def send_to_all(self, headers: Mapping[int, Header], payload: bytes | memoryview) -> dict[int, int]:
        """Hand one payload over for several peers, without blocking.

        Args:
            headers: index of each receiving model -> the header for it.
            payload: as in :meth:`send`.

        Returns:
            model -> bytes that leave this process for it, of those for which it was queued. What leaves once for
            several peers is counted at one of them.
        """
        return {
            model: len(header) + len(payload) for model, header in headers.items() if self.send(model, header, payload)
        }

    @abc.abstractmethod
    def receive(self, timeout_s: float) -> tuple[bytes | memoryview, bytes | memoryview] | None:
        """The next (header, payload) from any peer, or None after ``timeout_s`` seconds without one.

        Raises:
            WireError: something arrived that has not two frames; it has been dropped.
        """

    @property
    def limit_bytes(self) -> int | None:
        """The largest payload that the way to the peers takes; None where it takes any, or nobody knows yet."""
        return None

    def lost_peers(self) -> dict[int, str]:
        """Model -> reason, of peers that were lost for good since the last call. None where peers can come back."""
        return {}

    def describe(self, peer_model: int) -> str:
        """What is seen of the way to a peer that was not met, in words for an error. Takes a few seconds at most."""
        return "no contact"

    def interrupt(self) -> None:
        """End what waits for a connection or lingers, now and from now on. A signal handler may call it."""
        self.is_interrupted = True

    def may_linger(self, started: float, linger_s: float) -> bool:
        """Whether an end that began at ``started`` (monotonic seconds) may go on."""
        limit_s = min(linger_s, INTERRUPTED_LINGER_S) if self.is_interrupted else linger_s
        return time.monotonic() - started < limit_s

    @abc.abstractmethod
    def close(self, linger_s: float) -> None:
        """Send what is queued for at most ``linger_s`` seconds, then let go of everything. May be called twice."""
