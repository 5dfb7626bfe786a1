"""Owns two hosts and the link between them: two network namespaces, the rate between them limited at both ends.

They are joined by a veth pair, or, where the link is to have a delay, by two tun interfaces whose packets
delay_proxy.py takes from one to the other: netem is missing from many kernels, and a token bucket (tbf) limits the rate
alone. Without root or iproute2 both hosts are loopback, whose rate cannot be limited and whose counters are of all.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType

BURST_S = 0.002  # what may pass at once after a pause, in seconds of the link's rate
QUEUE_S = 0.05  # longest queue before a packet is dropped, in seconds of the rate ...
QUEUE_BYTES = 128_000  # ... or this much, as home routers have
LARGEST_PACKET = 3_000
ETHERNET_HEADER = 14  # bytes, which a tun interface lacks
PACKET_HEADERS = ETHERNET_HEADER + 20 + 32  # bytes of Ethernet, IP, and TCP with time stamps


@dataclasses.dataclass(frozen=True)
class Host:
    """Where one model runs.

    Attributes:
        address: that the other host reaches it by.
        interface: that it sends by.
        prefix: of every command that is to run there.
    """

    address: str
    interface: str
    prefix: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sent:
    """What an interface has sent so far.

    Attributes:
        num_bytes: with the headers of Ethernet and TCP/IP.
        num_packets: acknowledgements among them.
        packet_headers: bytes of each packet that are no payload.
    """

    num_bytes: int
    num_packets: int
    packet_headers: int = PACKET_HEADERS

    def since(self, before: "Sent") -> "Sent":
        """What was sent after ``before``."""
        return Sent(self.num_bytes - before.num_bytes, self.num_packets - before.num_packets, self.packet_headers)

    @property
    def payload_bytes(self) -> int:
        """Without the headers of packets."""
        return self.num_bytes - self.num_packets * self.packet_headers


class Loopback:
    """Two hosts that are both this machine.

    Attributes:
        hosts: the two.
        is_limited: whether rates can be set and bytes counted.
        why: what is missing for more, in words.
        names: of the namespaces.
        delay_ms: of the link, one way.
    """

    is_limited = False
    delay_ms = 0.0

    def __init__(self, why: str = ""):
        self.hosts = [Host("127.0.0.1", "lo"), Host("127.0.0.1", "lo")]
        self.why = why
        self.names: list[str] = []

    def set_rate(self, mbit_per_s: float | None) -> None:
        """Limit both directions; None is unlimited.

        Raises:
            ValueError: this link cannot be limited.
        """
        if mbit_per_s is not None:
            raise ValueError(f"the rate of loopback cannot be limited to {mbit_per_s} Mbit/s")

    def sent(self, pids: list[int]) -> list[Sent] | None:
        """What each host has sent by its interface so far.

        Args:
            pids: a running process on each host, through which its counters are read.

        Returns:
            one for each host; None where the counters are not those of the hosts alone.

        Raises:
            OSError: one of the processes is gone.
        """
        return None

    def __enter__(self) -> "Loopback":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was made. May be called twice."""


class Namespaces(Loopback):
    """Two network namespaces joined by a veth pair, or with a delay by two tun interfaces.

    Args:
        delay_ms: one way.

    Raises:
        subprocess.CalledProcessError: they cannot be made; nothing is left behind.
    """

    is_limited = True

    def __init__(self, delay_ms: float = 0.0) -> None:
        super().__init__()
        self.delay_ms = delay_ms
        self._proxy: subprocess.Popen[str] | None = None
        self.names = [f"links{os.getpid()}-{number}" for number in range(2)]
        ends = [f"lk{os.getpid()}-{number}" for number in range(2)]
        self.hosts = [
            Host(f"10.78.0.{number + 1}", end, ("ip", "netns", "exec", name))
            for number, (name, end) in enumerate(zip(self.names, ends, strict=True))
        ]
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            if delay_ms:
                self._proxy = _start_proxy(ends, delay_ms)
            else:
                _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end in zip(self.names, ends, strict=True):
                _run("ip", "link", "set", end, "netns", name)
            for name, host in zip(self.names, self.hosts, strict=True):
                _run("ip", "-n", name, "addr", "add", f"{host.address}/24", "dev", host.interface)
                _run("ip", "-n", name, "link", "set", host.interface, "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
            self.set_rate(1)  # so that a kernel without tbf is noticed here
            self.set_rate(None)
        except BaseException:
            _run_quietly("ip", "link", "del", ends[0])  # where it has not been moved yet
            self.close()
            raise

    def set_rate(self, mbit_per_s: float | None) -> None:
        for host in self.hosts:
            queue = [*host.prefix, "tc", "qdisc"]
            _run_quietly(*queue, "del", "dev", host.interface, "root")
            if mbit_per_s is not None:
                bytes_per_s = mbit_per_s * 1e6 / 8
                burst = round(max(LARGEST_PACKET, bytes_per_s * BURST_S))
                limit = round(max(QUEUE_BYTES, bytes_per_s * QUEUE_S))
                shape = f"tbf rate {round(mbit_per_s * 1e6)}bit burst {burst}b limit {limit}b".split()
                _run(*queue, "add", "dev", host.interface, "root", *shape)

    def sent(self, pids: list[int]) -> list[Sent] | None:
        headers = PACKET_HEADERS - (ETHERNET_HEADER if self._proxy is not None else 0)
        return [
            dataclasses.replace(_sent(pid, host.interface), packet_headers=headers)
            for pid, host in zip(pids, self.hosts, strict=True)
        ]

    def close(self) -> None:
        if self._proxy is not None:
            self._proxy.kill()
            self._proxy.wait()
        for name in self.names:
            _run_quietly("ip", "netns", "del", name)


def make_link(delay_ms: float = 0.0) -> Loopback:
    """Two namespaces, or loopback where they cannot be made (``why`` says what is missing).

    Args:
        delay_ms: of the link, one way.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return Loopback("not root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return Loopback(f"no {tool}: iproute2 is not installed")
    try:
        return Namespaces(delay_ms)
    except subprocess.CalledProcessError as error:
        return Loopback(f"{' '.join(error.cmd)}: {(error.stderr or '').strip()}")


def _start_proxy(ends: list[str], delay_ms: float) -> "subprocess.Popen[str]":
    """What joins two tun interfaces, once they are there.

    Raises:
        subprocess.CalledProcessError: they cannot be made.
    """
    proxy = Path(__file__).with_name("delay_proxy.py")
    command = [sys.executable, str(proxy), "--tun", ",".join(ends), "--delay-ms", str(delay_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        _, error = process.communicate()
        raise subprocess.CalledProcessError(process.returncode or 1, command, stderr=error)
    return process


def _sent(pid: int, interface: str) -> Sent:
    """From the counters of /sys/class/net/INTERFACE/statistics, seen without entering the namespace."""
    with open(f"/proc/{pid}/net/dev") as file:
        for line in file:
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return Sent(*map(int, counters.split()[8:10]))
    raise OSError(f"process {pid} has no interface {interface} (any more)")


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _run_quietly(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=False)
