"""Owns the entropy coder: whole numbers <-> bytes, given tables of how likely each is. The models are its callers'.

The range coder of ``constriction`` does the work. Tables are whole numbers, which single precision holds as they are,
so both sides have the same on any machine. Both make the same calls, the receiver without the symbols.
"""

import abc
from typing import Any

import constriction
import numpy as np

from fairseq_codistill.coordinator.codecs.codec import CodecError

models, queue = constriction.stream.model, constriction.stream.queue
Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]
MAX_UNIFORM = 2**23  # the coder works with 24 bits
_FAMILY = models.Categorical(perfect=False)


class Coder(abc.ABC):
    """One pass over a message, in either direction.

    Every method takes the symbols to write, which the one that reads is not given, and returns them.
    """

    @abc.abstractmethod
    def _code(self, symbols: Ints | None, number: int, model: Any, *parameters: Any) -> Ints: ...

    def alike(self, symbols: Ints | None, number: int, weights: Ints) -> Ints:
        """``number`` symbols below n with one table, (n,) whole numbers above 0."""
        if number == 0 or len(weights) == 1:
            return np.zeros(number, np.int32)
        return self._code(symbols, number, models.Categorical(weights.astype(np.float32), perfect=False))

    def each(self, symbols: Ints | None, weights: Ints) -> Ints:
        """One symbol below n for each of the (m, n) tables."""
        number, num_symbols = weights.shape
        if number == 0 or num_symbols == 1:
            return np.zeros(number, np.int32)
        return self._code(symbols, number, _FAMILY, weights.astype(np.float32))

    def evenly(self, symbols: Ints | None, number: int, size: int) -> Ints:
        """``number`` symbols below ``size``, at most MAX_UNIFORM, all equally likely."""
        if number == 0 or size == 1:
            return np.zeros(number, np.int32)
        return self._code(symbols, number, models.Uniform(size))


class Writer(Coder):
    """Makes a message."""

    def __init__(self) -> None:
        self._encoder = queue.RangeEncoder()

    def _code(self, symbols: Ints | None, number: int, model: Any, *parameters: Any) -> Ints:
        assert symbols is not None
        self._encoder.encode(symbols.astype(np.int32), model, *parameters)
        return symbols

    def message(self) -> bytes:
        """All that was written, without zeros at the end."""
        return self._encoder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class Reader(Coder):
    """Reads a message; one that was not written so gives other symbols, or an error.

    Args:
        message: of :meth:`Writer.message`.
    """

    def __init__(self, message: bytes | memoryview):
        padded = bytes(message) + bytes(-len(message) % 4)
        self._decoder = queue.RangeDecoder(np.frombuffer(padded, "<u4").astype(np.uint32))

    def _code(self, symbols: Ints | None, number: int, model: Any, *parameters: Any) -> Ints:
        more = parameters or (number,)
        try:
            return self._decoder.decode(model, *more)
        except (AssertionError, ValueError) as error:
            raise CodecError(f"payload that no sender writes: {error}") from error
