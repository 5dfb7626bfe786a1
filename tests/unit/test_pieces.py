"""Large payloads in pieces: whole again on the other side, in order, and nothing else taken for one. Real sockets."""

import threading
import zlib

import numpy as np
import pytest
import zmq
from helpers import free_ports
from hypothesis import given
from hypothesis import strategies as st
from test_curve_keys import transport
from test_zmq_transport import HEADER, pair, pass_over, stranger, until

from fairseq_codistill.coordinator.buffers import MIN_BYTES, Buffers
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.transports.curve_keys import make_keys
from fairseq_codistill.coordinator.transports.pieces import LABEL, LABEL_BYTES, PIECE_BYTES, Cutter, Joiner
from fairseq_codistill.coordinator.transports.zeromq import ZeroMqTransport
from fairseq_codistill.coordinator.wire import HEADER_BYTES, Kind, LateHeader, Message, WireError, parse


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def cut(payload, cutter=None, header=bytes(HEADER_BYTES)):
    """Frames of all messages of one payload, as they travel."""
    pieces = list((cutter or Cutter()).cut(payload))
    return [(label + (header if piece is pieces[-1][1] else b""), piece) for label, piece in pieces]


def bare(model, ports):
    return ZeroMqTransport(("127.0.0.1", ports[model]), {1 - model: ("127.0.0.1", ports[1 - model])})


def joiner(max_bytes=-1, max_partial=2, is_authenticated=False):
    return Joiner(max_bytes, max_partial, is_authenticated)


def give(to, frames, sender=None):
    """What came whole of these frames, as bytes."""
    found = [to.add(sender, memoryview(first), memoryview(second)) for first, second in frames]
    return [bytes(joined[1]) for joined in found if joined is not None]


@pytest.mark.parametrize("size", [1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5])
@pytest.mark.parametrize("is_authenticated", [False, True])
def test_a_payload_is_whole_again_and_its_checksum_is_that_of_the_whole(size, is_authenticated):
    payload, header = random_bytes(size), random_bytes(HEADER_BYTES, 1)
    to = joiner(is_authenticated=is_authenticated)
    *before, last = [to.add(None, memoryview(first), second) for first, second in cut(payload, header=header)]
    assert before == [None] * (-(-size // PIECE_BYTES) - 1)
    assert bytes(last[0]) == header
    assert last[1] == payload
    assert last[2] == (None if is_authenticated else zlib.crc32(payload))
    assert to.num_bytes == 0


def relabelled(frames, index, stream=None, number=None, start=None, total=None):
    """The label of one piece with other fields."""
    first, second = frames[index]
    fields = list(LABEL.unpack_from(first))
    for place, value in enumerate((None, stream, number, start, total)):
        fields[place] = fields[place] if value is None else value
    return [*frames[:index], (LABEL.pack(*fields) + first[LABEL_BYTES:], second), *frames[index + 1 :]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frames: [(frames[0][0][:-1], frames[0][1])],
        lambda frames: [(frames[0][0] + b"x", frames[0][1])],
        lambda frames: [(frames[0][0], b"")],
        lambda frames: [frames[0], (frames[1][0], random_bytes(3 * PIECE_BYTES))],
        lambda frames: relabelled(frames, 0, total=5),
        lambda frames: relabelled(frames, 1, start=2**64 - 1),
        lambda frames: [*frames[:2], (frames[2][0][:LABEL_BYTES], frames[2][1])],
        lambda frames: relabelled(frames, 2, total=2**40),
    ],
)
def test_frames_that_are_no_pieces_are_refused_and_the_next_message_is_read(spoil):
    to, cutter = joiner(), Cutter()
    with pytest.raises(WireError, match="label of|piece from"):
        give(to, spoil(cut(random_bytes(2 * PIECE_BYTES + 5), cutter)))
    payload = random_bytes(PIECE_BYTES + 7, 1)
    assert give(to, cut(payload, cutter)) == [payload]
    assert to.num_bytes == 0


def test_a_message_over_the_limit_is_refused_before_memory_is_taken():
    to, cutter = joiner(2 * PIECE_BYTES), Cutter()
    frames = cut(bytes(3 * PIECE_BYTES), cutter)
    with pytest.raises(WireError, match="at most 2097152 are taken: --codistill-max-message-mb"):
        give(to, frames[:1])
    assert give(to, frames[1:]) == []
    with pytest.raises(WireError, match=f"message of {2**60} bytes"):
        give(to, relabelled(cut(bytes(2 * PIECE_BYTES), cutter), 0, total=2**60)[:1])
    assert give(to, cut(bytes(2 * PIECE_BYTES), cutter)) == [bytes(2 * PIECE_BYTES)]


def test_what_no_memory_could_hold_is_refused_and_the_next_message_is_read():
    to, cutter = joiner(), Cutter()  # without a limit
    for total in (2**55, 2**63):
        with pytest.raises(WireError, match=f"no memory for a message of {total} bytes"):
            give(to, relabelled(cut(bytes(2 * PIECE_BYTES), cutter), 0, total=total)[:1])
    assert give(to, cut(bytes(2 * PIECE_BYTES), cutter)) == [bytes(2 * PIECE_BYTES)]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_of_a_message_that_lost_a_piece_nothing_is_left(missing):
    to, cutter = joiner(), Cutter()
    frames, following = cut(random_bytes(3 * PIECE_BYTES), cutter), random_bytes(2 * PIECE_BYTES, 1)
    assert give(to, [*frames[:missing], *frames[missing + 1 :]]) == []
    assert give(to, cut(following, cutter)) == [following]
    assert to.num_bytes == 0


def test_messages_of_several_senders_come_in_turns_and_none_is_mixed_with_another():
    to = joiner(max_partial=3)
    payloads = [random_bytes(3 * PIECE_BYTES, seed) for seed in range(3)]
    turns = zip(*(cut(payload) for payload in payloads), strict=True)
    assert give(to, [frame for turn in turns for frame in turn]) == payloads


def test_a_stream_is_of_the_one_that_sends_it():
    to, frames = joiner(), cut(random_bytes(2 * PIECE_BYTES))
    other = relabelled(cut(random_bytes(2 * PIECE_BYTES, 1)), 0, stream=LABEL.unpack_from(frames[0][0])[1])
    assert give(to, frames[:1], sender=1) == []
    assert give(to, other[:1], sender=2) == []
    assert give(to, frames[1:], sender=2) != give(to, frames[1:], sender=1)


def test_a_process_that_ended_in_the_middle_takes_no_memory_for_ever():
    to = joiner(max_partial=2)
    for seed in range(20):
        assert give(to, cut(random_bytes(3 * PIECE_BYTES, seed))[:2]) == []
        assert to.num_bytes <= 4 * PIECE_BYTES
    payload = random_bytes(3 * PIECE_BYTES)
    assert give(to, cut(payload)) == [payload]
    assert to.num_bytes == 2 * PIECE_BYTES


@given(st.data())
def test_whatever_comes_in_whatever_order_what_is_whole_is_as_it_was(data):
    to, cutters = joiner(max_partial=2), [Cutter() for _ in range(3)]
    payloads = [random_bytes(size, size) for size in (PIECE_BYTES + 1, 2 * PIECE_BYTES, 2 * PIECE_BYTES + 9)]
    frames = [frame for cutter in cutters for payload in payloads for frame in cut(payload, cutter)]
    for frame in data.draw(st.lists(st.sampled_from(frames), max_size=30)):
        assert all(found in payloads for found in give(to, [frame]))
        assert 0 <= to.num_bytes <= 2 * len(payloads[-1])
    assert give(to, cut(payloads[0])) == [payloads[0]]


def test_a_buffer_is_lent_again_only_when_nobody_looks_at_it_any_more():
    def address(view):
        return np.frombuffer(view, np.uint8).ctypes.data

    buffers = Buffers()
    first = buffers.take(MIN_BYTES)
    first[5:7] = b"ab"
    part, place = first[5:7], address(first)
    del first
    other = buffers.take(MIN_BYTES)  # the first is still looked at
    other[5:7] = b"xy"
    assert part == b"ab"
    places = {place, address(other)}
    assert len(places) == 2
    del part, other
    again = [buffers.take(MIN_BYTES) for _ in range(2)]
    assert {address(view) for view in again} == places


def test_messages_of_all_sizes_arrive_in_the_order_in_which_they_were_sent():
    sizes = [10, 3 * PIECE_BYTES, 20, 70_000, 2 * PIECE_BYTES + 1, 0, 5]
    with pair() as (zero, one):
        pass_over(zero, one, b"connected")
        payloads = [random_bytes(size, seed) for seed, size in enumerate(sizes)]
        headers = [random_bytes(HEADER_BYTES, seed) for seed in range(len(sizes))]
        for header, payload in zip(headers, payloads, strict=True):
            assert zero.send(1, header, payload)
        for header, payload in zip(headers, payloads, strict=True):
            received = one.receive(20.0)
            assert tuple(map(bytes, received)) == (header, payload)
            assert one.checksum == zlib.crc32(payload)


@pytest.mark.parametrize("size", [PIECE_BYTES, 2 * PIECE_BYTES + 3])
def test_pieces_travel_encrypted_too(tmp_path, size):
    folder, ports, payload = str(tmp_path / "keys"), free_ports(2), random_bytes(size)
    make_keys(folder, 2)
    zero, one = (transport(model, ports, folder) for model in range(2))
    try:
        assert pass_over(zero, one, payload) == payload
        assert one.sender == 0
        assert one.authenticates
        assert one.checksum is None  # CURVE has authenticated each
    finally:
        zero.close(0)
        one.close(0)


def test_a_checksum_is_taken_in_a_thread_of_the_transport(monkeypatch):
    threads = []
    header = Message.header

    def noted(message, number=None):
        threads.append(threading.current_thread().name)
        return header(message, number)

    monkeypatch.setattr(Message, "header", noted)
    message = Message(Kind.PREDICTIONS, 1, 0, bytes(8), random_bytes(2 * PIECE_BYTES), BatchKey(1, 2))
    with pair() as (zero, one):
        pass_over(zero, one, b"connected")
        assert zero.send(1, LateHeader(message, 7), message.payload)
        assert len(LateHeader(message, 7)) == len(header(message))
        received = parse(*one.receive(20.0), one.checksum)
    assert threads == ["codistill-outbound"]
    assert received.number == 7
    assert bytes(received.payload) == message.payload


def test_without_keys_a_message_that_says_it_needs_no_checksum_is_refused():
    message = Message(Kind.PREDICTIONS, 1, 0, bytes(8), random_bytes(10), BatchKey(1, 2), is_checked=False)
    with pair() as (_, one), stranger(one) as push:
        push.send_multipart([message.header(), message.payload])
        frames = until(lambda: one.receive(1.0))
        with pytest.raises(WireError, match="by a way that does not authenticate"):
            parse(*frames, one.checksum, one.authenticates)


def test_a_damaged_piece_is_refused():
    payload = random_bytes(3 * PIECE_BYTES)
    message = Message(Kind.PREDICTIONS, 1, 0, bytes(8), payload, BatchKey(1, 2))
    damaged = bytearray(payload)
    damaged[2 * PIECE_BYTES + 9] ^= 1
    with pair() as (_, one), stranger(one) as push:
        for frames in cut(bytes(damaged), header=message.header()):
            push.send_multipart(frames)
        frames = until(lambda: one.receive(1.0))
        with pytest.raises(WireError, match="payload checksum"):
            parse(*frames, one.checksum)


def test_a_frame_larger_than_a_piece_is_refused_unread():
    with pair() as (zero, one), stranger(one) as push:
        push.send_multipart([HEADER, bytes(PIECE_BYTES + 1)])
        assert one.receive(0.3) is None
        assert pass_over(zero, one, b"fine") == b"fine"


def is_full(receiver):
    return receiver._inbound._num_bytes >= 3 * PIECE_BYTES


def test_what_came_and_is_not_asked_for_has_a_bound_in_bytes():
    with pair(max_queue_bytes=3 * PIECE_BYTES, messages_per_update=100) as (zero, one):
        pass_over(zero, one, b"connected")
        payloads = []
        for seed in range(40):
            payload = random_bytes(PIECE_BYTES, seed)
            if until(lambda payload=payload: zero.send(1, HEADER, payload) or (is_full(one) and "full")) is True:
                payloads.append(payload)
        assert one._inbound._num_bytes <= 4 * PIECE_BYTES
        got = 0
        while (frames := one.receive(1.0)) is not None:
            assert bytes(frames[1]) == payloads[got]
            got += 1
        assert got >= 3


def test_what_came_in_part_counts_and_is_read_to_its_end():
    """Two senders of large messages, and room for less than one: both come whole, in turns."""
    ports = free_ports(3)
    addresses = [("127.0.0.1", port) for port in ports]
    one = ZeroMqTransport(addresses[0], {1: addresses[1], 2: addresses[2]}, max_queue_bytes=2 * PIECE_BYTES)
    senders = [ZeroMqTransport(addresses[model], {0: addresses[0]}) for model in (1, 2)]
    try:
        payloads = [random_bytes(20 * PIECE_BYTES + model, model) for model in (1, 2)]
        for sender, payload in zip(senders, payloads, strict=True):
            for _ in range(3):
                until(lambda sender=sender, payload=payload: sender.send(0, HEADER, payload))
        found = [bytes(one.receive(20.0)[1]) for _ in range(6)]
        assert all(found.count(payload) == 3 for payload in payloads)
        assert one._inbound._num_bytes == one._inbound._joiner.num_bytes == 0
    finally:
        for transport in (one, *senders):
            transport.close(0)


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_sender_that_is_killed_between_two_pieces_costs_its_message_alone(tmp_path, with_keys):
    """It begins again with another message, in a new process, while what was left of the old one is still there."""
    folder, ports = str(tmp_path / "keys"), free_ports(2)
    make_keys(folder, 2)
    made = (lambda model: transport(model, ports, folder)) if with_keys else (lambda model: bare(model, ports))
    one, payload = made(1), random_bytes(5 * PIECE_BYTES, 1)
    try:
        zero = made(0)
        pass_over(zero, one, b"connected")
        push, cutter = zero._push[1], zero._outbound._cutter
        for frames in list(cut(random_bytes(5 * PIECE_BYTES), cutter))[:3]:
            push.send_multipart(frames)
        until(lambda: one._inbound._joiner.num_bytes == 3 * PIECE_BYTES)
        zero.close(0)
        zero = made(0)
        until(lambda: zero.send(1, HEADER, payload))
        assert bytes(until(lambda: one.receive(1.0))[1]) == payload
        assert one.receive(0.2) is None
    finally:
        zero.close(0)
        one.close(0)


def test_a_piece_that_is_not_taken_costs_its_message_alone_and_leaves_no_debt(monkeypatch):
    with pair() as (zero, one):
        pass_over(zero, one, b"connected")
        send, sent = zero._push[1].send, []

        def broken(data, *args, **options):
            sent.append(None)  # a frame that is kept would never leave
            if len(sent) == 7:  # a label: behind one ZeroMQ takes, or throws away, the rest
                raise zmq.Again
            return send(data, *args, **options)

        monkeypatch.setattr(zero._push[1], "send", broken)
        assert zero.send(1, HEADER, random_bytes(5 * PIECE_BYTES))
        payload = random_bytes(4 * PIECE_BYTES, 1)
        until(lambda: len(sent) >= 7)
        assert zero.send(1, HEADER, payload)
        assert bytes(one.receive(20.0)[1]) == payload
        until(lambda: zero._outbound._has_room(zero._outbound._lines[1], 0) and not zero._outbound._lines[1].queued)
