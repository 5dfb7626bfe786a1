"""Owns the one connection of a rank to its relay: ZeroMQ's socket, whether it stands, and what is seen of it.

A DEALER that connects out, and nothing else; it joins again after every connection. It knows no message.
"""

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from fairseq_codistill.coordinator.transports import relay_frames
from fairseq_codistill.coordinator.transports.reach import look_at
from fairseq_codistill.coordinator.transports.way import ENDS, FAILURES, GOES_ON, TRY_AGAIN_S

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 2  # messages in ZeroMQ itself, each way; the rest waits where it is counted


class Line:
    """Of one rank. One thread uses it.

    Args:
        relay: (host, port).
        relay_key: its public key, in ZeroMQ's Z85 form.
        public: key of this model, or of the launcher.
        secret: likewise.
        max_message_bytes: a larger frame is refused before memory is taken for it.
        rank: rank inside the model.
        session: of this process.
        num_senders: peers that send to this rank at once.

    Attributes:
        num_joins: connections on which this rank has joined.
        is_joined: whether it has on the present one.
        refusal: why the relay does not take it, in its words.
    """

    def __init__(
        self,
        relay: tuple[str, int],
        relay_key: bytes,
        public: bytes,
        secret: bytes,
        max_message_bytes: int,
        rank: int,
        session: bytes,
        num_senders: int = 1,
    ):
        self._relay, self._join = relay, relay_frames.join(rank, session, num_senders)
        self._context: zmq.Context = zmq.Context()
        self._context.setsockopt(zmq.LINGER, 0)
        socket = self._context.socket(zmq.DEALER)
        # Drawn, and known to the relay alone: it tells connections apart by it, and others of other runs are there.
        socket.setsockopt(zmq.ROUTING_ID, b"\x01" + os.urandom(16))
        socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = public, secret, relay_key
        socket.set_hwm(QUEUE_LENGTH)
        socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        # A home router forgets a connection that is silent for minutes, as during a validation.
        for option, value in ((zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 10), (zmq.TCP_KEEPALIVE_INTVL, 5)):
            socket.setsockopt(option, value)
        socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
        # Bytes that nobody acknowledges are given up as soon as the silence would be.
        socket.setsockopt(zmq.TCP_MAXRT, 30_000)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_CONNECTED | ENDS | GOES_ON)
        self._monitor.set_hwm(0)
        self._socket = socket
        self._must_join = False
        self.is_joined = False
        self.num_joins = self._num_connections = self._num_failures = 0
        self.refusal = ""
        self._try_again_at: float | None = None
        self._endpoint = f"tcp://{relay[0]}:{relay[1]}"
        socket.connect(self._endpoint)

    def wait(self, wake: int, wants_to_send: bool, may_receive: bool, timeout_s: float) -> bool:
        """Until something can be done, or a byte is in ``wake``, which is taken out.

        Returns:
            whether the connection broke meanwhile.
        """
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(wake, zmq.POLLIN)
        wants_to_send = self._must_join or (wants_to_send and self.is_joined)
        flags = (zmq.POLLIN if may_receive else 0) | (zmq.POLLOUT if wants_to_send else 0)
        if flags:
            poller.register(self._socket, flags)
        ready = dict(poller.poll(int(timeout_s * 1000)))
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wake, 4096)
        broke = self._look()
        if self._try_again_at is not None and time.monotonic() >= self._try_again_at:
            self._try_again_at = None
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)
        if self._must_join and self._put(self._join):
            self._must_join, self.is_joined = False, True
            self.num_joins += 1
        return broke

    def join_again(self) -> None:
        """The relay does not know this rank: it was restarted."""
        self._must_join = not self.refusal

    def send(self, frames: Sequence[Any]) -> bool:
        """Whether there was room for them."""
        return self.is_joined and self._put(frames)

    def receive(self) -> list[bytes] | None:
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def describe(self) -> str:
        """What is seen of the way to the relay, in words for an error."""
        host, port = self._relay
        if self.refusal:
            return f"the relay at {host}:{port} refused this job: {self.refusal}"
        if self.num_joins and not self.is_joined:
            return f"the connection to the relay at {host}:{port} was lost; {look_at(host, port)}"
        if self.num_joins:
            return f"connected to the relay at {host}:{port}"
        if self._num_failures or self._num_connections:
            return (
                f"something listens at {host}:{port}, and refused the handshake: the relay has not the keys of this "
                "run (codistill-relay --keys), or relay.key is that of another relay"
            )
        return look_at(host, port)

    def close(self, linger_s: float) -> None:
        """Waits until everything has left, at most ``linger_s`` seconds."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(linger_s * 1000))
        self._context.term()

    def _put(self, frames: Sequence[Any]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def _look(self) -> bool:
        broke = False
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._num_connections += event == zmq.EVENT_CONNECTED
            self._num_failures += bool(event & FAILURES)
            if event & (ENDS | GOES_ON):
                self._try_again_at = time.monotonic() + TRY_AGAIN_S if event & ENDS else None
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._must_join = not self.refusal
            elif event == zmq.EVENT_DISCONNECTED:
                broke, self.is_joined, self._must_join = True, False, False
        return broke
