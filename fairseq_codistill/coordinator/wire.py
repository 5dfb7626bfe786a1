"""Owns the form of a message: a fixed binary header, then raw bytes. Never pickle, nothing that can run code.

A message is checked here before anything else looks at it: magic, version, checksum of the header, length and
checksum of the payload. The last is left out where the transport authenticates what it carries, which is a stronger
check; one without it that came by another way is refused. What a message means is the mailbox's business.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import struct
import zlib
from typing import Any

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.late import bytes_of

MAGIC = b"CDST"
VERSION = 3  # 2: a large message over ZeroMQ was one of many frames
RUN_ID_BYTES = 8
# magic, version, kind, codec, flags, model, rank, run, epoch, position, micro-batch, rows, classes, payload bytes,
# number, fingerprint, checksum of the payload; then the CRC of all that.
_FIELDS = struct.Struct("<4sBBBBHH8sIIIIIQQ16sQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
UNCHECKED = 1  # flag: the payload has no checksum
EMPTY_FINGERPRINT = bytes(16)
MAX_JSON_BYTES = 64 * 1024
LAUNCHER = 2**16 - 1  # in place of a model: whoever started the models, and speaks for one that has ended


class WireError(ValueError):
    """Bytes that are not a message of ours. They are counted and dropped, never acted upon."""


class Kind(enum.IntEnum):
    """What a message is."""

    HELLO = 1  # payload: JSON, who I am and with which settings
    PREDICTIONS = 2  # payload: encoded logits
    GOODBYE = 3  # payload: JSON, why I stop posting; of the launcher: why some model does
    CHECKPOINT = 4  # payload: parameters and buffers, in the order of their layout, whose digest is the fingerprint
    RECEIVED = 5  # the checkpoint of that position came whole; no payload


@dataclasses.dataclass(frozen=True)
class LateHeader:
    """The header of a large message, whose bytes are made when they are asked for: a checksum takes time.

    A transport asks in a thread of its own.
    """

    message: "Message"
    number: int

    def __len__(self) -> int:
        return HEADER_BYTES

    def __bytes__(self) -> bytes:
        return self.message.header(self.number)


Header = bytes | LateHeader


@dataclasses.dataclass(frozen=True)
class Message:
    """One message, parsed.

    Attributes:
        kind: what it is.
        model: index of the sending model, or ``LAUNCHER``.
        rank: rank of the sender inside its model.
        run_id: 8 bytes that name the run.
        key: data position the predictions belong to.
        fingerprint: 16 bytes, digest of the batch they were computed on.
        num_rows: rows of the predictions (non-pad target tokens, images).
        num_classes: classes, size of the target vocabulary.
        codec: id of the codec of the payload.
        payload: the bytes; of a message that leaves an accelerator perhaps a late one.
        number: of this message among those the sender sent to the same receiver, from 1; 0 where nobody counts.
        is_checked: whether the header holds a checksum of the payload.
    """

    kind: Kind
    model: int
    rank: int
    run_id: bytes
    payload: bytes | memoryview
    key: BatchKey = BatchKey(0, 0, 0)
    fingerprint: bytes = EMPTY_FINGERPRINT
    num_rows: int = 0
    num_classes: int = 0
    codec: int = 0
    number: int = 0
    is_checked: bool = True

    @functools.cached_property
    def _payload_checksum(self) -> int:
        """Once for all peers that get the same payload."""
        return payload_checksum(bytes_of(self.payload))

    def header(self, number: int | None = None) -> bytes:
        """The fixed header of this message, ``HEADER_BYTES`` long.

        Args:
            number: instead of the message's own.
        """
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.codec,
            0 if self.is_checked else UNCHECKED,
            self.model,
            self.rank,
            self.run_id,
            *self.key,
            self.num_rows,
            self.num_classes,
            len(self.payload),
            self.number if number is None else number,
            self.fingerprint,
            self._payload_checksum if self.is_checked else 0,
        )
        return fields + _CRC.pack(zlib.crc32(fields))


def parse(
    header: bytes | memoryview | LateHeader,
    payload: bytes | memoryview,
    checksum: int | None = None,
    is_authenticated: bool = False,
) -> Message:
    """Read one message.

    Args:
        header: what should be ``HEADER_BYTES`` bytes from :meth:`Message.header`.
        payload: what should be the payload that header speaks of.
        checksum: of the payload, where it has been taken already.
        is_authenticated: whether both came by a way on which they could not have changed; only then the payload need
            not have a checksum. One that it has is checked nevertheless.

    Raises:
        WireError: anything is not as it should be; the text says what.
    """
    if len(header) != HEADER_BYTES:
        raise WireError(f"header of {len(header)} bytes, expected {HEADER_BYTES}")
    header = bytes(header)
    fields = header[: _FIELDS.size]
    if fields[: len(MAGIC)] != MAGIC:
        raise WireError("not a codistillation message (wrong magic)")
    if fields[len(MAGIC)] != VERSION:
        raise WireError(f"protocol version {fields[len(MAGIC)]}, this side speaks {VERSION}: install the same release")
    if zlib.crc32(fields) != _CRC.unpack(header[_FIELDS.size :])[0]:
        raise WireError("header checksum does not match")
    (_, _, kind, codec, flags, model, rank, run_id, *where, rows, classes, num_bytes, number, digest, expected) = (
        _FIELDS.unpack(fields)
    )
    if kind not in Kind._value2member_map_:
        raise WireError(f"unknown kind of message {kind}")
    if flags & ~UNCHECKED:
        raise WireError(f"unknown flags {flags:#x}")
    is_checked = not flags & UNCHECKED
    if num_bytes != len(payload):
        raise WireError(f"payload of {len(payload)} bytes, header says {num_bytes}")
    if not is_checked and not is_authenticated:
        raise WireError("payload without a checksum, by a way that does not authenticate it")
    if is_checked and (payload_checksum(payload) if checksum is None else checksum) != expected:
        raise WireError("payload checksum does not match")
    key = BatchKey(*where)
    return Message(Kind(kind), model, rank, run_id, payload, key, digest, rows, classes, codec, number, is_checked)


def parse_json(payload: bytes | memoryview) -> dict[str, Any]:
    """What a hello or a goodbye says.

    Raises:
        WireError: it is too long, or not a JSON object.
    """
    if len(payload) > MAX_JSON_BYTES:
        raise WireError(f"hello of {len(payload)} bytes, at most {MAX_JSON_BYTES} expected")
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise WireError(f"hello is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("hello is not a JSON object")
    return value


def payload_checksum(payload: bytes | memoryview) -> int:
    """CRC-32 of a payload, about 4 GB/s on one core; other threads run meanwhile.

    Unlike a sum it knows where each byte lies: bytes that changed places, such as two words or two blocks, are seen as
    every other damage is. It tells damage, not malice; a transport that authenticates tells both.
    """
    return zlib.crc32(payload)


def run_id_from(name: str) -> bytes:
    """The 8 bytes that stand for a run's name on the wire; in one that is its addresses spaces do not count.

    >>> run_id_from("a:1,b:2") == run_id_from("a:1, b:2,")
    True
    """
    name = ",".join(entry.strip() for entry in name.split(",") if entry.strip()) or name
    # A byte of the environment that is no UTF-8 is part of the name as it is.
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=RUN_ID_BYTES).digest()
