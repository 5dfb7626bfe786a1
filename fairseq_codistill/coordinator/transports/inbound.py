"""Owns what comes over ZeroMQ until a step asks for it: a thread takes it in, joins its pieces and, without
keys, takes the checksum.

Bounded in messages and in bytes, of which what has come in part counts: beyond that the thread reads no further, and
the senders' queues fill up.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Mapping
from typing import NamedTuple

import zmq

from fairseq_codistill.coordinator.transports.pieces import Joiner
from fairseq_codistill.coordinator.wire import WireError

LONGEST_SLEEP_S = 0.5


class Arrived(NamedTuple):
    """A message that has come whole.

    Attributes:
        sender: model, as the key of its connection says; None without keys.
        checksum: of the payload; None with keys.
    """

    sender: int | None
    header: bytes
    payload: memoryview
    checksum: int | None


class Inbound:
    """Reads one socket in a thread.

    Args:
        pull: bound; the thread's own from now on.
        holders: public key -> model; empty without keys.
        max_message_bytes: a larger payload is refused; negative: none is.
        max_messages: what may wait here.
        max_bytes: likewise.
        max_partial: messages of which a part may have come.
    """

    def __init__(
        self,
        pull: zmq.Socket,
        holders: Mapping[str, int],
        max_message_bytes: int,
        max_messages: int,
        max_bytes: int,
        max_partial: int,
    ):
        self._pull, self._holders = pull, holders
        self._max_messages, self._max_bytes = max_messages, max_bytes
        self._joiner = Joiner(max_message_bytes, max_partial, is_authenticated=bool(holders))
        self._inbox: queue.SimpleQueue[Arrived | WireError] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what follows
        self._num_bytes = 0
        self._is_closed = False
        self._wake_read, self._wake_write = os.pipe()
        for descriptor in (self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)
        self._thread = threading.Thread(target=self._run, name="codistill-inbound", daemon=True)
        self._thread.start()

    def get(self, timeout_s: float) -> Arrived | None:
        """The next message, or None after ``timeout_s`` seconds without one.

        Raises:
            WireError: what came is none; it has been dropped.
        """
        try:
            found = self._inbox.get(block=timeout_s > 0, timeout=timeout_s if timeout_s > 0 else None)
        except queue.Empty:
            return None
        was_full = self._is_full(more=1)
        if isinstance(found, WireError):
            self._wake()
            raise found
        with self._lock:
            self._num_bytes -= len(found.payload)
        if was_full:
            self._wake()  # there is room again
        return found

    def close(self) -> None:
        """Read no more; the socket is the caller's again. May be called twice."""
        self._is_closed = True
        self._wake()
        self._thread.join()

    def _is_full(self, more: int = 0) -> bool:
        if self._inbox.qsize() + more >= self._max_messages:
            return True
        # Where nothing is whole nobody can make room: what has come in part must be read to its end.
        return self._num_bytes > 0 and self._num_bytes + self._joiner.num_bytes >= self._max_bytes

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            os.write(self._wake_write, b"x")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        try:
            while not self._is_closed:
                poller.modify(self._pull, 0 if self._is_full() else zmq.POLLIN)
                ready = dict(poller.poll(int(LONGEST_SLEEP_S * 1000)))
                if self._wake_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                while not self._is_closed and not self._is_full() and self._take():
                    pass
        finally:
            with self._lock:  # or somebody would write to a descriptor that is another's by then
                os.close(self._wake_write)
                self._wake_write = -1
            os.close(self._wake_read)

    def _take(self) -> bool:
        """Take a message or a piece of one in; False where there is none."""
        try:
            frames = self._pull.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        try:
            if len(frames) != 2:
                raise WireError(f"message of {len(frames)} frames, expected 2")
            sender = self._holders[str(frames[0].get("User-Id"))] if self._holders else None
            first, second = (frame.buffer for frame in frames)
            take = self._joiner.add if Joiner.is_label(first) else self._joiner.whole
            joined = take(sender, first, second)
        except WireError as error:
            self._inbox.put(error)
            return True
        if joined is not None:
            header, payload, checksum = joined
            with self._lock:
                self._num_bytes += len(payload)
            self._inbox.put(Arrived(sender, bytes(header), payload, checksum))
        return True
