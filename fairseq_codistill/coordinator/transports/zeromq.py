"""Owns the ZeroMQ sockets: one PULL to listen, one PUSH to every peer. It never looks into a message.

ZeroMQ reconnects by itself and sends from its own thread, so a post returns at once. Queues are short: a peer that
does not read costs a few messages of memory, then its messages are dropped here.
"""

import ipaddress
import logging
import socket
import threading
import time

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.transports.curve_keys import KeySet
from fairseq_codistill.coordinator.transports.reach import look_at
from fairseq_codistill.coordinator.transports.transport import INTERRUPTED_LINGER_S, Transport
from fairseq_codistill.coordinator.transports.way import FAILURES, Way
from fairseq_codistill.coordinator.wire import LAUNCHER, WireError

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 8  # messages queued to and from one peer


def parse_addresses(addresses: str, num_models: int, world_size: int) -> list[list[tuple[str, int]]]:
    """Where every rank of every model listens.

    Args:
        addresses: ``--codistill-addresses``.
        num_models: n.
        world_size: X, ranks of one model.

    Returns:
        ``[model][rank] -> (host, port)``.

    Raises:
        ConfigError: an entry is not HOST:PORT, there are not n of them, ranks do not divide over the hosts of an
            entry, or two ranks would share an address.
    """
    entries = [entry.strip() for entry in addresses.split(",") if entry.strip()]
    if len(entries) != num_models:
        raise ConfigError(f"--codistill-addresses lists {len(entries)} entries; {num_models} models need {num_models}")
    table = []
    for entry in entries:
        hosts_text, _, port_text = entry.rpartition(":")
        hosts = hosts_text.split("+")
        if not port_text.isdecimal() or not all(hosts) or not 0 < int(port_text) < 65536:
            raise ConfigError(f"--codistill-addresses: {entry!r} is not HOST:PORT (or HOST+HOST:PORT)")
        if world_size % len(hosts):
            raise ConfigError(
                f"--codistill-addresses: {entry!r} names {len(hosts)} hosts, over which {world_size} ranks "
                "do not divide"
            )
        per_host = world_size // len(hosts)
        ranks = [(hosts[r // per_host], int(port_text) + r % per_host) for r in range(world_size)]
        if ranks[-1][1] > 65535:
            raise ConfigError(f"--codistill-addresses: {entry!r} with {world_size} ranks goes past port 65535")
        table.append(ranks)
    everyone = [address for ranks in table for address in ranks]
    for address in everyone:
        if everyone.count(address) > 1:
            raise ConfigError(
                f"--codistill-addresses {addresses!r}: two ranks would both listen on {address[0]}:{address[1]}; "
                f"leave {world_size} ports between models of one host"
            )
    return table


class ZeroMqTransport(Transport):
    """Sockets of one rank.

    Args:
        listen: (host, port) of this rank, as the peers know it.
        peers: model -> (host, port) of the same rank of that model.
        bind_host: address or interface to bind, "" for that of ``listen``.
        max_message_bytes: a larger frame is refused before memory is taken for it, and its connection dropped.
        model: index of this model; needed with ``keys``.
        keys: lets in only the models of the key set, and encrypts.

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
    ):
        self._context: zmq.Context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 0)  # an object that is merely dropped must not wait for a dead peer
        self._pull = self._context.socket(zmq.PULL)
        self._pull.set_hwm(QUEUE_LENGTH)
        self._pull.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        self._peers = peers
        self._push: dict[int, zmq.Socket] = {}
        self._ways: dict[int, Way] = {}
        self._is_closed = False
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
        self.hears_launcher = keys is not None or is_loopback(bind_host or listen[0])
        host = bind_host or _bindable(listen[0], [address[0] for address in peers.values()])
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
            push.set_hwm(QUEUE_LENGTH)
            push.setsockopt(zmq.IMMEDIATE, 1)  # queue for live connections only: no stale pile for an absent peer
            push.setsockopt(zmq.RECONNECT_IVL, 100)
            push.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            # Dead hosts are noticed by the kernels, which answer for a peer that is validating; ZeroMQ's own heartbeat
            # goes unanswered when its queue is full, and every reconnection would then add a queue to its memory.
            push.setsockopt(zmq.TCP_KEEPALIVE, 1)
            push.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
            push.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
            push.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
            self._ways[peer] = Way(self._context, push, str(peer))
            push.connect(f"tcp://{peer_host}:{peer_port}")
            self._push[peer] = push

    def send(self, peer_model: int, header: bytes, payload: bytes | memoryview) -> bool:
        push = self._push[peer_model]
        # Asking makes ZeroMQ note what has left its queue since; sending alone does so only once in about a
        # millisecond, and would find the queue full after a few faster posts.
        if not int(push.getsockopt(zmq.EVENTS)) & zmq.POLLOUT:
            return False
        try:
            push.send_multipart([header, payload], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> tuple[bytes | memoryview, bytes | memoryview] | None:
        self._look()
        if not self._pull.poll(int(timeout_s * 1000)):
            return None
        frames = self._pull.recv_multipart(copy=False)
        if len(frames) != 2:
            raise WireError(f"message of {len(frames)} frames, expected 2")
        if self._holders:
            self.sender = self._holders[str(frames[0].get("User-Id"))]
        return frames[0].bytes, frames[1].buffer

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
        self._pull.disable_monitor()
        self._refusals.close(linger=0)
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
        """Count refusals, and see which ways have opened."""
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


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine alone, by whatever name. A host name of one's own is not: others may use it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bindable(host: str, peer_hosts: list[str]) -> str:
    """The numeric address of ``host``; ZeroMQ binds to addresses and interfaces, not to names."""
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(
            f"--codistill-addresses: cannot resolve {host!r} ({error}); name it by its address"
        ) from error
    loopback = ipaddress.ip_address(address).is_loopback
    if loopback and host != address and host != "localhost" and any(peer != host for peer in peer_hosts):
        raise ConfigError(
            f"--codistill-addresses: {host!r} resolves to {address} on its own host, where no other host reaches it; "
            "give --codistill-bind the interface or address to listen on"
        )
    return address
