"""Owns the identity of a batch: its data position, and the fingerprint of what is in it.

The position is the clock of codistillation. It must never depend on the number of updates a model made, on time, or
on anything else that differs between models.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

FINGERPRINT_BYTES = 16


class BatchKey(NamedTuple):
    """A data position. Keys of one run are ordered as the batches are.

    Attributes:
        epoch: from 1.
        position: updates' worth of batches before this one in the epoch, from 0.
        micro_batch: index inside the update (fairseq's ``--update-freq``), from 0.
    """

    epoch: int
    position: int
    micro_batch: int = 0

    def __str__(self) -> str:
        return f"epoch {self.epoch} position {self.position} micro-batch {self.micro_batch}"


def fingerprint(sample_ids: Tensor, targets: Tensor) -> bytes:
    """Digest of a batch: equal on two models exactly when they hold the same examples with the same targets in order.

    Args:
        sample_ids: (batch,) integer ids of the examples.
        targets: (num_rows,) integer targets without padding, in batch order.

    Returns:
        16 bytes.
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for tensor in (sample_ids, targets):
        values = tensor.detach().to("cpu", torch.int64).contiguous()
        digest.update(values.numel().to_bytes(8, "little"))
        digest.update(values.numpy().tobytes())
    return digest.digest()
