"""Owns the pieces of a large payload: over ZeroMQ each is a message of its own, so that one is encrypted while the one
before it travels, and the one before that is decrypted and copied to where it belongs.

A payload of up to ``PIECE_BYTES`` is no piece: it comes behind its header as it is. Before each piece comes a label,
before the last one the header as well. Whoever sends draws a number for itself, its stream, under which its pieces
come in order; what stops in the middle, because a process or a connection ended, is forgotten.
"""

import collections
import dataclasses
import itertools
import os
import struct
import zlib
from collections.abc import Iterator

from fairseq_codistill.coordinator.buffers import MAX_BUFFERS, Buffers
from fairseq_codistill.coordinator.wire import WireError

PIECE_BYTES = 2**20
SMALL_BYTES = 2**16  # news: a message up to this is bounded in number, not by the bytes that are queued before it
_MAGIC = b"CDPC"
STREAM_BYTES = 8
# magic, stream, number of the message in it, where the piece begins, bytes of the whole payload
LABEL = struct.Struct(f"<4s{STREAM_BYTES}sQQQ")
LABEL_BYTES = LABEL.size


class Cutter:
    """Cuts the payloads of one process."""

    def __init__(self) -> None:
        self._stream, self._numbers = os.urandom(STREAM_BYTES), itertools.count()

    def cut(self, payload: bytes | memoryview) -> Iterator[tuple[bytes, memoryview]]:
        """(label, piece) of all pieces of one payload, without a copy."""
        view, number = memoryview(payload).cast("B"), next(self._numbers)
        for start in range(0, len(view), PIECE_BYTES):
            label = LABEL.pack(_MAGIC, self._stream, number, start, len(view))
            yield label, view[start : start + PIECE_BYTES]


Joined = tuple[memoryview, memoryview, int | None]  # header, payload, its checksum unless each frame is authenticated


@dataclasses.dataclass
class _Partial:
    """A payload of which ``num_bytes`` have come."""

    number: int
    whole: memoryview
    num_bytes: int = 0
    checksum: int | None = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """Of the piece that comes next."""
        return self.number, self.num_bytes, len(self.whole)


class Joiner:
    """Joins what several senders cut.

    Args:
        max_bytes: what a payload may have; negative: anything.
        max_partial: how many may have come in part; beyond it the one that has not gone on for longest is forgotten.
        is_authenticated: whether each piece is; then no checksum is taken.
    """

    def __init__(self, max_bytes: int, max_partial: int, is_authenticated: bool):
        self._max_bytes, self._max_partial, self._is_authenticated = max_bytes, max_partial, is_authenticated
        self._buffers = Buffers(max(MAX_BUFFERS, max_partial))
        self._partial: collections.OrderedDict[tuple[int | None, bytes], _Partial] = collections.OrderedDict()
        self.num_bytes = 0  # that have come of payloads that are not whole

    @staticmethod
    def is_label(frame: memoryview) -> bool:
        """Whether a piece follows; else the frame should be a header."""
        return frame[: len(_MAGIC)] == _MAGIC

    def whole(self, sender: int | None, header: memoryview, payload: memoryview) -> Joined:
        """What came in one.

        Raises:
            WireError: it is too large.
        """
        self._check_size(len(payload))
        return header, payload, None if self._is_authenticated else zlib.crc32(payload)

    def add(self, sender: int | None, frame: memoryview, piece: memoryview) -> Joined | None:
        """A piece has come.

        Args:
            sender: who must have sent it, where that is known.
            frame: label, and behind it the header if the piece is the last one.
            piece: is copied.

        Returns:
            the message, if it is whole; None while more is to come, and for a piece whose beginning was lost.

        Raises:
            WireError: it is none, or of a payload that is too large.
        """
        if len(frame) < LABEL_BYTES:
            raise WireError(f"label of {len(frame)} bytes, expected {LABEL_BYTES}")
        _, stream, number, start, total = LABEL.unpack_from(frame)
        stop, header = start + len(piece), frame[LABEL_BYTES:]
        if not len(piece) or stop > total or bool(len(header)) != (stop == total):
            self._forget((sender, stream))
            raise WireError(f"piece from {start} to {stop} of {total} bytes, with {len(header)} bytes of header")
        partial = self._find((sender, stream), number, start, total)
        if partial is None:
            return None
        partial.whole[start:stop] = piece
        if partial.checksum is not None:
            partial.checksum = zlib.crc32(piece, partial.checksum)  # while it is in the cache
        partial.num_bytes = stop
        self.num_bytes += len(piece)
        if stop < total:
            return None
        self._forget((sender, stream))
        return header, partial.whole, partial.checksum

    def _find(self, key: tuple[int | None, bytes], number: int, start: int, total: int) -> _Partial | None:
        """What a piece continues or begins."""
        partial = self._partial.get(key)
        if start:
            if partial is not None and partial.place == (number, start, total):
                self._partial.move_to_end(key)
                return partial
            self._forget(key)  # something between was lost: the rest is of no use
            return None
        self._forget(key)
        self._check_size(total)
        while len(self._partial) >= self._max_partial:
            self._forget(next(iter(self._partial)))
        checksum = None if self._is_authenticated else 0
        try:
            whole = self._buffers.take(total)
        except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
            raise WireError(
                f"no memory for a message of {total} bytes ({error}): --codistill-max-message-mb"
            ) from error
        self._partial[key] = _Partial(number, whole, checksum=checksum)
        return self._partial[key]

    def _check_size(self, num_bytes: int) -> None:
        if 0 <= self._max_bytes < num_bytes:
            raise WireError(
                f"message of {num_bytes} bytes, at most {self._max_bytes} are taken: --codistill-max-message-mb"
            )

    def _forget(self, key: tuple[int | None, bytes]) -> None:
        partial = self._partial.pop(key, None)
        if partial is not None:
            self.num_bytes -= partial.num_bytes
