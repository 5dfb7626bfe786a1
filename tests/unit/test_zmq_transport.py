"""The sockets: who listens where, and what the other side cannot do to us. Real sockets on loopback."""

import contextlib
import socket
import threading
import time

import pytest
import torch
import zmq
from helpers import free_ports

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.transports.addresses import parse_addresses
from fairseq_codistill.coordinator.transports.zeromq import QUEUE_LENGTH, ZeroMqTransport
from fairseq_codistill.coordinator.wire import Kind, Message, WireError

HEADER = b"header"


@contextlib.contextmanager
def pair(**changes):
    """Transports of models 0 and 1; ``changes`` are for model 1's."""
    ports = free_ports(2)
    zero = ZeroMqTransport(("127.0.0.1", ports[0]), {1: ("127.0.0.1", ports[1])})
    one = ZeroMqTransport(("127.0.0.1", ports[1]), {0: ("127.0.0.1", ports[0])}, **changes)
    try:
        yield zero, one
    finally:
        zero.close(0)
        one.close(0)


def until(condition, seconds=30.0):
    """What ``condition()`` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never became true"
    return value


def pass_over(sender, receiver, payload):
    """Send to model 1 and wait for it there."""
    until(lambda: sender.send(1, HEADER, payload))
    header, received = until(lambda: receiver.receive(1.0))
    assert bytes(header) == HEADER
    return bytes(received)


@contextlib.contextmanager
def stranger(transport):
    """A socket that sends whatever it likes to ``transport``."""
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.connect(transport.endpoint)
    try:
        yield push
    finally:
        context.destroy(linger=0)


class TestAddresses:
    def test_ranks_get_consecutive_ports(self):
        assert parse_addresses("a:10, b:20", 2, 2) == [[("a", 10), ("a", 11)], [("b", 20), ("b", 21)]]

    def test_a_model_may_span_hosts(self):
        table = parse_addresses("a+b:10,c+d:10", 2, 4)
        assert table[0] == [("a", 10), ("a", 11), ("b", 10), ("b", 11)]

    @pytest.mark.parametrize(
        ("text", "ranks", "message"),
        [
            ("a:10", 1, "2 models need 2"),
            ("a:10,b", 1, "'b' is not HOST:PORT"),
            ("a:10,tcp://b:20", 1, "'tcp://b:20' is not HOST:PORT.*without a scheme"),
            ("a:10,b :20", 1, "'b :20' is not HOST:PORT"),
            ("a:10,münchen.de:20", 1, "'münchen.de:20' is not HOST:PORT"),
            ("a:10,*:20", 1, r"'\*:20' is not HOST:PORT"),
            ("a:10,b:http", 1, "'b:http' is not HOST:PORT"),
            ("a:10,b:²", 1, "'b:²' is not HOST:PORT"),
            ("a:10,b:-1", 1, "'b:-1' is not HOST:PORT"),
            ("a:10,b:0", 1, "'b:0' is not HOST:PORT"),
            ("a:10,b:65536", 1, "'b:65536' is not HOST:PORT"),
            ("a:10,:20", 1, "':20' is not HOST:PORT"),
            ("a:10,b+:20", 2, r"'b\+:20' is not HOST:PORT"),
            ("a:10,b+c:20", 3, "3 ranks do not divide"),
            ("a:10,a:11", 2, "both listen on a:11"),
            ("a:10,b:65535", 2, "past port 65535"),
            ("[::1]:10,b:10", 1, r"'\[::1\]:10' is IPv6, which is not supported; give an IPv4 address"),
            ("a:10,fe80::1:10", 1, "is IPv6"),
            ("a:10,::1", 1, "'::1' is IPv6"),
        ],
    )
    def test_what_cannot_work_is_named(self, text, ranks, message):
        with pytest.raises(ConfigError, match=message):
            parse_addresses(text, 2, ranks)


class TestListening:
    def test_a_port_in_use_is_an_error_that_says_what_to_do(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(ConfigError, match="cannot listen on .*free the port.*--codistill-bind"):
                ZeroMqTransport(taken.getsockname(), {})

    def test_a_host_that_cannot_be_resolved_is_named(self, monkeypatch):
        def no_such_host(name):
            raise socket.gaierror("unknown")

        monkeypatch.setattr(socket, "gethostbyname", no_such_host)
        with pytest.raises(ConfigError, match="'node7' has no IPv4 address that can be found out"):
            ZeroMqTransport(("node7", 10), {})

    def test_a_host_name_that_means_loopback_is_refused_when_others_must_reach_it(self, monkeypatch):
        monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
        with pytest.raises(ConfigError, match="'node0' resolves to 127.0.1.1.*--codistill-bind"):
            ZeroMqTransport(("node0", 10), {1: ("node1", 10)})

    def test_an_address_to_bind_replaces_the_name_that_others_use(self):
        (port,) = free_ports(1)
        transport = ZeroMqTransport(("a-name-nobody-resolves", port), {}, bind_host="127.0.0.1")
        assert transport.endpoint == f"tcp://127.0.0.1:{port}"
        transport.close(0)

    def test_a_closed_address_can_be_used_again_at_once(self):
        (port,) = free_ports(1)
        for _ in range(3):
            transport = ZeroMqTransport(("127.0.0.1", port), {})
            transport.close(0)
            transport.close(0)


class TestMoving:
    @pytest.mark.parametrize("size", [0, 1, 10_000, 10_000_000])
    def test_every_byte_arrives(self, size):
        payload = bytes(range(256)) * (size // 256 + 1)
        with pair() as (zero, one):
            assert pass_over(zero, one, payload[:size]) == payload[:size]

    def test_nothing_arrives_within_the_time_given(self):
        with pair() as (zero, _):
            assert zero.receive(0.0) is None
            assert zero.receive(0.01) is None

    def test_a_peer_that_reads_gets_everything_however_fast_it_is_sent(self):
        with pair() as (zero, one):
            pass_over(zero, one, b"connected")
            for number in range(50 * QUEUE_LENGTH):
                assert zero.send(1, HEADER, b"%d" % number), f"message {number} was dropped"
                assert bytes(one.receive(20.0)[1]) == b"%d" % number

    def test_a_peer_that_never_came_takes_no_memory(self):
        ports = free_ports(2)
        alone = ZeroMqTransport(("127.0.0.1", ports[0]), {1: ("127.0.0.1", ports[1])})
        assert not any(alone.send(1, HEADER, b"x") for _ in range(100))
        alone.close(5.0)

    def test_a_peer_that_does_not_read_blocks_nobody(self):
        payload = bytes(4_000_000)  # more than the kernel's buffers take
        with pair() as (zero, one):
            pass_over(zero, one, b"connected")
            sent = 0
            while zero.send(1, HEADER, payload):
                sent += 1
                assert sent < 100 * QUEUE_LENGTH, "the queue has no end"
            assert sent >= 1
            until(lambda: one.receive(0.1) is not None and zero.send(1, HEADER, b"room again"))

    def test_frames_that_are_not_two_are_refused_and_the_next_message_is_read(self):
        with pair() as (zero, one), stranger(one) as push:
            for frames in ([b"one"], [b"one", b"two", b"three"]):
                push.send_multipart(frames)
                with pytest.raises(WireError, match=f"message of {len(frames)} frames"):
                    until(lambda: one.receive(1.0))
            assert pass_over(zero, one, b"fine") == b"fine"


class TestHostileSenders:
    def test_a_message_over_the_limit_never_arrives_and_the_next_one_does(self):
        with pair(max_message_bytes=1000) as (zero, one):
            assert pass_over(zero, one, b"x" * 1000) == b"x" * 1000
            until(lambda: zero.send(1, HEADER, b"x" * 1001))

            def small_one_arrives():  # the connection is dropped and comes back: what is sent meanwhile is lost
                zero.send(1, HEADER, b"small")
                return one.receive(0.05)

            assert bytes(until(small_one_arrives)[1]) == b"small"

    def test_bytes_that_are_not_zeromq_harm_nobody(self):
        with pair() as (zero, one):
            host, port = one.endpoint.removeprefix("tcp://").split(":")
            for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, b"\x00" * 1000, b""):
                with socket.create_connection((host, int(port))) as raw:
                    raw.sendall(noise)
            assert pass_over(zero, one, b"fine") == b"fine"

    def test_thousands_that_knock_between_two_looks_hold_up_neither_messages_nor_the_end(self):
        with pair() as (zero, one):
            pass_over(zero, one, b"met")
            host, port = one.endpoint.removeprefix("tcp://").split(":")
            try:
                for _ in range(2500):  # more than ZeroMQ would keep to tell us of, and the kernel until they are taken
                    with socket.create_connection((host, int(port)), timeout=10) as raw:
                        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
                until(lambda: zero.send(1, HEADER, b"fine"))
                assert bytes(one._inbound.get(20.0).payload) == b"fine"
            except BaseException:
                one._look()  # or the end would hang, and this process with it
                raise
            one.close(0)


def test_hundreds_of_fast_exchanges_lose_nothing_while_strangers_knock():
    def predictions(model, position):
        return torch.full((2, 3), float(1000 * model + position))

    def job(model, transport, outcomes):
        config = CodistillationConfig(
            codistill_num_models=2, codistill_model_index=model, codistill_addresses="a:1,b:2", codistill_codec="fp32"
        )
        coordinator = Coordinator(config, transport=transport)
        coordinator.meet(Identity(settings={}, remarks={}, parameters_digest=str(model), seed=model))
        exchanges = []
        for position in range(300):
            coordinator.post(BatchKey(1, position), bytes(16), predictions(model, position))
            exchanges.append(coordinator.collect())
        outcomes[model] = exchanges, coordinator.meter

    with pair() as (zero, one), stranger(zero) as push:
        foreign = Message(Kind.PREDICTIONS, 1, 0, b"not-ours", b"poison", BatchKey(1, 0))
        push.send_multipart([b"noise", b"noise"])
        push.send_multipart([foreign.header(), foreign.payload])
        push.send(b"one frame")
        until(lambda: zero._inbound._inbox.qsize())
        outcomes = {}
        threads = [
            threading.Thread(target=job, args=(model, transport, outcomes), daemon=True)
            for model, transport in enumerate((zero, one))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a model hangs"
    for model in range(2):
        exchanges, meter = outcomes[model]
        for position, exchange in enumerate(exchanges):
            assert torch.equal(exchange.predictions[1 - model], predictions(1 - model, position))
        assert meter.delivered_messages == 300
    assert outcomes[0][1].rejected_messages == 3
    assert outcomes[1][1].rejected_messages == 0


def test_a_queue_to_a_peer_that_does_not_read_holds_the_messages_of_several_updates_but_not_all_bytes():
    ports = free_ports(2)
    addresses = {model: ("127.0.0.1", port) for model, port in enumerate(ports)}
    sender = ZeroMqTransport(addresses[0], {1: addresses[1]}, messages_per_update=32, max_queue_bytes=20 * 2**20)
    silent = ZeroMqTransport(addresses[1], {0: addresses[0]})  # connected, and never asked for a message
    deadline = time.monotonic() + 20
    while not sender.send(1, b"hello", b""):
        assert time.monotonic() < deadline
    assert all(sender.send(1, b"header", b"x") for _ in range(200)), "a burst of parts and micro-batches is refused"
    large = 0
    while sender.send(1, b"header", bytes(2**20)):
        large += 1
        assert large < 200, "bytes have no bound"
    sender.close(0)
    silent.close(0)
