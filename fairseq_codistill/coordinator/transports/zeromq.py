"""Owns the ZeroMQ sockets: one PULL to listen, one PUSH to every peer. It never looks into a message.

ZeroMQ reconnects by itself and sends from threads of its own, as ``outbound`` and ``inbound`` do, so a post returns at
once, and a message is there whole when a step asks for it. Queues are short: a peer that does not read costs a few
messages of memory, then its messages are dropped here.
"""

import logging
import threading
import time

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.late import Payload
from fairseq_codistill.coordinator.transports.addresses import bindable, binds_to_loopback
from fairseq_codistill.coordinator.transports.curve_keys import KeySet
from fairseq_codistill.coordinator.transports.inbound import Inbound
from fairseq_codistill.coordinator.transports.outbound import Outbound
from fairseq_codistill.coordinator.transports.pieces import LABEL_BYTES, PIECE_BYTES
from fairseq_codistill.coordinator.transports.reach import look_at
from fairseq_codistill.coordinator.transports.transport import ENCRYPTION_BYTES, INTERRUPTED_LINGER_S, Transport
from fairseq_codistill.coordinator.transports.way import FAILURES, Way
from fairseq_codistill.coordinator.wire import HEADER_BYTES, LAUNCHER, Header

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 8  # updates' worth of messages queued to one peer, and messages from all
MAX_QUEUED_BYTES = 2**30  # to one peer, and from all
MAX_IO_THREADS = 4
LOOK_EVERY_S = 0.05  # at who was refused, and how the connections are
PIECES_AHEAD = 16  # or messages of one peer that ZeroMQ holds for us


class ZeroMqTransport(Transport):
    """Sockets of one rank.

    Args:
        listen: (host, port) of this rank, as the peers know it.
        peers: model -> (host, port) of the same rank of that model.
        bind_host: address or interface to bind, "" for that of ``listen``.
        max_message_bytes: a larger message is refused; a frame that is larger, or than a piece of a payload can be,
            before memory is taken for it, and its connection is dropped. Negative: only the latter.
        model: index of this model; needed with ``keys``.
        keys: lets in only the models of the key set, and encrypts.
        messages_per_update: how many a rank posts in one update, of which the queue to a peer holds several updates'.
        max_queue_bytes: that may wait to be sent to one peer, and of what has come from all.
        at_once: messages that may wait to be sent whatever their size: what a rank posts before it collects anything.

    Raises:
        ConfigError: the address cannot be bound, or peers could not reach it.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        peers: dict[int, tuple[str, int]],
        bind_host: str = "",
        max_message_bytes: int = -1,
        model: int = 0,
        keys: KeySet | None = None,
        messages_per_update: int = 1,
        max_queue_bytes: int = MAX_QUEUED_BYTES,
        at_once: int = 1,
    ):
        num_threads = min(max(1, 2 * len(peers)), MAX_IO_THREADS)
        sending, receiving = 2 ** (num_threads // 2) - 1, 2**num_threads - 2 ** (num_threads // 2)  # masks of threads
        self._context: zmq.Context = zmq.Context(io_threads=num_threads)
        self._context.setsockopt(zmq.LINGER, 0)  # an object that is merely dropped must not wait for a dead peer
        self._pull = self._context.socket(zmq.PULL)
        self._pull.set_hwm(PIECES_AHEAD)
        self._pull.setsockopt(zmq.AFFINITY, receiving)  # ZeroMQ would often put both ways on one thread
        largest = PIECE_BYTES if max_message_bytes < 0 else min(max_message_bytes, PIECE_BYTES)
        largest = max(largest, LABEL_BYTES + HEADER_BYTES)
        self._pull.setsockopt(zmq.MAXMSGSIZE, largest if keys is None else largest + ENCRYPTION_BYTES)
        self._peers = peers
        self._push: dict[int, zmq.Socket] = {}
        self._outbound = Outbound(self._push, QUEUE_LENGTH * messages_per_update, max_queue_bytes, at_once)
        self._inbound: Inbound | None = None
        self._ways: dict[int, Way] = {}
        self._is_closed, self._look_at = False, 0.0
        self.authenticates = keys is not None  # CURVE does every frame
        self._authenticator: ThreadAuthenticator | None = None
        self._holders: dict[str, int] = {}  # public key -> model: whose key a connection was let in with
        if keys is not None:
            self._holders = {keys.public[peer].decode(): peer for peer in peers}
            if keys.launcher is not None:
                self._holders[keys.launcher.decode()] = LAUNCHER
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", _Known({key.encode() for key in self._holders}))
            self._pull.curve_server = True
            self._pull.curve_publickey, self._pull.curve_secretkey = keys.public[model], keys.secret
        self._refusals = self._pull.get_monitor_socket(FAILURES)
        self._refusals.set_hwm(0)  # ZeroMQ's own thread would wait for room, and read nothing meanwhile
        self.hears_launcher = keys is not None or binds_to_loopback(bind_host or listen[0])
        host = bind_host or bindable(listen[0], [address[0] for address in peers.values()])
        endpoint = f"tcp://{host}:{listen[1]}"
        try:
            self._pull.bind(endpoint)
        except zmq.ZMQError as error:
            self.close(0)
            raise ConfigError(
                f"cannot listen on {endpoint} ({error}); free the port, choose another in --codistill-addresses, "
                "or name a local interface with --codistill-bind"
            ) from error
        for peer, (peer_host, peer_port) in peers.items():
            push = self._context.socket(zmq.PUSH)
            if keys is not None:
                push.curve_publickey, push.curve_secretkey = keys.public[model], keys.secret
                push.curve_serverkey = keys.public[peer]
            push.setsockopt(zmq.AFFINITY, sending)
            push.set_hwm(0)  # the bounds are those of ``outbound``: only it knows which pieces are one message
            push.setsockopt(zmq.IMMEDIATE, 1)  # queue for live connections only: no stale pile for an absent peer
            push.setsockopt(zmq.RECONNECT_IVL, 100)
            push.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            # Dead hosts are noticed by the kernels, which answer for a peer that is validating; ZeroMQ's own heartbeat
            # goes unanswered when its queue is full, and every reconnection would then add a queue to its memory.
            push.setsockopt(zmq.TCP_KEEPALIVE, 1)
            push.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
            push.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
            push.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
            self._ways[peer] = Way(self._context, push, f"tcp://{peer_host}:{peer_port}", str(peer))
            self._push[peer] = push
        self.endpoint = endpoint
        num_messages = QUEUE_LENGTH * messages_per_update
        self._inbound = Inbound(
            self._pull,
            self._holders,
            max_message_bytes,
            num_messages * max(1, len(peers)),
            max_queue_bytes,
            max_partial=2 * max(1, len(peers)),  # of a process that ended in the middle, and of the one that follows it
        )

    takes_late_payloads = True

    def send(self, peer_model: int, header: Header, payload: Payload) -> bool:
        return self._outbound.send(peer_model, header, payload)

    def receive(self, timeout_s: float) -> tuple[bytes | memoryview, bytes | memoryview] | None:
        if time.monotonic() >= self._look_at:  # not at every message: it asks for every peer
            self._look_at = time.monotonic() + LOOK_EVERY_S
            self._look()
        assert self._inbound is not None
        arrived = self._inbound.get(timeout_s)
        if arrived is None:
            return None
        self.checksum = arrived.checksum
        if self._holders:
            self.sender = arrived.sender
        return arrived.header, arrived.payload

    def describe(self, peer_model: int) -> str:
        self._look()
        (host, port), way = self._peers[peer_model], self._ways[peer_model]
        if way.is_open:
            return (
                f"connected to {host}:{port}, and heard nothing from there: is --codistill-addresses the same for all "
                "jobs, and do its hosts reach this one?"
            )
        if way.num_failures or way.num_connections:
            return (
                f"something listens at {host}:{port}, and refused the handshake ({max(1, way.num_failures)} times): "
                "other keys, or keys on one side only; give all jobs the same --codistill-keys"
            )
        return look_at(host, port)

    def close(self, linger_s: float) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        started = time.monotonic()
        if self.is_interrupted:
            linger_s = min(linger_s, INTERRUPTED_LINGER_S)
        if self._inbound is not None:
            self._outbound.end()
            while not self._outbound.has_ended(0.05) and self.may_linger(started, linger_s):
                pass
            self._inbound.close()
        self._pull.disable_monitor()
        self._refusals.close(linger=0)
        with self._outbound.lock:
            for way in self._ways.values():
                way.close()
            for push in self._push.values():
                push.close(linger=int(linger_s * 1000))
        self._pull.close(linger=0)
        if self._authenticator is not None:
            self._authenticator.stop()
        # It returns when the queues are empty or the linger is over. In a thread, since a signal that comes meanwhile
        # cannot end it; then the thread lingers on, and ends with the process.
        ending = threading.Thread(target=self._context.term, name="codistill-linger", daemon=True)
        ending.start()
        while ending.is_alive() and (not self.is_interrupted or self.may_linger(started, linger_s)):
            ending.join(0.05)

    def _look(self) -> None:
        """Count refusals, and see how the ways are."""
        with self._outbound.lock:
            for way in self._ways.values():
                way.look()
        while self._refusals.poll(0):
            recv_monitor_message(self._refusals)
            self.num_refused_connections += 1
            count = self.num_refused_connections
            if count & (count - 1) == 0:  # 1st, 2nd, 4th, 8th ...: whoever knocks for days must not fill the log
                logger.warning(
                    "codistillation: refused a connection (%d so far): it has not the right key; all jobs of a run "
                    "need the same --codistill-keys",
                    count,
                )


class _Known:
    """Lets in the holders of these public keys, in the form that ZeroMQ's authenticator asks for."""

    def __init__(self, public: set[bytes]):
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._public
