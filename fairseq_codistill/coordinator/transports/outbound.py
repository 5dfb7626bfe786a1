"""Owns what leaves over ZeroMQ: a PUSH socket to every peer, and what is queued to each.

A small message is handed to ZeroMQ at once, unless it is still on its way off an accelerator. A larger one is handed
over by a thread, which also takes its checksum; in pieces where it is large, which travel meanwhile. Bounded in
messages and in bytes by what ZeroMQ has not let go of yet.
"""

import collections
import dataclasses
import queue
import threading
import time
from typing import Any

import zmq

from fairseq_codistill.coordinator.late import LatePayload, Payload, bytes_of
from fairseq_codistill.coordinator.transports.pieces import PIECE_BYTES, SMALL_BYTES, Cutter
from fairseq_codistill.coordinator.wire import Header

LATE_NEWS_S = 0.05  # that a message has gone is told by a thread of pyzmq, which a busy machine may let wait


@dataclasses.dataclass
class _Parcel:
    """A message that is queued: ``tracker`` is ZeroMQ's, once it has it."""

    num_bytes: int
    tracker: Any = None
    is_lost: bool = False

    @property
    def is_gone(self) -> bool:
        return self.is_lost or (self.tracker is not None and self.tracker.done)


@dataclasses.dataclass
class _Line:
    """To one peer; ``num_waiting`` messages are still with the thread; ``is_stuck`` while none of a full line goes."""

    queued: collections.deque[_Parcel] = dataclasses.field(default_factory=collections.deque)
    num_waiting: int = 0
    is_stuck: bool = False


class Outbound:
    """Sends to several peers.

    Args:
        pushes: model -> its socket; used under :attr:`lock` only from now on.
        max_messages: that may be queued to one peer, and as many again on their way to it.
        max_bytes: likewise, beyond ``at_once`` messages.
        at_once: messages that always fit: what a rank posts before it collects anything, the parts of a batch.

    Attributes:
        lock: of the sockets.
    """

    def __init__(self, pushes: dict[int, zmq.Socket], max_messages: int, max_bytes: int, at_once: int = 1):
        self.lock = threading.Lock()
        self._cutter = Cutter()
        self._pushes = pushes
        self._lines: dict[int, _Line] = collections.defaultdict(_Line)
        self._max_messages, self._max_bytes, self._at_once = max_messages, max_bytes, at_once
        self._jobs: queue.SimpleQueue[tuple[zmq.Socket, _Line, _Parcel, Header, Payload] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None  # where nothing is large there is none

    def send(self, model: int, header: Header, payload: Payload) -> bool:
        """Whether it could be queued: there is a connection, and room."""
        push, line, parcel = self._pushes[model], self._lines[model], _Parcel(len(payload))
        with self.lock:
            # Asking makes ZeroMQ note what has left its queue since; sending alone does so only once in about a
            # millisecond, and would find the queue full after a few faster posts.
            if not int(push.getsockopt(zmq.EVENTS)) & zmq.POLLOUT or not self._has_room(line, parcel.num_bytes):
                return False
            if parcel.num_bytes <= SMALL_BYTES and not line.num_waiting and not isinstance(payload, LatePayload):
                self._hand_over(push, parcel, bytes(header), payload)
            else:
                line.num_waiting += 1
                self._jobs.put((push, line, parcel, header, payload))
            if not parcel.is_lost:
                line.queued.append(parcel)
            if line.num_waiting and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="codistill-outbound", daemon=True)
                self._thread.start()
        return not parcel.is_lost

    def end(self) -> None:
        """Send what is queued, and no more."""
        self._jobs.put(None)

    def has_ended(self, timeout_s: float) -> bool:
        """Whether ZeroMQ has all of it, or does within ``timeout_s`` seconds."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    def _has_room(self, line: _Line, num_bytes: int) -> bool:
        until = time.monotonic() + (0.0 if line.is_stuck else LATE_NEWS_S)
        while True:
            while line.queued and line.queued[0].is_gone:
                line.queued.popleft()
            line.is_stuck = len(line.queued) >= 2 * self._max_messages
            if not line.is_stuck or time.monotonic() >= until:
                break
            time.sleep(0.001)
        if line.num_waiting >= self._max_messages or line.is_stuck:
            return False
        if len(line.queued) < self._at_once or num_bytes <= SMALL_BYTES:  # news are bounded in number only
            return True
        return sum(parcel.num_bytes for parcel in line.queued) + num_bytes <= self._max_bytes

    def _hand_over(self, push: zmq.Socket, parcel: _Parcel, first: bytes, last: bytes | memoryview) -> None:
        """The last frames of a parcel; small ones are told of as well, since nothing else bounds their number."""
        try:
            frame = zmq.Frame(last, track=True, copy=False, copy_threshold=0)
        except RuntimeError:  # while the interpreter ends pyzmq tells of nothing any more
            frame = zmq.Frame(bytes(last), copy=True)
        try:
            push.send(first, zmq.NOBLOCK | zmq.SNDMORE)
            parcel.tracker = push.send(frame, zmq.NOBLOCK, copy=False, track=frame.tracker is not None)
        except zmq.ZMQError:  # no connection any more, or closed: lost, as what had left already would be
            parcel.is_lost = True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            push, line, parcel, header, payload = job
            payload = bytes_of(payload)  # once it is off the accelerator
            if parcel.num_bytes > PIECE_BYTES:
                self._hand_over_pieces(push, parcel, header, payload)
            else:
                first = bytes(header)  # its checksum, during which others may send
                with self.lock:
                    self._hand_over(push, parcel, first, payload)
            with self.lock:
                line.num_waiting -= 1
            del job, header, payload  # while it waits for the next one it keeps no memory

    def _hand_over_pieces(self, push: zmq.Socket, parcel: _Parcel, header: Header, payload: bytes | memoryview) -> None:
        *before, (label, last) = self._cutter.cut(payload)
        for other_label, piece in before:
            with self.lock:
                try:
                    push.send(other_label, zmq.NOBLOCK | zmq.SNDMORE)
                    push.send(piece, zmq.NOBLOCK, copy=False)
                except zmq.ZMQError:
                    parcel.is_lost = True
                    return
        label += bytes(header)  # its checksum, while the pieces before it travel
        with self.lock:
            self._hand_over(push, parcel, label, last)
