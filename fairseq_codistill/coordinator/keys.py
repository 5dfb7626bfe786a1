"""Owns the identity of a batch: its data position, and the fingerprint of what is in it.

The position is the clock of codistillation. It must never depend on the number of updates a model made, on time, or
on anything else that differs between models.
"""

import hashlib
from collections.abc import Iterable
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


def fingerprint(sample_ids: Tensor, targets: Tensor, pixels: Tensor | None = None) -> bytes:
    """Digest of a batch: equal on two models exactly when they hold the same examples with the same targets in order.

    Args:
        sample_ids: (batch,) integer ids of the examples.
        targets: (num_rows,) integer targets without padding, in batch order.
        pixels: uint8 tensor of any shape, the inputs where they are drawn at random (augmented images).

    Returns:
        16 bytes.
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    for tensor in (sample_ids, targets):
        values = tensor.detach().to("cpu", torch.int64).contiguous()
        digest.update(values.numel().to_bytes(8, "little"))
        digest.update(values.numpy().tobytes())
    if pixels is not None:
        digest.update(repr(tuple(pixels.shape)).encode())
        digest.update(pixels.detach().to("cpu", torch.uint8).contiguous().numpy().data)
    return digest.digest()


def parameters_digest(parameters: Iterable[Tensor]) -> str:
    """Hex digest of the values of all parameters: equal for two models that start as one."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in parameters:
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
