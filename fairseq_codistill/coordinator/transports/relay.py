"""Owns the messages of one rank that travel through a relay: for jobs that can call out, and not be called.

A thread of its own seals, sends, receives and opens, so that a step waits for none of it, and joins again when a
connection breaks. A message for several peers leaves once. What may have been lost with a connection, the last two
updates' worth, is sent again when the same process is back; the seal tells the receiver what it has already.
"""

import collections
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.transports import relay_frames
from fairseq_codistill.coordinator.transports.addresses import is_host, refuse_ipv6
from fairseq_codistill.coordinator.transports.curve_keys import KeySet
from fairseq_codistill.coordinator.transports.pieces import SMALL_BYTES
from fairseq_codistill.coordinator.transports.relay_line import Line
from fairseq_codistill.coordinator.transports.sealing import HEADER_OVERHEAD, PAYLOAD_OVERHEAD, Seal
from fairseq_codistill.coordinator.transports.transport import ENCRYPTION_BYTES, INTERRUPTED_LINGER_S, Transport
from fairseq_codistill.coordinator.wire import Header, WireError

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 8  # updates' worth of messages to the relay, and from each peer, as over ZeroMQ
MAX_QUEUED_BYTES = 2**30  # either way
MAX_KEPT_BYTES = 2**28  # of what is kept to be sent again
LIMBO_S = 30.0  # a peer that the relay misses for so long may come back, and is still sent to
LONGEST_SLEEP_S = 0.5


def parse_relay(relay: str) -> tuple[str, int]:
    """``--codistill-relay`` as (host, port).

    Raises:
        ConfigError: it is not HOST:PORT.
    """
    relay = relay.strip()
    host, _, port = relay.rpartition(":")
    for text in (relay, host):
        refuse_ipv6(f"--codistill-relay {relay!r}", text)
    if not is_host(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--codistill-relay is {relay!r}; it must be HOST:PORT of a codistill-relay, as relay:29700")
    return host, int(port)


class _Sealed(NamedTuple):
    """A message as it leaves: ``sessions`` are the processes that it is for."""

    headers: dict[int, bytes]
    payload: bytes
    sessions: dict[int, bytes]


class RelayTransport(Transport):
    """Messages of one rank through a relay.

    Args:
        relay: (host, port).
        model: index of this model, or ``LAUNCHER``.
        peers: indices of the others.
        rank: rank inside this model.
        keys: of the run.
        relay_key: public key of the relay, in ZeroMQ's Z85 form.
        run_key: 32 bytes by which all models seal.
        max_message_bytes: a larger frame is refused before memory is taken for it, and the connection dropped.
        messages_per_update: how many a rank posts in one update.
        max_queue_bytes: that may wait, either way, beyond one message.
        at_once: messages that may wait to be sent whatever their size: what a rank posts before it collects anything.
        num_senders: peers that send to this rank at once; 0, all of them.
    """

    hears_launcher = True  # the relay tells by its key who speaks
    authenticates = True  # the seal does, header and payload and that they belong together
    remedy = "End the job that is not meant to be this model, then start this one again: it goes on from its checkpoint"

    def __init__(
        self,
        relay: tuple[str, int],
        model: int,
        peers: Iterable[int],
        rank: int,
        keys: KeySet,
        relay_key: bytes,
        run_key: bytes,
        max_message_bytes: int = 2**31,
        messages_per_update: int = 1,
        max_queue_bytes: int = MAX_QUEUED_BYTES,
        at_once: int = 1,
        num_senders: int = 0,
    ):
        self._seal = Seal(run_key, model)
        self._peers = set(peers)
        public = keys.public.get(model, keys.launcher)
        assert public is not None
        limit = max_message_bytes + PAYLOAD_OVERHEAD + ENCRYPTION_BYTES
        num_senders = num_senders or len(self._peers)
        self._line = Line(relay, relay_key, public, keys.secret, limit, rank, self._seal.session, num_senders)
        self._max_queue_bytes, self._at_once = max_queue_bytes, at_once
        self._room = QUEUE_LENGTH * messages_per_update + len(self._peers)
        self._lock = threading.Lock()  # of what follows, up to the inbox
        self._outbox: collections.deque[tuple[dict[int, Header], bytes | memoryview]] = collections.deque()
        self._outbox_bytes = 0
        self._standing: dict[int, relay_frames.Standing] = {}
        self._gone_since: dict[int, float] = {}  # of peers that were there
        self._num_joins = 0  # of the line, when who is there was last told
        self._limit_bytes = 0  # of a sealed payload, as the relay said last
        self._has_said_limit = False
        self._close_at: float | None = None
        self._lost: dict[int, str] = {}
        self._inbox: queue.SimpleQueue[tuple[int, bytes, bytes] | WireError] = queue.SimpleQueue()
        self._inbox_bytes = 0
        # The thread's own.
        self._ready: collections.deque[_Sealed] = collections.deque()
        self._kept: collections.deque[_Sealed] = collections.deque(maxlen=2 * messages_per_update + len(self._peers))
        self._met: dict[int, tuple[bytes, bytes, int]] = {}  # peer -> session, its connection, ours
        self._wake_read, self._wake_write = os.pipe()
        for descriptor in (self._wake_read, self._wake_write):
            os.set_blocking(descriptor, False)
        self._thread = threading.Thread(target=self._run, name="codistill-relay", daemon=True)
        self._thread.start()

    # -- the interface ---------------------------------------------------------------------------------------------

    def send(self, peer_model: int, header: Header, payload: bytes | memoryview) -> bool:
        return bool(self.send_to_all({peer_model: header}, payload))

    def send_to_all(self, headers: Mapping[int, Header], payload: bytes | memoryview) -> dict[int, int]:
        with self._lock:
            taken = {model: header for model, header in headers.items() if self._takes(model)}
            is_beyond = len(payload) > SMALL_BYTES and self._outbox_bytes + len(payload) > self._max_queue_bytes
            is_full = len(self._outbox) >= self._at_once and is_beyond
            if not taken or is_full or len(self._outbox) >= self._room or self._close_at is not None:
                return {}
            if self._is_too_large(len(payload) + PAYLOAD_OVERHEAD):
                return {}
            self._outbox.append((taken, payload))
            self._outbox_bytes += len(payload)
        self._wake()
        sizes = {model: len(header) + HEADER_OVERHEAD for model, header in taken.items()}
        sizes[next(iter(sizes))] += len(payload) + PAYLOAD_OVERHEAD
        return sizes

    def receive(self, timeout_s: float) -> tuple[bytes | memoryview, bytes | memoryview] | None:
        try:
            found = self._inbox.get(block=timeout_s > 0, timeout=timeout_s if timeout_s > 0 else None)
        except queue.Empty:
            return None
        if isinstance(found, WireError):
            raise found
        self.sender, header, payload = found
        with self._lock:
            self._inbox_bytes -= len(payload)
        self._wake()  # there is room again
        return header, payload

    def lost_peers(self) -> dict[int, str]:
        with self._lock:
            found, self._lost = self._lost, {}
        return found

    @property
    def limit_bytes(self) -> int | None:
        return self._limit_bytes - PAYLOAD_OVERHEAD if self._limit_bytes else None

    def describe(self, peer_model: int) -> str:
        seen = self._line.describe()
        if not self._line.is_joined:
            return seen
        if peer_model in self._standing:
            return f"{seen}, and so is that model, of which nothing was heard"
        return f"{seen}, where that model is not: not started, ended, or with other keys or another relay"

    def close(self, linger_s: float) -> None:
        if self.is_interrupted:
            linger_s = min(linger_s, INTERRUPTED_LINGER_S)
        started = time.monotonic()
        with self._lock:
            if self._close_at is None:
                self._close_at = started + linger_s
        self._wake()
        # It may linger in ZeroMQ, where no signal ends it; then it ends with the process.
        while self._thread.is_alive() and self.may_linger(started, linger_s + 1.0):
            self._thread.join(0.02)

    def _takes(self, model: int) -> bool:
        standing = self._standing.get(model)
        if standing is not None:
            return standing.has_room
        gone_since = self._gone_since.get(model)
        if gone_since is None:
            return False
        # While the relay is away nobody knows who is gone; what is taken waits, within the bounds of the outbox.
        return not self._line.is_joined or time.monotonic() - gone_since < LIMBO_S

    def _is_too_large(self, num_bytes: int) -> bool:
        """Whether the relay would cut the connection, or drop it, rather than take a payload of so many bytes."""
        if num_bytes <= self._limit_bytes:
            return False
        if not self._has_said_limit:
            self._has_said_limit = True
            logger.error(
                "codistillation: a message of %.1f MiB is not sent, nor is any other above %.1f MiB, which the relay "
                "does not take: start it with a larger codistill-relay --max-message-mb and --memory-mb, of which each "
                "rank there has a share, or send less",
                num_bytes / 2**20,
                self._limit_bytes / 2**20,
            )
        return True

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            os.write(self._wake_write, b"x")

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_over():
                self._step()
        finally:
            left_s = max(0.0, (self._close_at or 0.0) - time.monotonic())
            self._line.close(left_s if self._line.is_joined else 0.0)
            with self._lock:  # or somebody would write to a descriptor that is another's by then
                os.close(self._wake_write)
                self._wake_write = -1
            os.close(self._wake_read)

    def _is_over(self) -> bool:
        with self._lock:
            if self._close_at is None:
                return False
            is_idle = not self._outbox and not self._ready
        return is_idle or not self._line.num_joins or time.monotonic() >= self._close_at

    def _step(self) -> None:
        with self._lock:
            wants_to_send = bool(self._outbox or self._ready)
            many = self._inbox.qsize() >= self._room * max(1, len(self._peers))
            may_receive = not many and self._inbox_bytes < self._max_queue_bytes
        if self._line.wait(self._wake_read, wants_to_send, may_receive, LONGEST_SLEEP_S):
            self._on_standing({})
        while may_receive and (frames := self._line.receive()) is not None:
            try:
                self._take(frames)
            except WireError as error:
                self._inbox.put(error)
            with self._lock:
                may_receive = self._inbox_bytes < self._max_queue_bytes
        self._send_what_is_ready()

    def _send_what_is_ready(self) -> None:
        while self._ready or self._seal_next():
            while self._ready:
                message = self._ready[0]
                headers = {
                    model: header
                    for model, header in message.headers.items()
                    if model in self._standing and self._standing[model].session == message.sessions.get(model)
                }
                # For a peer that is gone it is kept; who is another process by now has no use for it. A relay that was
                # started again may take less than before.
                is_sent = bool(headers) and not self._is_too_large(len(message.payload))
                if is_sent and not self._line.send(relay_frames.upload(headers, message.payload)):
                    return
                self._ready.popleft()

    def _seal_next(self) -> bool:
        """Make the next message ready; False where there is none."""
        with self._lock:
            if not self._outbox:
                return False
            headers, payload = self._outbox.popleft()
            self._outbox_bytes -= len(payload)
        sessions = {model: self._met[model][0] for model in headers}
        sealed = self._seal.seal({model: bytes(late) for model, late in headers.items()}, payload, sessions)
        message = _Sealed(*sealed, sessions)
        self._ready.append(message)
        self._kept.append(message)
        while sum(len(kept.payload) for kept in self._kept) > MAX_KEPT_BYTES:
            self._kept.popleft()
        return True

    def _take(self, frames: list[bytes]) -> None:
        kind = frames[0][:1]
        if kind == relay_frames.DATA:
            sender = relay_frames.read_sender(frames)
            opened = self._seal.open(sender, frames[1], frames[2])
            if opened is not None:
                with self._lock:
                    self._inbox_bytes += len(opened[1])
                self._inbox.put((sender, *opened))
        elif kind == relay_frames.STANDING:
            standing, self._limit_bytes = relay_frames.read_standing(frames[0])
            self._on_standing(standing)
        elif kind == relay_frames.UNKNOWN:
            self._line.join_again()
        elif kind in (relay_frames.REPLACED, relay_frames.REFUSED):
            if kind == relay_frames.REFUSED:
                self.remedy = "Mend that, then start this job again: it goes on from its checkpoint"
            self._on_refusal(frames[0][1:].decode(errors="replace"))

    def _on_refusal(self, why: str) -> None:
        self._line.refusal = why or "another process has joined as this rank of this model"
        logger.error("codistillation: %s; nothing is exchanged any more", self._line.describe())
        self._on_standing({})
        with self._lock:
            self._gone_since.clear()
            self._lost = dict.fromkeys(self._peers, self._line.describe())

    def _on_standing(self, standing: dict[int, relay_frames.Standing]) -> None:
        """Who is there now; to a process that was there before over another connection the last messages go again."""
        standing = {model: one for model, one in standing.items() if model in self._peers}
        with self._lock:
            if self._num_joins != self._line.num_joins:  # the others may need a moment longer to be back
                self._num_joins = self._line.num_joins
                self._gone_since = dict.fromkeys(self._gone_since, time.monotonic())
            for model in self._standing.keys() - standing.keys():
                self._gone_since[model] = time.monotonic()
            for model in standing:
                self._gone_since.pop(model, None)
            self._standing = standing
        for model, one in standing.items():
            met = (one.session, one.token, self._line.num_joins)
            before = self._met.get(model)
            self._met[model] = met
            if before is not None and before[0] == one.session and before != met:
                again = [kept for kept in self._kept if kept.sessions.get(model) == one.session]
                waiting = {id(message) for message in self._ready}
                for kept in reversed([kept for kept in again if id(kept) not in waiting]):
                    self._ready.appendleft(kept._replace(headers={model: kept.headers[model]}))
