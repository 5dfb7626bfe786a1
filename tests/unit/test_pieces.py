"""Large payloads in pieces: whole again on the other side, in order, and nothing else taken for one. Real sockets."""

import threading
import zlib

import numpy as np
import pytest
from helpers import free_ports
from test_curve_keys import transport
from test_zmq_transport import HEADER, pair, pass_over, stranger, until

from fairseq_codistill.coordinator.buffers import MIN_BYTES, Buffers
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.transports.curve_keys import make_keys
from fairseq_codistill.coordinator.transports.pieces import PIECE_BYTES, cut, join
from fairseq_codistill.coordinator.wire import Kind, LateHeader, Message, WireError, parse


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5])
def test_a_payload_is_whole_again_and_its_checksum_is_that_of_the_whole(size):
    payload = random_bytes(size)
    whole, checksum = join(cut(payload), -1, Buffers())
    assert whole == payload
    assert checksum == zlib.crc32(payload)


@pytest.mark.parametrize(
    "sizes", [(), (1, 1), (PIECE_BYTES, 0), (PIECE_BYTES, PIECE_BYTES + 1), (PIECE_BYTES - 1, 1), (1, PIECE_BYTES)]
)
def test_frames_that_are_no_pieces_are_refused(sizes):
    with pytest.raises(WireError, match=f"message of {len(sizes) + 1} frames"):
        join([memoryview(bytes(size)) for size in sizes], -1, Buffers())


def test_many_small_pieces_do_not_get_around_the_limit_of_a_message():
    with pytest.raises(WireError, match="at most 2097152 are taken: --codistill-max-message-mb"):
        join([memoryview(bytes(PIECE_BYTES))] * 3, 2 * PIECE_BYTES, Buffers())


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
        for payload in payloads:
            assert zero.send(1, HEADER, payload)
        for payload in payloads:
            assert bytes(one.receive(20.0)[1]) == payload
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
        push.send_multipart([message.header(), *cut(bytes(damaged))])
        frames = until(lambda: one.receive(1.0))
        with pytest.raises(WireError, match="payload checksum"):
            parse(*frames, one.checksum)


def test_a_frame_larger_than_a_piece_is_refused_unread():
    with pair() as (zero, one), stranger(one) as push:
        push.send_multipart([HEADER, bytes(PIECE_BYTES + 1)])
        assert one.receive(0.3) is None
        assert pass_over(zero, one, b"fine") == b"fine"


def test_what_came_and_is_not_asked_for_has_a_bound_in_bytes():
    with pair(max_queue_bytes=3 * PIECE_BYTES, messages_per_update=100) as (zero, one):
        pass_over(zero, one, b"connected")
        payloads = [random_bytes(PIECE_BYTES, seed) for seed in range(40)]
        for payload in payloads:
            until(lambda payload=payload: zero.send(1, HEADER, payload) or one._inbound._num_bytes >= 3 * PIECE_BYTES)
        assert one._inbound._num_bytes <= 4 * PIECE_BYTES
        got = 0
        while (frames := one.receive(1.0)) is not None:
            assert bytes(frames[1]) == payloads[got]
            got += 1
        assert got >= 3
