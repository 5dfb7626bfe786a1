"""Owns class ids as bytes: 16 bits each where the classes allow, else 32."""

import torch
from torch import Tensor

from fairseq_codistill.coordinator.codecs.codec import CodecError, from_bytes

MAX_SHORT_CLASSES = 2**16 - 1  # class ids below this fit 16 bits, with one value left to mark a row


def id_dtype(num_classes: int) -> torch.dtype:
    """int16 holds the 16 bits of an unsigned id, of which −1 marks a row."""
    return torch.int16 if num_classes <= MAX_SHORT_CLASSES else torch.int32


def read_ids(payload: bytes | memoryview, num_rows: int, per_row: int, num_classes: int) -> Tensor:
    """(num_rows, per_row) int64 classes, -1 where the sender marked the row.

    Raises:
        CodecError: there is no such class, or a row is marked in part.
    """
    dtype = id_dtype(num_classes)
    ids = from_bytes(payload, dtype).view(num_rows, per_row).to(torch.int64)
    marked = ids == -1
    if dtype is torch.int16:
        ids = torch.where(marked, ids, ids % 2**16)
    if bool((marked.any(dim=1) != marked.all(dim=1)).any()) or bool(((ids < -1) | (ids >= num_classes)).any()):
        raise CodecError(f"payload with class ids that are not below {num_classes}")
    return ids
