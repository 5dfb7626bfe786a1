"""Owns the gloo connections of one rank: a torch.distributed process group of two with each peer.

For clusters where the models start and end together and ZeroMQ is not wanted. The groups are built from stores of
their own, so the job's default group, if it has one, is left untouched, and what happens to one peer does not concern
the others. A connection is made once: a peer that is lost stays lost.
"""

import contextlib
import datetime
import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.transports.addresses import bindable
from fairseq_codistill.coordinator.transports.pieces import SMALL_BYTES
from fairseq_codistill.coordinator.transports.reach import look_at
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import Header

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 8  # updates' worth of messages queued to one peer, and messages from all, as over ZeroMQ
MAX_QUEUED_BYTES = 2**30  # to one peer, and from all
MAX_HEADER_BYTES = 4096
FOREVER = datetime.timedelta(days=3650)  # a peer may validate for long; whether to wait is the mailbox's business
STORE_S = datetime.timedelta(seconds=30)  # until a store that is hosted here, and listens everywhere, answers
RETRY_S = 0.2
NAP_S = 0.01  # until there may be room
CONNECT_S = 2.0  # for a peer that is there to accept a connection
JOIN_S = 30.0  # for two that are there to become a group
_LENGTHS = struct.Struct("<QQ")  # of header and payload
_FIRST, _REST = 1, 2  # tags
_END = _LENGTHS.pack(0, 0)  # in place of the lengths of a message: the last thing that is sent


class GlooTransport(Transport):
    """Frames over gloo's point-to-point messages, one thread a peer and direction.

    The lower model of a pair hosts the store through which the two find each other, at its own address.

    A thread that waits inside gloo cannot be woken from here, and one that comes back while the interpreter shuts down
    aborts the process. So an end is answered: whoever closes says so, the other's thread answers at once, whatever its
    job is doing, and with that the threads on both sides end.

    Args:
        model: index of this model.
        listen: (host, port) of this rank.
        peers: model -> (host, port) of the same rank of that model.
        start_timeout_s: a peer that is not connected by then is lost.
        bind_host: interface, or address or host name whose interface gloo uses, "" or 0.0.0.0 for that of ``listen``.
        max_message_bytes: a larger message is refused before memory is taken for it, and its sender lost.
        messages_per_update: how many a rank posts in one update.
        max_queue_bytes: that may wait to be sent to one peer, and of what has come from all, beyond one message each.
        at_once: messages that may wait to be sent whatever their size: what a rank posts before it collects anything.

    Raises:
        ConfigError: the address cannot be used.
    """

    remedy = "This transport cannot take it back: restart all models, or use --codistill-transport zmq"

    def __init__(
        self,
        model: int,
        listen: tuple[str, int],
        peers: dict[int, tuple[str, int]],
        start_timeout_s: float,
        bind_host: str = "",
        max_message_bytes: int = 2**31,
        messages_per_update: int = 1,
        max_queue_bytes: int = MAX_QUEUED_BYTES,
        at_once: int = 1,
    ):
        self._max_queue_bytes, self._at_once = max_queue_bytes, at_once
        self._bytes_lock = threading.Lock()  # of what follows
        self._queued_bytes: dict[int, int] = dict.fromkeys(peers, 0)
        self._queued: dict[int, int] = dict.fromkeys(peers, 0)
        self._inbox_bytes = 0
        self._queue_length = QUEUE_LENGTH * messages_per_update
        self._model, self._peers = model, peers
        self._host = bind_host  # gloo listens on one interface
        if bind_host in ("", "0.0.0.0"):
            self._host = listen[0]
            bindable(listen[0], [host for host, _ in peers.values()])  # or is an error
        self._deadline = time.monotonic() + start_timeout_s
        self._max_message_bytes = max_message_bytes
        self._inbox: queue.Queue[tuple[bytes, memoryview]] = queue.Queue(maxsize=QUEUE_LENGTH * max(1, len(peers)))
        self._outboxes: dict[int, queue.Queue[tuple[Header, bytes | memoryview] | None]] = {}
        self._failures: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._is_closed = False
        self._listen = listen
        self._store: Any = None
        if any(peer > model for peer in peers):
            try:
                # It connects to itself, and not by a name by which the others, but not this host, may find it.
                self._store = TCPStore("127.0.0.1", listen[1], None, True, timeout=STORE_S, wait_for_workers=False)
                self._store.set_timeout(FOREVER)
            except (RuntimeError, OSError) as error:
                raise ConfigError(
                    f"cannot listen on {listen[0]}:{listen[1]} ({_first_line(error)}); free the port or choose another "
                    "in --codistill-addresses"
                ) from error
        for peer in peers:
            self._start(self._connect_and_receive, peer)

    # -- the interface ---------------------------------------------------------------------------------------------

    def send(self, peer_model: int, header: Header, payload: bytes | memoryview) -> bool:
        outbox = self._outboxes.get(peer_model)
        if outbox is None or outbox.full():
            return False
        with self._bytes_lock:
            queued = self._queued_bytes[peer_model]
            is_beyond = len(payload) > SMALL_BYTES and queued + len(payload) > self._max_queue_bytes
            if self._queued[peer_model] >= self._at_once and is_beyond:
                return False
            try:
                outbox.put_nowait((header, payload))
            except queue.Full:
                return False
            self._queued_bytes[peer_model] += len(payload)
            self._queued[peer_model] += 1
        return True

    def receive(self, timeout_s: float) -> tuple[bytes | memoryview, bytes | memoryview] | None:
        try:
            found = self._inbox.get(block=timeout_s > 0, timeout=timeout_s if timeout_s > 0 else None)
        except queue.Empty:
            return None
        with self._bytes_lock:
            self._inbox_bytes -= len(found[1])
        return found

    def lost_peers(self) -> dict[int, str]:
        found = {}
        while not self._failures.empty():
            peer, reason = self._failures.get()
            found[peer] = reason
        return found

    def describe(self, peer_model: int) -> str:
        if peer_model in self._outboxes:
            return "connected, and heard nothing from it"
        if peer_model > self._model:
            host, port = self._listen
            return f"it has not come to {host}:{port}, where this model waits for it"
        return look_at(*self._peers[peer_model])

    def close(self, linger_s: float) -> None:
        self._is_closed = True
        started = time.monotonic()
        for outbox in list(self._outboxes.values()):
            while True:
                with contextlib.suppress(queue.Full):
                    outbox.put(None, timeout=0.01)
                    break
                if not self.may_linger(started, linger_s):
                    break
        for thread in list(self._threads):
            while thread.is_alive() and self.may_linger(started, linger_s):
                thread.join(0.01)

    # -- threads ---------------------------------------------------------------------------------------------------

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _connect_and_receive(self, peer: int) -> None:
        try:
            group, other = self._connect(peer)
            self._outboxes[peer] = queue.Queue(maxsize=self._queue_length)
            self._start(self._send_all, peer, group, other)
            while True:
                lengths = torch.zeros(_LENGTHS.size, dtype=torch.uint8)
                group.recv([lengths], other, _FIRST).wait(FOREVER)
                if lengths.numpy().tobytes() == _END:
                    break
                header_bytes, payload_bytes = _LENGTHS.unpack(lengths.numpy().tobytes())
                if header_bytes > MAX_HEADER_BYTES or payload_bytes > self._max_message_bytes:
                    raise RuntimeError(f"it announced a message of {header_bytes} + {payload_bytes} bytes")
                frames = torch.empty(header_bytes + payload_bytes, dtype=torch.uint8)
                group.recv([frames], other, _REST).wait(FOREVER)
                view = memoryview(frames.numpy())  # type: ignore[arg-type]
                self._hand_over(bytes(view[:header_bytes]), view[header_bytes:])
            outbox = self._outboxes.pop(peer, None)  # nothing more is sent to it but the answer
            if outbox is not None:
                outbox.put(None)
        except Exception as error:
            self._lose(peer, _first_line(error))

    def _connect(self, peer: int) -> tuple[Any, int]:
        """The group of two, and the peer's rank in it.

        Waiting is done here, where it can be given up, and not inside gloo, where it cannot.
        """
        low, high = sorted((self._model, peer))
        store = PrefixStore(f"{low}-{high}", self._store if low == self._model else self._find_store(peer))
        store.set(f"ready-{self._model}", "")
        while not store.check([f"ready-{peer}"]):
            self._pause()
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = datetime.timedelta(seconds=JOIN_S)
        is_interface = self._host in {name for _, name in socket.if_nameindex()}
        where = {"interface" if is_interface else "hostname": self._host}
        options._devices = [ProcessGroupGloo.create_device(**where)]
        mine = int(self._model == high)
        return ProcessGroupGloo(store, mine, 2, options), 1 - mine

    def _find_store(self, peer: int) -> Any:
        """The peer's store, which may not be there yet."""
        host, port = self._peers[peer]
        while True:
            with contextlib.suppress(RuntimeError, OSError):
                socket.create_connection((host, port), timeout=CONNECT_S).close()
                return TCPStore(host, port, None, False, timeout=datetime.timedelta(seconds=CONNECT_S))
            self._pause()

    def _pause(self) -> None:
        """Before the next look whether the peer is there; raises when it is time to give up."""
        if time.monotonic() > self._deadline:
            raise RuntimeError("no contact within --codistill-start-timeout")
        if self._is_closed or self.is_interrupted:
            raise RuntimeError("not waited for any more")
        time.sleep(RETRY_S)

    def _hand_over(self, header: bytes, payload: memoryview) -> None:
        """Wait for room in the inbox. Once closed, read on and drop: unread data would cut our goodbye off."""
        while not self._is_closed:
            if self._inbox_bytes and self._inbox_bytes + len(payload) > self._max_queue_bytes:
                time.sleep(NAP_S)
                continue
            with contextlib.suppress(queue.Full):
                self._inbox.put((header, payload), timeout=0.2)
                with self._bytes_lock:
                    self._inbox_bytes += len(payload)
                return

    def _send_all(self, peer: int, group: Any, other: int) -> None:
        outbox = self._outboxes[peer]
        try:
            while (message := outbox.get()) is not None:
                header, payload = message
                whole = bytearray(_LENGTHS.pack(len(header), len(payload)))
                whole += bytes(header)  # a late one takes its checksum here
                whole += payload
                tensor = torch.frombuffer(whole, dtype=torch.uint8)
                group.send([tensor[: _LENGTHS.size]], other, _FIRST).wait(FOREVER)
                group.send([tensor[_LENGTHS.size :]], other, _REST).wait(FOREVER)
                with self._bytes_lock:
                    self._queued_bytes[peer] -= len(payload)
                    self._queued[peer] -= 1
            group.send([torch.frombuffer(bytearray(_END), dtype=torch.uint8)], other, _FIRST).wait(FOREVER)
        except Exception as error:
            self._lose(peer, _first_line(error))

    def _lose(self, peer: int, reason: str) -> None:
        self._outboxes.pop(peer, None)
        if not self._is_closed and not self.is_interrupted:
            self._failures.put((peer, reason))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
