"""Owns the way to one peer: what ZeroMQ tells of it, and another try where ZeroMQ has given up."""

import contextlib
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
# After some refusals ZeroMQ never connects again: the right process may start there later, the keys be on their way.
ENDS = FAILURES | zmq.EVENT_DISCONNECTED
GOES_ON = zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_SUCCEEDED
TRY_AGAIN_S = 2.0


class Way:
    """Connects a socket to one peer, and watches it.

    Args:
        context: of the socket.
        push: the socket.
        endpoint: of the peer.
        name: to tell it from others of the context.

    Attributes:
        is_open: a handshake has succeeded.
        num_connections: that came about, whoever listens there.
        num_failures: handshakes that failed.
    """

    def __init__(self, context: zmq.Context, push: zmq.Socket, endpoint: str, name: str):
        self.is_open = False
        self.num_connections = self.num_failures = 0
        self._push, self._endpoint = push, endpoint
        self._try_again_at: float | None = None
        address = f"inproc://way-{name}"
        push.monitor(address, zmq.EVENT_CONNECTED | ENDS | GOES_ON)
        self._events: zmq.Socket | None = context.socket(zmq.PAIR)
        self._events.set_hwm(0)  # ZeroMQ's own thread would wait for room while a model validates
        self._events.connect(address)
        push.connect(endpoint)

    def look(self) -> None:
        """Take in what has happened since the last call; where ZeroMQ has given up, connect again."""
        if self._events is None:
            return
        while self._events.poll(0):
            event = recv_monitor_message(self._events)["event"]
            self.num_connections += event == zmq.EVENT_CONNECTED
            self.num_failures += bool(event & FAILURES)
            self.is_open |= event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if event & (ENDS | GOES_ON):
                self._try_again_at = time.monotonic() + TRY_AGAIN_S if event & ENDS else None
        if self._try_again_at is not None and time.monotonic() >= self._try_again_at:
            self._try_again_at = None
            with contextlib.suppress(zmq.ZMQError):
                self._push.disconnect(self._endpoint)
            self._push.connect(self._endpoint)

    def close(self) -> None:
        """Look no further. May be called twice, but only while the socket is open."""
        if self._events is not None:
            self._push.monitor(None, 0)  # type: ignore[arg-type]
            self._events.close(linger=0)
            self._events = None
