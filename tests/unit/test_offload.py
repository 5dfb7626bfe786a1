"""Payloads that leave an accelerator: their memory, who waits for them, and that nothing is sent before it is there.

Without a GPU the tensors are torch's "meta" ones, which hold nothing, and the stream is late on purpose; with one the
last test is real.
"""

import threading

import numpy as np
import pytest
import torch
from helpers import free_ports
from test_zmq_transport import pair, pass_over, until

from fairseq_codistill.coordinator.buffers import Buffers
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.codecs.offload import Offload
from fairseq_codistill.coordinator.courier import Courier
from fairseq_codistill.coordinator.late import LatePayload, bytes_of
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import Peer
from fairseq_codistill.coordinator.transports.gloo import GlooTransport
from fairseq_codistill.coordinator.transports.pieces import PIECE_BYTES
from fairseq_codistill.coordinator.transports.zeromq import ZeroMqTransport
from fairseq_codistill.coordinator.wire import Kind, parse

RUN = bytes(8)


class LateStream:
    """Copies when it is told to, one after the other: what was to be copied it is told then."""

    def __init__(self):
        self.waiting = []

    def __call__(self, pairs):
        self.waiting.append(([here for here, _ in pairs], LateEvent()))
        return self.waiting[-1][1]

    def run_one(self, content):
        places, event = self.waiting.pop(0)
        for here in places:
            here.copy_(torch.frombuffer(bytearray(content[: len(here)]), dtype=torch.uint8))
            content = content[len(here) :]
        assert not content
        event.happened.set()


class LateEvent:
    def __init__(self):
        self.happened, self.num_asked = threading.Event(), 0

    def query(self):
        return self.happened.is_set()

    def synchronize(self):
        self.num_asked += 1
        assert self.happened.wait(20), "the copy never ended"


class Memory:
    """Allocates, and counts."""

    def __init__(self):
        self.sizes = []

    def __call__(self, num_bytes):
        self.sizes.append(num_bytes)
        return np.empty(num_bytes, np.uint8)


def on_device(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def address(payload):
    return np.frombuffer(payload.wait(), np.uint8).ctypes.data


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def test_a_payload_is_there_once_it_was_copied_and_holds_what_is_on_the_cpu_already():
    stream = LateStream()
    offload = Offload(stream, Memory())
    payload = offload.start([torch.tensor([7], dtype=torch.int32), on_device(3, dtype=torch.int16), on_device(0, 4)])
    assert len(payload) == 10
    assert not payload.is_there
    stream.run_one(b"abcdef")
    assert payload.is_there
    assert bytes(payload) == bytes_of(payload) == b"\7\0\0\0abcdef"


def test_of_nothing_there_is_an_empty_payload():
    stream = LateStream()
    payload = Offload(stream, Memory()).start([on_device(0, 4)])
    stream.run_one(b"")
    assert bytes(payload) == b""


def test_a_slot_is_free_only_when_it_was_copied_into_and_nobody_sends_from_it():
    stream, memory = LateStream(), Memory()
    offload = Offload(stream, memory, num_slots=2)
    first, second = (offload.start([on_device(1000)]) for _ in range(2))
    del first, second  # dropped by a transport that has no room, while the copies are under way
    third = offload.start([on_device(1000)])
    assert len(memory.sizes) == 3
    stream.run_one(bytes(4000))
    stream.run_one(bytes(4000))
    fourth = offload.start([on_device(1000)])  # in one of the first two
    assert len(memory.sizes) == 3
    for seed in (3, 4):
        stream.run_one(random_bytes(4000, seed))
    assert bytes(third) == random_bytes(4000, 3)
    place, sending = address(fourth), fourth.wait()[5:9]  # what a transport still has of it
    del fourth
    places = set()
    for _ in range(5):
        other = offload.start([on_device(1000)])
        stream.run_one(bytes(4000))
        places.add(address(other))
        del other
    assert place not in places
    assert bytes(sending) == random_bytes(4000, 4)[5:9]
    assert len(memory.sizes) == 3


def test_where_all_slots_are_in_use_a_post_does_not_wait():
    stream, memory = LateStream(), Memory()
    offload = Offload(stream, memory, num_slots=2)
    payloads = [offload.start([on_device(10)]) for _ in range(7)]
    assert len(memory.sizes) == 7
    for seed in range(7):
        stream.run_one(random_bytes(40, seed))
    assert [bytes(payload) for payload in payloads] == [random_bytes(40, seed) for seed in range(7)]
    del payloads
    for _ in range(7):
        offload.start([on_device(10)])
        stream.run_one(bytes(40))
    assert len(memory.sizes) == 7  # the two that were kept serve


@pytest.mark.parametrize(
    ("codec", "size"), [("fp32", 84), ("fp16", 42), ("bf16", 42), ("int8", 33), ("columns:3", 22), ("topk:2", 36)]
)
def test_every_codec_hands_its_payload_over_without_waiting(codec, size):
    made, stream = make_codec(codec), LateStream()
    made._offload = Offload(stream, Memory())
    payload = made.encode(on_device(3, 7), 1)
    assert isinstance(payload, LatePayload)
    assert len(payload) == size == made.num_bytes(3, 7)
    content = random_bytes(size - 4 * codec.startswith("columns"))  # of those 4 bytes are the CPU's
    stream.run_one(content)
    assert bytes(payload)[-len(content) :] == content


def couriers(zero, one):
    ends = zip((zero, one), range(2), strict=True)
    return [Courier(end, model, 0, RUN, {1 - model: Peer(1 - model)}, TrafficMeter()) for end, model in ends]


@pytest.mark.parametrize("size", [100, 2**16, 3 * PIECE_BYTES + 4])
def test_zeromq_sends_a_late_payload_when_it_is_there_and_in_its_turn(size):
    stream = LateStream()
    offload, content = Offload(stream, Memory()), random_bytes(size)
    with pair() as (zero, one):
        pass_over(zero, one, b"connected")
        sender, _ = couriers(zero, one)
        assert sender.send(1, sender.message(Kind.PREDICTIONS, offload.start([on_device(size, dtype=torch.uint8)])))
        assert sender.send(1, sender.message(Kind.HELLO, b"{}"))
        assert one.receive(0.3) is None
        stream.run_one(content)
        first, second = (parse(*until(lambda: one.receive(1.0)), one.checksum) for _ in range(2))
        assert (first.kind, bytes(first.payload), first.number) == (Kind.PREDICTIONS, content, 1)
        assert (second.kind, second.number) == (Kind.HELLO, 2)


def test_a_late_payload_counts_in_the_queue_before_it_is_there():
    ports, stream = free_ports(2), LateStream()
    addresses = [("127.0.0.1", port) for port in ports]
    zero = ZeroMqTransport(addresses[0], {1: addresses[1]}, max_queue_bytes=2 * PIECE_BYTES)
    one = ZeroMqTransport(addresses[1], {0: addresses[0]})
    offload, header = Offload(stream, Memory()), b"header"
    try:
        pass_over(zero, one, b"connected")
        taken = [zero.send(1, header, offload.start([on_device(PIECE_BYTES, dtype=torch.uint8)])) for _ in range(4)]
        assert taken == [True, True, False, False]
        for seed in range(4):
            stream.run_one(random_bytes(PIECE_BYTES, seed))
        for seed in range(2):
            assert bytes(one.receive(20.0)[1]) == random_bytes(PIECE_BYTES, seed)
        assert until(lambda: zero.send(1, header, b"room again"))
    finally:
        zero.close(0)
        one.close(0)


def test_a_transport_without_a_thread_is_given_bytes_that_are_there():
    class Taking:
        authenticates, takes_late_payloads, limit_bytes = True, GlooTransport.takes_late_payloads, None

        def send_to_all(self, headers, payload):
            self.payload = payload
            return {model: len(payload) for model in headers}

    stream, transport = LateStream(), Taking()
    payload = Offload(stream, Memory()).start([on_device(4, dtype=torch.uint8)])
    stream.run_one(b"abcd")
    (courier,) = couriers(transport, transport)[:1]
    assert courier.send(1, courier.message(Kind.PREDICTIONS, payload))
    assert isinstance(transport.payload, memoryview)
    assert transport.payload == b"abcd"


def test_memory_of_ones_own_making_is_used_again_like_any_other():
    memory = Memory()
    buffers = Buffers(2, memory, min_bytes=0)
    for _ in range(3):
        buffers.take(10)
    assert len(memory.sizes) == 1
    assert len(buffers.take(0)) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "columns:64", "topk:5", "tokens:4"])
def test_a_gpu_is_not_waited_for_and_sends_what_a_cpu_would(codec):
    made, kept = make_codec(codec), []
    logits = [torch.randn(500, 3000, device="cuda") for _ in range(6)]
    torch.cuda.synchronize()
    made.encode(logits[0], 1)  # pins, and compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed, values in enumerate(logits):
            kept.append(made.encode(values, seed))
            values.zero_()  # what comes after it in the step
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(isinstance(payload, LatePayload) for payload in kept)
    assert len({bytes(payload) for payload in kept}) == len(kept)
    again = torch.randn(500, 3000, device="cuda")
    expected = make_codec(codec).encode(again.cpu(), 9)
    if codec != "tokens:4":  # its draws are the device's own
        found = [made.decode(bytes(payload), 500, 3000, 9) for payload in (made.encode(again, 9), bytes(expected))]
        values = [part if isinstance(part, torch.Tensor) else part.values for part in found]
        torch.testing.assert_close(values[0].float(), values[1].float(), atol=1.0 if codec == "int8" else 1e-2, rtol=0)
