"""Owns the pieces of a large payload: over ZeroMQ one is encrypted while the one before it travels and is decrypted.

A payload of up to ``PIECE_BYTES`` is one frame, a larger one several, each of that size but the last.
"""

import zlib
from collections.abc import Sequence

from fairseq_codistill.coordinator.buffers import Buffers
from fairseq_codistill.coordinator.wire import WireError

PIECE_BYTES = 2**20


def cut(payload: bytes | memoryview) -> list[memoryview]:
    """The pieces of a payload, without a copy; of an empty one a piece of no bytes."""
    view = memoryview(payload).cast("B")
    return [view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES)] or [view]


def join(
    pieces: Sequence[memoryview], max_bytes: int, buffers: Buffers, is_authenticated: bool = False
) -> tuple[memoryview, int | None]:
    """The payload that was cut, and its checksum, taken while each piece is in the cache.

    Args:
        pieces: frames as they came.
        max_bytes: what a payload may have; negative: anything.
        buffers: where the memory of a payload of several pieces comes from.
        is_authenticated: whether each piece is; then no checksum is taken.

    Raises:
        WireError: they are no pieces of one payload, or it is too large.
    """
    sizes = [len(piece) for piece in pieces]
    is_cut = len(sizes) == 1 or (bool(sizes) and set(sizes[:-1]) == {PIECE_BYTES} and 0 < sizes[-1] <= PIECE_BYTES)
    if not is_cut:
        raise WireError(f"message of {len(sizes) + 1} frames that are no header and pieces of a payload")
    num_bytes = sum(sizes)
    if 0 <= max_bytes < num_bytes:
        raise WireError(f"message of {num_bytes} bytes, at most {max_bytes} are taken: --codistill-max-message-mb")
    if len(pieces) == 1:
        return pieces[0], None if is_authenticated else zlib.crc32(pieces[0])
    whole, checksum, start = buffers.take(num_bytes), 0, 0
    for piece in pieces:
        whole[start : start + len(piece)] = piece
        checksum = checksum if is_authenticated else zlib.crc32(piece, checksum)
        start += len(piece)
    return whole, None if is_authenticated else checksum
