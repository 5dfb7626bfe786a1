"""Owns what ZeroMQ tells about the way to one peer until it is open: connections made, handshakes that failed."""

import zmq
from zmq.utils.monitor import recv_monitor_message

FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | FAILURES


class Way:
    """Watches a socket that connects to one peer; at the first handshake that succeeds it looks no further.

    Args:
        context: of the socket.
        push: the socket, before it connects.
        name: to tell it from others of the context.

    Attributes:
        is_open: a handshake has succeeded.
        num_connections: that came about, whoever listens there.
        num_failures: handshakes that failed.
    """

    def __init__(self, context: zmq.Context, push: zmq.Socket, name: str):
        self.is_open = False
        self.num_connections = self.num_failures = 0
        self._push = push
        address = f"inproc://way-{name}"
        push.monitor(address, EVENTS)
        self._events: zmq.Socket | None = context.socket(zmq.PAIR)
        self._events.set_hwm(0)  # ZeroMQ's own thread would wait for room while a model validates
        self._events.connect(address)

    def look(self) -> None:
        """Take in what has happened since the last call."""
        while self._events is not None and self._events.poll(0):
            event = recv_monitor_message(self._events)["event"]
            self.num_connections += event == zmq.EVENT_CONNECTED
            self.num_failures += bool(event & FAILURES)
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_open = True
                self.close()

    def close(self) -> None:
        """Look no further. May be called twice, but only while the socket is open."""
        if self._events is not None:
            self._push.monitor(None, 0)  # type: ignore[arg-type]
            self._events.close(linger=0)
            self._events = None
