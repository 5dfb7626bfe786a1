"""A line with a delay, for kernels without netem: what goes in comes out later, in order, no faster than a rate.

    python benchmarks/delay_proxy.py --forward 29600=node1:29601 --delay-ms 40 --mbit 20   # a TCP port, on any machine
    python benchmarks/delay_proxy.py --tun codistill0,codistill1 --delay-ms 40             # two interfaces, as root

The first forwards single ports, which is enough for ZeroMQ and for anything else whose ports are known. The second
joins two tun interfaces packet by packet, so that every port of every method is on the line, those that gloo picks at
random too, and TCP's own handshakes, windows and acknowledgements take their time as they do between two cities;
slow_links.py uses it. A delay does not throttle: any number of bytes may be on their way.
"""

import argparse
import asyncio
import collections
import contextlib
import fcntl
import functools
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

CHUNK_BYTES = 64 * 1024
MOST_WAITING_BYTES = 256 * 1024  # that have not left yet, because of the rate, before a sender is made to wait
LARGEST_PACKET = 64 * 1024 + 64
TUN_SET_INTERFACE, TUN_SET_OFFLOAD, TUN_SET_HEADER = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TUN, IFF_NO_PACKET_INFO, IFF_VNET_HEADER = 0x0001, 0x1000, 0x4000
CHECKSUM_AND_TCP4_SEGMENTS = 0x01 | 0x02  # as between virtual machines: packets of up to 64 KiB pass in one piece
VNET_HEADER_BYTES = 10


class Wire:
    """One direction of a line, shared by all that travels in it.

    Args:
        delay_s: of every byte, one way.
        mbit_per_s: None for no limit.
    """

    def __init__(self, delay_s: float, mbit_per_s: float | None = None):
        self.delay_s, self._mbit_per_s = delay_s, mbit_per_s
        self._free_at = 0.0  # when everything that was put in has left

    def arrival(self, num_bytes: int, now: float) -> float:
        """When bytes that are put in now come out, in seconds of the clock of ``now``."""
        self._free_at = max(self._free_at, now)
        if self._mbit_per_s is not None:
            self._free_at += num_bytes * 8e-6 / self._mbit_per_s
        return self._free_at + self.delay_s

    def busy_s(self, now: float) -> float:
        """Seconds until there is room for more: 0 nearly always without a rate."""
        if self._mbit_per_s is None:
            return 0.0
        return max(0.0, self._free_at - now - MOST_WAITING_BYTES * 8e-6 / self._mbit_per_s)


class Stream:
    """One sequence of bytes or packets on a wire: a queue of (due time, what).

    Args:
        wire: that it travels on.
        deliver: called with each piece when it is due, in order; ``None`` is the end of a connection.
    """

    def __init__(self, wire: Wire, deliver: Callable[[bytes | None], None]):
        self.wire = wire
        self._deliver = deliver
        self._queue: collections.deque[tuple[float, bytes | None]] = collections.deque()
        self._loop = asyncio.get_running_loop()

    def put(self, piece: bytes | None) -> None:
        """Send a piece on its way."""
        due = self.wire.arrival(len(piece or b""), self._loop.time())
        self._queue.append((due, piece))
        if len(self._queue) == 1:
            self._loop.call_at(due, self._come_out)

    def _come_out(self) -> None:
        now = self._loop.time() + 1e-4  # a timer may ring a little early
        while self._queue and self._queue[0][0] <= now:
            self._deliver(self._queue.popleft()[1])
        if self._queue:
            self._loop.call_at(self._queue[0][0], self._come_out)


class Forward(NamedTuple):
    """A port here, and where what connects to it is taken."""

    listen: int
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Forward":
        """``29600=node1:29601``.

        Raises:
            ValueError: it is none.
        """
        listen, _, target = text.partition("=")
        host, _, port = target.rpartition(":")
        if not (listen.isdigit() and host and port.isdigit()):
            raise ValueError(f"--forward is {text!r}; it must be PORT=HOST:PORT")
        return cls(int(listen), host, int(port))


async def forward_port(where: Forward, there: Wire, back: Wire) -> asyncio.Server:
    """Listen on a port of loopback; each connection is continued to its target, both ways on the line.

    Args:
        where: the port and its target.
        there: towards the target.
        back: from it.
    """

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(there.delay_s)  # of the handshake
        try:
            far_reader, far_writer = await asyncio.open_connection(where.host, where.port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(_carry(reader, far_writer, there), _carry(far_reader, writer, back))

    return await asyncio.start_server(on_connection, "127.0.0.1", where.listen)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wire: Wire) -> None:
    """One direction of a connection, to its end."""
    is_over = asyncio.get_running_loop().create_future()

    def deliver(piece: bytes | None) -> None:
        if piece is not None and not writer.is_closing():
            writer.write(piece)
        elif not is_over.done():
            is_over.set_result(None)

    stream = Stream(wire, deliver)
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(CHUNK_BYTES):
            while busy_s := wire.busy_s(asyncio.get_running_loop().time()):
                await asyncio.sleep(busy_s)
            stream.put(piece)
    stream.put(None)
    await is_over
    with contextlib.suppress(ConnectionError, OSError):
        await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def open_tun(name: str) -> int:
    """Make an interface whose packets are read and written here; it goes away with the descriptor.

    Raises:
        OSError: not root, no ``/dev/net/tun``, or a name that is taken.
    """
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PACKET_INFO | IFF_VNET_HEADER
    fcntl.ioctl(descriptor, TUN_SET_INTERFACE, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(descriptor, TUN_SET_HEADER, struct.pack("i", VNET_HEADER_BYTES))
    fcntl.ioctl(descriptor, TUN_SET_OFFLOAD, CHECKSUM_AND_TCP4_SEGMENTS)
    return descriptor


def join_tuns(first: int, second: int, there: Wire, back: Wire) -> None:
    """Every packet that one interface sends comes out of the other, later; forever. Needs a running loop."""
    for source, target, wire in ((first, second, there), (second, first, back)):
        stream = Stream(wire, functools.partial(_write_packet, target))
        asyncio.get_running_loop().add_reader(source, _read_packets, source, stream)


def _read_packets(source: int, stream: Stream) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            stream.put(os.read(source, LARGEST_PACKET))


def _write_packet(target: int, packet: bytes | None) -> None:
    with contextlib.suppress(OSError):  # a packet that is lost, or an interface that is not up yet
        os.write(target, packet or b"")


async def run(options: argparse.Namespace) -> None:
    """Until the process is ended."""
    there, back = (Wire(options.delay_ms / 1e3, options.mbit) for _ in range(2))
    servers = [await forward_port(where, there, back) for where in options.forward]
    if options.tun:
        first, second = (open_tun(name) for name in options.tun.split(","))
        join_tuns(first, second, there, back)
    print("ready", flush=True)
    await asyncio.Event().wait()
    del servers


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--forward", type=Forward.parse, action="append", default=[], metavar="PORT=HOST:PORT")
    parser.add_argument("--tun", default="", metavar="NAME,NAME", help="interfaces to make and to join")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--mbit", type=float, default=None, help="a second, each way; default: no limit")
    options = parser.parse_args()
    if not options.forward and not options.tun:
        parser.error("give --forward or --tun")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(options))


if __name__ == "__main__":
    main()
