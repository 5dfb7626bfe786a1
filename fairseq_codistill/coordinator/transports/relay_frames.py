"""Owns the form of what travels between a rank and a relay: the frames around what they carry, nothing else.

A rank sends ``join`` once a connection, then ``data``; a relay answers with ``standing`` (who is there) whenever that
changes, and hands on ``data``. Both sides read what they get here, and neither trusts it.
"""

import dataclasses
import struct
from collections.abc import Mapping, Sequence

from fairseq_codistill.coordinator.wire import WireError

VERSION = 3
SESSION_BYTES = 8
TOKEN_BYTES = 8
JOIN, DATA, STANDING, UNKNOWN, REPLACED, REFUSED = b"J", b"D", b"S", b"U", b"X", b"R"
MAX_MODELS = 1024
_JOIN = struct.Struct(f"<cBH{SESSION_BYTES}sH")
_MODEL = struct.Struct("<H")
_LIMIT = struct.Struct("<Q")
_STANDING = struct.Struct(f"<H{SESSION_BYTES}s{TOKEN_BYTES}sB")


@dataclasses.dataclass(frozen=True)
class Standing:
    """What a relay says of one peer.

    Attributes:
        session: of its process.
        token: of its present connection.
        has_room: whether the relay takes more for it.
    """

    session: bytes
    token: bytes
    has_room: bool


def join(rank: int, session: bytes, num_senders: int = 1) -> list[bytes]:
    """``num_senders``: peers that send to this rank at once."""
    return [_JOIN.pack(JOIN, VERSION, rank, session, num_senders)]


def read_join(frame: bytes) -> tuple[int, bytes, int]:
    """Rank, session and number of senders.

    Raises:
        WireError: it is no join, or of another version.
    """
    if len(frame) < 2 or frame[1] != VERSION:
        raise WireError(f"a relay of version {VERSION} was joined in another one: install the same release on both")
    if len(frame) != _JOIN.size:
        raise WireError(f"join of {len(frame)} bytes, expected {_JOIN.size}")
    _, _, rank, session, num_senders = _JOIN.unpack(frame)
    return rank, session, num_senders


def upload(headers: Mapping[int, bytes], payload: bytes) -> list[bytes]:
    """To a relay: one payload, and a header for each model that gets it."""
    return [DATA + b"".join(_MODEL.pack(model) for model in headers), *headers.values(), payload]


def read_targets(frame: bytes, num_frames: int) -> Sequence[int]:
    """The models of an upload of so many frames, in the order of their headers.

    Raises:
        WireError: there is not one header a model and a payload.
    """
    if len(frame) > 1 + _MODEL.size * MAX_MODELS:  # before memory is taken for them
        raise WireError(f"upload for more than {MAX_MODELS} models")
    targets = [model for (model,) in _MODEL.iter_unpack(frame[1:])] if len(frame) % 2 else []
    if not targets or num_frames != len(targets) + 2 or len(set(targets)) != len(targets):
        raise WireError(f"upload of {num_frames} frames for {len(targets)} models")
    return targets


def download(sender: int) -> bytes:
    """First of the three frames that a relay hands on; header and payload follow."""
    return DATA + _MODEL.pack(sender)


def read_sender(frames: Sequence[bytes]) -> int:
    """Model that a message which a relay handed on came from.

    Raises:
        WireError: it has not three frames.
    """
    if len(frames) != 3 or len(frames[0]) != 1 + _MODEL.size:
        raise WireError(f"message of {len(frames)} frames from the relay, expected 3")
    return int(_MODEL.unpack_from(frames[0], 1)[0])


def standing(of: Mapping[int, Standing], limit_bytes: int) -> list[bytes]:
    """Who is there, and the largest payload that the relay takes."""
    rows = [_STANDING.pack(model, one.session, one.token, one.has_room) for model, one in of.items()]
    return [STANDING + _LIMIT.pack(limit_bytes) + b"".join(rows)]


def read_standing(frame: bytes) -> tuple[dict[int, Standing], int]:
    """Model -> what the relay says of it, of all that are there; and the largest payload that it takes.

    Raises:
        WireError: it does not divide into entries.
    """
    start = 1 + _LIMIT.size
    if (len(frame) - start) % _STANDING.size:
        raise WireError(f"standing of {len(frame)} bytes from the relay")
    rows = _STANDING.iter_unpack(frame[start:])
    found = {model: Standing(session, token, bool(room)) for model, session, token, room in rows}
    return found, int(_LIMIT.unpack_from(frame, 1)[0])
