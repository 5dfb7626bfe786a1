"""Messages: what goes out comes back, and nothing else gets in."""

import dataclasses
import random
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.wire import (
    HEADER_BYTES,
    Kind,
    Message,
    WireError,
    parse,
    payload_checksum,
    run_id_from,
)

RUN = b"run-id-8"
U32 = st.integers(0, 2**32 - 1)
MESSAGE = Message(Kind.PREDICTIONS, 1, 2, RUN, b"payload of a few bytes", BatchKey(3, 4, 5), bytes(range(16)), 6, 7, 2)


@given(
    st.sampled_from(Kind), st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=200),
    st.tuples(U32, U32, U32), st.binary(min_size=16, max_size=16), U32, U32, st.integers(0, 255),
    st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_every_message_survives_the_wire(kind, model, rank, payload, key, digest, rows, classes, codec, n):
    message = Message(kind, model, rank, RUN, payload, BatchKey(*key), digest, rows, classes, codec, n)
    header = message.header()
    assert len(header) == HEADER_BYTES
    assert parse(header, payload) == message
    assert parse(message.header(n ^ 1), payload) == dataclasses.replace(message, number=n ^ 1)


@pytest.mark.parametrize("position", range(HEADER_BYTES))
def test_any_damaged_byte_of_the_header_is_refused(position):
    header = bytearray(MESSAGE.header())
    header[position] ^= 0x10
    with pytest.raises(WireError):
        parse(bytes(header), MESSAGE.payload)


@pytest.mark.parametrize("position", range(len(MESSAGE.payload)))
def test_any_damaged_byte_of_the_payload_is_refused(position):
    payload = bytearray(MESSAGE.payload)
    payload[position] ^= 1
    with pytest.raises(WireError, match="payload checksum"):
        parse(MESSAGE.header(), bytes(payload))


def test_a_payload_without_a_checksum_is_taken_only_by_a_way_that_authenticates():
    message = dataclasses.replace(MESSAGE, is_checked=False)
    assert parse(message.header(), message.payload, is_authenticated=True) == message
    for checksum in (None, 0, payload_checksum(message.payload)):
        with pytest.raises(WireError, match="without a checksum, by a way that does not authenticate"):
            parse(message.header(), message.payload, checksum)


def test_a_checksum_that_is_there_counts_by_every_way():
    assert parse(MESSAGE.header(), MESSAGE.payload, is_authenticated=True) == MESSAGE
    with pytest.raises(WireError, match="payload checksum"):
        parse(MESSAGE.header(), b"Payload of a few bytes", is_authenticated=True)


@pytest.mark.parametrize("flags", [2, 3, 0x80, 0xFF])
def test_flags_that_nobody_knows_are_refused(flags):
    fields = bytearray(MESSAGE.header()[:-4])
    fields[7] = flags
    header = bytes(fields) + struct.pack("<I", zlib.crc32(fields))
    with pytest.raises(WireError, match="unknown flags"):
        parse(header, MESSAGE.payload, is_authenticated=True)


@pytest.mark.parametrize("size", [1, 4, 8, 16, 2**16])
def test_parts_of_the_payload_that_changed_places_are_refused(size):
    parts = [bytes([number]) * size for number in range(9)]
    message = dataclasses.replace(MESSAGE, payload=b"".join(parts))
    parts[2], parts[7] = parts[7], parts[2]
    with pytest.raises(WireError, match="payload checksum"):
        parse(message.header(), b"".join(parts))


@pytest.mark.parametrize(
    ("header", "payload", "reason"),
    [
        (b"", b"", "header of 0 bytes"),
        (MESSAGE.header()[:-1], MESSAGE.payload, "header of"),
        (MESSAGE.header() + b"x", MESSAGE.payload, "header of"),
        (MESSAGE.header(), MESSAGE.payload[:-1], "header says 22"),
        (MESSAGE.header(), MESSAGE.payload + b"x", "payload of 23 bytes"),
        (b"GET / HTTP/1.1\r\n".ljust(HEADER_BYTES), b"", "wrong magic"),
        (MESSAGE.header()[:4] + b"\x09" + MESSAGE.header()[5:], MESSAGE.payload, "protocol version 9"),
    ],
)
def test_what_is_refused_says_why(header, payload, reason):
    with pytest.raises(WireError, match=reason):
        parse(header, payload)


def test_100_000_random_messages_are_refused_and_nothing_else_happens():
    generator = random.Random(0)
    good = MESSAGE.header()
    for trial in range(100_000):
        header = bytearray(generator.randbytes(HEADER_BYTES))
        keep = trial % HEADER_BYTES  # ever longer beginnings of a good header, so that the later checks are reached
        header[:keep] = good[:keep]
        payload = generator.randbytes(trial % 32)
        if bytes(header) != good:
            with pytest.raises(WireError):
                parse(bytes(header), payload)


@given(st.binary(max_size=100))
def test_checksum_sees_a_changed_length(payload):
    assert payload_checksum(payload) != payload_checksum(payload + b"\0")


def test_a_name_of_bytes_that_are_no_text_is_a_name_of_its_own():
    assert len({run_id_from("a"), run_id_from("a\udcff"), run_id_from("a\udcfe")}) == 3  # as os.environ gives them
