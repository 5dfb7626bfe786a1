"""The delayed line of the benchmarks, with real sockets: later, in order, whole, and no slower for it."""

import hashlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import free_ports

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from delay_proxy import Forward, Wire  # noqa: E402 - benchmarks are no package


@pytest.fixture
def echo():
    """The port of a server that answers every byte with itself."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        for number in itertools.count():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), name=f"echo{number}", daemon=True).start()

    def answer(connection):
        with connection:
            while piece := connection.recv(1 << 16):
                connection.sendall(piece)

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


@pytest.fixture
def line(echo):
    """Settings of the proxy -> a port that is connected with the echo through it."""
    running = []

    def start(*settings):
        (port,) = free_ports(1)
        command = [sys.executable, str(BENCHMARKS / "delay_proxy.py"), "--forward", f"{port}=127.0.0.1:{echo}"]
        running.append(subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "ready\n"
        return port

    yield start
    for process in running:
        process.kill()
        process.communicate()


def there_and_back(port, data):
    """What comes back until the far end closes, and seconds since it was sent."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        started = time.monotonic()
        sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        sender.start()
        found = bytearray()
        while piece := connection.recv(1 << 16):
            found += piece
        sender.join()
        return bytes(found), time.monotonic() - started


def test_everything_comes_whole_and_in_order_two_delays_later(line):
    data = os.urandom(3_000_000)
    found, seconds = there_and_back(line("--delay-ms", "60"), data)
    assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest()
    assert seconds >= 0.12


def test_a_delay_lets_any_number_of_bytes_be_on_their_way():
    wire = Wire(delay_s=0.1)
    arrivals = [wire.arrival(65536, now=0.0) for _ in range(1000)]  # 64 MiB at one moment
    assert arrivals == [0.1] * 1000
    assert wire.busy_s(0.0) == 0.0


def test_a_rate_spaces_what_leaves_and_makes_a_fast_sender_wait():
    wire = Wire(delay_s=0.1, mbit_per_s=8)  # a megabyte a second
    assert [wire.arrival(500_000, now=0.0) for _ in range(2)] == pytest.approx([0.6, 1.1])
    assert wire.busy_s(0.0) == pytest.approx(1.0 - 0.262144)
    assert wire.arrival(0, now=5.0) == pytest.approx(5.1)  # an idle line owes nothing


def test_a_rate_is_shared_by_all_connections_of_a_direction(line):
    port = line("--mbit", "16")  # 2 MB a second each way
    took = []

    def send():
        took.append(there_and_back(port, bytes(500_000))[1])

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(took) >= 0.5


def test_a_target_that_is_not_there_ends_the_connection(line):
    (nobody,) = free_ports(1)
    (other,) = free_ports(1)
    port = line("--delay-ms", "1", "--forward", f"{other}=127.0.0.1:{nobody}")
    with socket.create_connection(("127.0.0.1", other)) as connection:
        assert connection.recv(1) == b""
    assert there_and_back(port, b"still here")[0] == b"still here"


@pytest.mark.parametrize("text", ["29600", "29600=node1", "x=node1:1", "1=:2"])
def test_a_port_that_cannot_be_read_is_an_error_that_quotes_it(text):
    with pytest.raises(ValueError, match="must be PORT=HOST:PORT"):
        Forward.parse(text)
