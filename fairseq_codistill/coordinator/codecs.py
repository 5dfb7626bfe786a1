"""Owns the way predictions become bytes and back. A codec knows nothing of peers, data positions or losses.

``encode`` rounds or samples; ``decode`` of what it wrote is what the peer distils from. The error of each codec is
documented with it and tested; ``benchmarks/codecs.py`` measures it, with bits and time.
"""

import abc
from typing import Any

import torch
from torch import Tensor

from fairseq_codistill.config import split_codec


class CodecError(ValueError):
    """A payload that cannot be what its header says."""


class Codec(abc.ABC):
    """Predictions <-> bytes.

    Attributes:
        name: what the user calls it, without its size.
        code: its number on the wire, never reused.
    """

    name: str
    code: int

    @abc.abstractmethod
    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        """Exact length of a payload for predictions of that shape."""

    @abc.abstractmethod
    def encode(self, predictions: Tensor, seed: int) -> memoryview:
        """Args:
        predictions: (num_rows, num_classes), any float dtype, any device; read, not kept.
        seed: of the data position, the same on all models; for codecs that draw at random.
        """

    @abc.abstractmethod
    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int) -> Any:
        """Returns:
            what the peer told of its (num_rows, num_classes) predictions, on the CPU: the logits themselves, or one of
            the classes of ``sampled_codecs``.

        Raises:
            CodecError: the payload is not one that this codec writes for that shape.
        """

    def check_length(self, payload: bytes | memoryview, num_rows: int, num_classes: int) -> None:
        """Raises:
        CodecError: the payload has another length than that shape needs.
        """
        expected = self.num_bytes(num_rows, num_classes)
        if len(payload) != expected:
            raise CodecError(
                f"{self.name} payload of {len(payload)} bytes, but ({num_rows}, {num_classes}) takes {expected}"
            )


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

    def encode(self, predictions: Tensor, seed: int = 0) -> memoryview:
        # A copy even where dtype and device already fit: the payload outlives the training step that made it.
        return as_bytes(predictions.detach().to(device="cpu", dtype=self.dtype, copy=True))

    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0) -> Tensor:
        self.check_length(payload, num_rows, num_classes)
        return from_bytes(payload, self.dtype).view(num_rows, num_classes)


class Int8Codec(Codec):
    """Every logit in 8 bits, with one fp32 scale a row: its largest magnitude is 127 steps.

    Error: at most half a step, 1/254 of the row's largest magnitude, for every logit. A row that holds a NaN or an
    infinity arrives as NaN altogether.
    """

    name = "int8"
    code = 4

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return num_rows * (num_classes + 4)

    def encode(self, predictions: Tensor, seed: int = 0) -> memoryview:
        values = predictions.detach().float()
        scales = values.abs().amax(dim=1) / 127 if values.numel() else values.new_zeros(values.size(0))
        steps = (values / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).nan_to_num(0, 0, 0)
        scales = torch.where(torch.isfinite(scales), scales, torch.nan)
        return joined(scales.cpu(), steps.round().clamp(-127, 127).to(torch.int8).cpu())

    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0) -> Tensor:
        self.check_length(payload, num_rows, num_classes)
        scales = from_bytes(memoryview(payload)[: 4 * num_rows], torch.float32)
        steps = from_bytes(memoryview(payload)[4 * num_rows :], torch.int8).view(num_rows, num_classes)
        return steps * scales.unsqueeze(1)


def as_bytes(values: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous; they keep the tensor alive."""
    if values.numel() == 0:
        return memoryview(b"")
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def joined(*tensors: Tensor) -> memoryview:
    """The bytes of several CPU tensors, one after the other."""
    return memoryview(b"".join(as_bytes(values) for values in tensors))


def from_bytes(payload: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """A flat tensor on the payload's own memory where that can be; nobody writes to it."""
    if len(payload) == 0:
        return torch.empty(0, dtype=dtype)
    writable = not (isinstance(payload, bytes) or payload.readonly)
    return torch.frombuffer(payload if writable else bytearray(payload), dtype=dtype)


def make_codec(codec: str, salt: int = 0) -> Codec:
    """The codec that ``--codistill-codec`` names, such as ``fp16`` or ``tokens:16``.

    Args:
        codec: name, with ``:size`` where the codec has one.
        salt: what the sender adds to the seed of its own draws, so that no two models draw alike.

    Raises:
        ConfigError: there is no such codec, or its size is missing, impossible or not wanted.
    """
    from fairseq_codistill.coordinator import sampled_codecs as sampled

    name, size = split_codec(codec)
    if name == "columns":
        return sampled.SampledColumnsCodec(size)
    if name == "tokens":
        return sampled.SampledTokensCodec(size, salt)
    if name == "topk":
        return sampled.TopKCodec(size)
    if name == "int8":
        return Int8Codec()
    code, dtype = {"fp32": (1, torch.float32), "fp16": (2, torch.float16), "bf16": (3, torch.bfloat16)}[name]
    return DenseCodec(name, code, dtype)
