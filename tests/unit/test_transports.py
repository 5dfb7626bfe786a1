"""One suite for every transport: frames arrive whole and in order, nothing blocks, and the dead hold nobody up."""

import contextlib
import queue
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import relaying
from helpers import environment, free_ports

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.transports.addresses import bindable
from fairseq_codistill.coordinator.transports.choice import make_transport
from fairseq_codistill.coordinator.transports.gloo import GlooTransport
from fairseq_codistill.coordinator.transports.outbound import Outbound, _Line, _Parcel
from fairseq_codistill.coordinator.transports.reach import look_at

TRANSPORTS = ["zmq", "gloo"]


def config(name, model, addresses, **changes):
    values = {"codistill_transport": name, "codistill_start_timeout": 20.0, **changes}
    return CodistillationConfig(
        codistill_num_models=len(addresses.split(",")), codistill_model_index=model, codistill_addresses=addresses,
        **values,
    )  # fmt: skip


@pytest.fixture(params=[*TRANSPORTS, "relay"])
def network(request, tmp_path):
    """Makes the transports of n models in this process; closes them at the end."""
    opened, stack = [], contextlib.ExitStack()

    def make(num_models, order=None):
        addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))
        made = {}
        if request.param == "relay":
            pytest.importorskip("nacl")
            keys = relaying.key_set(tmp_path / "keys", num_models)
            relay = stack.enter_context(relaying.running_relay(tmp_path, keys))
        for model in order or range(num_models):
            if request.param == "relay":
                made[model] = relaying.transport(relay.address, keys, model, num_models)
            else:
                made[model] = make_transport(config(request.param, model, addresses), 0, 1)
            opened.append(made[model])
        return [made[model] for model in range(num_models)]

    make.name = request.param
    yield make
    for transport in opened:
        transport.close(0)
    stack.close()


def send(transport, peer, header, payload, timeout_s=20.0):
    """Until it is taken: the connection may still be on its way."""
    deadline = time.monotonic() + timeout_s
    while not transport.send(peer, header, payload):
        assert time.monotonic() < deadline, "never connected"
        time.sleep(0.01)


def received(transport, timeout_s=20.0):
    frames = transport.receive(timeout_s)
    assert frames is not None, "nothing came"
    return bytes(frames[0]), bytes(frames[1])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_frames_arrive_whole_and_in_order_both_ways_whoever_starts_first(network, order):
    ends = network(2, order)
    for number in range(30):
        for end in (0, 1):
            send(ends[end], 1 - end, b"header %d" % number, bytes([number]) * number)
            assert received(ends[1 - end]) == (b"header %d" % number, bytes([number]) * number)


@pytest.mark.parametrize("size", [0, 1, 7, 2**16 + 1, 40 * 2**20])
def test_payloads_of_any_size(network, size):
    ends = network(2)
    payload = bytes(range(256)) * (size // 256 + 1)
    send(ends[0], 1, b"h" * 84, memoryview(payload)[:size])
    header, found = received(ends[1])
    assert header == b"h" * 84
    assert found == payload[:size]


def test_three_models_hear_each_of_the_others(network):
    ends = network(3)
    for model in range(3):
        for peer in range(3):
            if peer != model:
                send(ends[model], peer, b"%d to %d" % (model, peer), b"")
    for model in range(3):
        assert {received(ends[model])[0] for _ in range(2)} == {
            b"%d to %d" % (peer, model) for peer in range(3) if peer != model
        }


def test_sending_never_blocks_and_drops_what_nobody_reads(network):
    ends = network(2)
    send(ends[0], 1, b"first", b"")
    started = time.monotonic()
    taken = sum(ends[0].send(1, b"header", bytes(2**22)) for _ in range(200))
    assert time.monotonic() - started < 10
    assert taken < 200
    assert received(ends[1]) == (b"first", b"")


def test_receiving_without_a_message_waits_as_long_as_asked_and_no_longer(network):
    ends = network(2)
    send(ends[1], 0, b"connected", b"")
    received(ends[0])
    started = time.monotonic()
    assert ends[0].receive(0.0) is None
    assert ends[0].receive(0.3) is None
    assert 0.2 < time.monotonic() - started < 5


def test_what_is_sent_just_before_closing_arrives_and_closing_twice_is_fine(network):
    ends = network(2)
    send(ends[0], 1, b"hello", b"")
    send(ends[0], 1, b"goodbye", b"x" * 2**20)
    started = time.monotonic()
    ends[0].close(10)
    ends[0].close(10)
    assert time.monotonic() - started < 5
    assert received(ends[1])[0] == b"hello"
    assert received(ends[1])[0] == b"goodbye"


def test_an_interrupt_ends_a_close_that_lingers_for_a_peer_that_does_not_read(network):
    if network.name == "relay":
        pytest.skip("what is taken has left for the relay, which reads")
    ends = network(2)
    send(ends[0], 1, b"connected", b"")
    full_at = time.monotonic() + 1.0
    while time.monotonic() < full_at:  # all buffers on the way are
        if ends[0].send(1, b"header", bytes(2**22)):
            full_at = time.monotonic() + 1.0
    closing = threading.Thread(target=ends[0].close, args=(300,), daemon=True)
    closing.start()
    closing.join(0.5)
    assert closing.is_alive()
    ends[0].interrupt()
    closing.join(30)
    assert not closing.is_alive()
    while ends[1].receive(1.0) is not None:  # what lingers gets an end
        pass


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("model", [0, 1])
def test_an_interrupt_ends_the_search_for_a_peer(name, model):
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    transport = make_transport(config(name, model, addresses, codistill_start_timeout=300.0), 0, 1)
    before = set(threading.enumerate())
    transport.interrupt()
    transport.close(300)
    for thread in getattr(transport, "_threads", []):
        assert thread in before
        thread.join(30)
        assert not thread.is_alive()
    assert transport.lost_peers() == {}


PEER = """
import sys, time
from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.transports.choice import make_transport
name, addresses, what = sys.argv[1:]
transport = make_transport(CodistillationConfig(
    codistill_num_models=2, codistill_model_index=1, codistill_addresses=addresses, codistill_transport=name,
    codistill_start_timeout=20.0), 0, 1)
while not transport.send(0, b"hello", b""):
    time.sleep(0.01)
assert bytes(transport.receive(20)[0]) == b"hello to you"
if what == "end":
    transport.close(5)
    sys.exit(0)
print("met", flush=True)
time.sleep(100)
"""


def run_peer(name, addresses, what):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PEER), name, addresses, what], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("what", ["kill", "end"])
def test_a_peer_that_dies_or_ends_holds_nobody_up(name, what):
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    transport = make_transport(config(name, 0, addresses), 0, 1)
    peer = run_peer(name, addresses, what)
    try:
        assert received(transport)[0] == b"hello"
        send(transport, 1, b"hello to you", b"")
        if what == "kill":
            assert peer.stdout.readline() == "met\n"
            peer.kill()
        output, _ = peer.communicate(timeout=30)
        assert peer.returncode == (-9 if what == "kill" else 0), output  # its threads do not keep it from ending
        deadline, lost = time.monotonic() + 10, {}
        is_lost = name == "gloo" and what == "kill"  # who ends in order has said so
        while is_lost and not lost and time.monotonic() < deadline:
            transport.send(1, b"are you there", b"")
            assert transport.receive(0.05) is None
            lost = transport.lost_peers()
        assert lost.keys() == ({1} if is_lost else set())
        started = time.monotonic()
        for _ in range(50):
            transport.send(1, b"header", bytes(2**16))
        assert time.monotonic() - started < 5
    finally:
        peer.kill()
        peer.stdout.close()
        transport.close(0)


@pytest.mark.parametrize("bind", ["lo", "127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_where_to_listen_is_an_interface_or_an_address(name, bind):
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    ends = [
        make_transport(config(name, model, addresses, codistill_bind=bind, codistill_keys="none"), 0, 1)
        for model in range(2)
    ]
    try:
        for model, end in enumerate(ends):
            send(end, 1 - model, b"header", b"payload")
            assert received(ends[1 - model]) == (b"header", b"payload")
    finally:
        for end in ends:
            end.close(0)


def test_a_gloo_peer_that_never_comes_is_lost_after_the_start_timeout():
    low, high = (f"127.0.0.1:{port}" for port in free_ports(2))
    for model in (0, 1):
        transport = make_transport(config("gloo", model, f"{low},{high}", codistill_start_timeout=1.0), 0, 1)
        deadline, lost = time.monotonic() + 20, {}
        while not lost and time.monotonic() < deadline:
            time.sleep(0.1)
            lost = transport.lost_peers()
        assert lost.keys() == {1 - model}
        assert not transport.send(1 - model, b"header", b"")
        transport.close(0)


def test_gloo_asks_for_a_word_that_traffic_is_in_the_clear():
    for keys, where in (("", "10.0.0.1:29600,10.0.0.2:29600"), ("folder", "127.0.0.1:29600,127.0.0.1:29700")):
        with pytest.raises(ConfigError, match="neither encrypted nor does it ask who connects.*--codistill-keys none"):
            make_transport(config("gloo", 0, where, codistill_keys=keys), 0, 1)


def test_a_gloo_model_that_cannot_reach_its_own_name_is_told_at_once():
    port, other = free_ports(2)
    with pytest.raises(ConfigError, match="'no-such-host.invalid' has no IPv4 address"):
        make_transport(config("gloo", 0, f"no-such-host.invalid:{port},127.0.0.1:{other}", codistill_keys="none"), 0, 1)


def test_a_gloo_model_may_be_known_by_an_address_that_its_own_host_cannot_reach():
    """Of a gateway in front of it, with --codistill-bind for what is behind."""
    port, other = free_ports(2)
    changes = {"codistill_start_timeout": 1.0, "codistill_bind": "127.0.0.1", "codistill_keys": "none"}
    began = time.monotonic()
    transport = make_transport(config("gloo", 0, f"192.0.2.1:{port},127.0.0.1:{other}", **changes), 0, 1)
    assert time.monotonic() - began < 10
    transport.close(0)


def test_a_gloo_port_in_use_is_named():
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    first = make_transport(config("gloo", 0, addresses), 0, 1)
    with pytest.raises(ConfigError, match=addresses.split(",")[0]):
        make_transport(config("gloo", 0, addresses), 0, 1)
    first.close(0)


@pytest.mark.parametrize("at_once", [1, 3])
def test_all_parts_of_a_batch_have_room_however_large_they_are(at_once):
    """Or else both sides would wait for a part that neither could send. Here nothing leaves: what is queued stays."""
    size, most = 80 * 2**12, 100 * 2**12
    outbound, line = Outbound({}, max_messages=10, max_bytes=most, at_once=at_once), _Line(is_stuck=True)
    gloo = GlooTransport.__new__(GlooTransport)
    gloo._outboxes, gloo._bytes_lock = {1: queue.Queue(10)}, threading.Lock()
    gloo._queued_bytes, gloo._queued = {1: 0}, {1: 0}
    gloo._max_queue_bytes, gloo._at_once = most, at_once
    over_zmq, over_gloo = [], []
    for _ in range(5):
        if has_room := outbound._has_room(line, size):
            line.queued.append(_Parcel(size))
        over_zmq.append(has_room)
        over_gloo.append(gloo.send(1, b"header", bytes(size)))
    assert over_zmq == over_gloo == [number < at_once for number in range(5)]


def test_news_leave_behind_a_message_that_is_larger_than_the_queue():
    """A hello, a goodbye, the word that a checkpoint has come: lost, each would cost the peer a wait."""
    outbound, line = Outbound({}, max_messages=10, max_bytes=2**20), _Line(is_stuck=True)
    line.queued.append(_Parcel(2**21))
    gloo = GlooTransport.__new__(GlooTransport)
    gloo._outboxes, gloo._bytes_lock = {1: queue.Queue(10)}, threading.Lock()
    gloo._queued_bytes, gloo._queued = {1: 2**21}, {1: 1}
    gloo._max_queue_bytes, gloo._at_once = 2**20, 1
    for num_bytes, has_room in ((0, True), (300, True), (2**20, False)):
        assert outbound._has_room(line, num_bytes) == has_room
        assert gloo.send(1, b"header", bytes(num_bytes)) == has_room


def test_a_transport_has_room_for_as_many_parts_as_the_options_make_of_a_batch():
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    for parts, most in (("1", 1), ("2", 2), ("auto", 4)):
        transport = make_transport(config("zmq", 0, addresses, codistill_parts=parts), 0, 1)
        assert transport._outbound._at_once == most
        transport.close(0)


@pytest.mark.parametrize("host", ["node1..lan", "a" * 64 + ".lan", "é..x"])
def test_a_name_that_is_none_is_named_and_no_traceback(host):
    (port,) = free_ports(1)
    with pytest.raises(ConfigError, match="has no IPv4 address that can be found out"):
        bindable(host, [])
    assert "does not resolve" in look_at(host, port)
