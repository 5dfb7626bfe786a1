"""Owns memory for large payloads that is used again: a fresh buffer costs a page fault every 4 KiB, as much as a copy.

It imports no torch.
"""

import sys
import threading
from collections.abc import Callable

import numpy as np

MIN_BYTES = 2**20  # below it a buffer of one's own is as fast
MAX_BUFFERS = 4


def _fresh(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, dtype=np.uint8)


class Buffers:
    """Lends buffers; one is free again as soon as nobody refers to it or to a view of it. Threads may share it.

    Args:
        max_buffers: how many are kept for another time.
        allocate: makes a flat uint8 array of so many bytes.
        min_bytes: less than that is not kept, nor made by ``allocate``.
    """

    def __init__(
        self,
        max_buffers: int = MAX_BUFFERS,
        allocate: Callable[[int], np.ndarray] = _fresh,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        self._max_buffers, self._allocate, self._min_bytes = max_buffers, allocate, min_bytes
        self._lock = threading.Lock()
        self._buffers: list[np.ndarray] = []

    def take(self, num_bytes: int) -> memoryview:
        """A writable view of so many bytes, whose content is whatever it was."""
        if num_bytes < max(self._min_bytes, 1):
            return memoryview(bytearray(num_bytes))
        with self._lock:
            free = [index for index in range(len(self._buffers)) if sys.getrefcount(self._buffers[index]) == 2]
            fitting = [index for index in free if num_bytes <= self._buffers[index].size <= 2 * num_bytes]
            if fitting:
                found = self._buffers[min(fitting, key=lambda index: self._buffers[index].size)]
            else:
                for index in reversed(free):  # of another size: the batches have grown, or there are fewer
                    del self._buffers[index]
                found = self._allocate(num_bytes + num_bytes // 8)  # batches vary in size
                if len(self._buffers) < self._max_buffers:
                    self._buffers.append(found)
            return memoryview(found)[:num_bytes]  # type: ignore[arg-type]
