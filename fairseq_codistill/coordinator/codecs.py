"""Owns the way predictions become bytes and back. A codec knows nothing of peers, keys or losses.

``encode`` rounds; ``decode`` of what it wrote is what the peer distils from. The error bound of each codec is
documented with it and tested.
"""

import abc

import torch
from torch import Tensor


class CodecError(ValueError):
    """A payload that cannot be what its header says."""


class Codec(abc.ABC):
    """Predictions <-> bytes.

    Attributes:
        name: what the user calls it.
        code: its number on the wire, never reused.
    """

    name: str
    code: int

    @abc.abstractmethod
    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        """Exact length of a payload for predictions of that shape."""

    @abc.abstractmethod
    def encode(self, predictions: Tensor) -> memoryview:
        """Args:
        predictions: (num_rows, num_classes), any float dtype, any device; read, not kept.
        """

    @abc.abstractmethod
    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int) -> Tensor:
        """Returns:
            (num_rows, num_classes) on the CPU, in the dtype that travelled.

        Raises:
            CodecError: the payload has another length than that shape needs.
        """


class DenseCodec(Codec):
    """Every logit, in one float dtype.

    Error: fp32 none; fp16 relative 2⁻¹¹, and a logit beyond ±65,504 becomes infinite, which the receiver sees as a
    row it must not distil from; bf16 relative 2⁻⁸ over the range of fp32.
    """

    def __init__(self, name: str, code: int, dtype: torch.dtype):
        self.name = name
        self.code = code
        self.dtype = dtype

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return num_rows * num_classes * self.dtype.itemsize

    def encode(self, predictions: Tensor) -> memoryview:
        # A copy even where dtype and device already fit: the payload outlives the training step that made it.
        values = predictions.detach().to(device="cpu", dtype=self.dtype, copy=True).contiguous()
        if values.numel() == 0:
            return memoryview(b"")
        return memoryview(values.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]

    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int) -> Tensor:
        expected = self.num_bytes(num_rows, num_classes)
        if len(payload) != expected:
            raise CodecError(
                f"{self.name} payload of {len(payload)} bytes, but ({num_rows}, {num_classes}) takes {expected}"
            )
        if expected == 0:
            return torch.empty(num_rows, num_classes, dtype=self.dtype)
        # Without a copy: the tensor keeps the received buffer alive. Nobody writes to it.
        values = torch.frombuffer(bytearray(payload) if isinstance(payload, bytes) else payload, dtype=self.dtype)
        return values.view(num_rows, num_classes)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        DenseCodec("fp32", 1, torch.float32),
        DenseCodec("fp16", 2, torch.float16),
        DenseCodec("bf16", 3, torch.bfloat16),
    )
}
CODECS_BY_CODE: dict[int, Codec] = {codec.code: codec for codec in CODECS.values()}
