"""Owns the interface of a codec, and tensors as bytes. A codec knows nothing of peers, data positions or losses.

``encode`` rounds or samples; ``decode`` of what it wrote is what the peer distils from. The error of each codec is
documented with it and tested; ``benchmarks/codecs.py`` measures it, with bits and time.
"""

import abc
from typing import Any

import torch
from torch import Tensor

from fairseq_codistill.coordinator.codecs.offload import Offload, SideStream
from fairseq_codistill.coordinator.late import LatePayload


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
    _offload: Offload | None = None

    @abc.abstractmethod
    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        """Exact length of a payload for predictions of that shape; of a codec that compresses, the longest."""

    @abc.abstractmethod
    def encode(self, predictions: Tensor, seed: int, targets: Tensor | None = None) -> memoryview | LatePayload:
        """The bytes; late ones, which nothing waits for here, where the predictions are on a GPU.

        Args:
        predictions: (num_rows, num_classes), any float dtype, any device; read, not kept.
        seed: of the data position, the same on all models; for codecs that draw at random.
        targets: (num_rows,) int64 classes that the models are trained on, which every receiver holds as well; None
            where there are none.
        """

    @abc.abstractmethod
    def decode(
        self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int, targets: Tensor | None = None
    ) -> Any:
        """What the peer told, given what both hold: seed and targets as in :meth:`encode`.

        Returns:
            what the peer told of its (num_rows, num_classes) predictions, on the CPU: the logits themselves, or one of
            the classes of ``predictions``.

        Raises:
            CodecError: the payload is not one that this codec writes for that shape.
        """

    def payload(self, *tensors: Tensor) -> memoryview | LatePayload:
        """The bytes of fresh tensors, one after the other: at once, or late where one of them is on a GPU."""
        device = next((values.device for values in tensors if values.device.type != "cpu"), None)
        if device is not None and device.type == "cuda" and self._offload is None:
            self._offload = Offload(SideStream(device))
        if device is None or self._offload is None:
            return joined(*(values.cpu() for values in tensors))
        return self._offload.start(tensors)

    def check_length(self, payload: bytes | memoryview, num_rows: int, num_classes: int) -> None:
        """Raises:
        CodecError: the payload has another length than that shape needs.
        """
        expected = self.num_bytes(num_rows, num_classes)
        if len(payload) != expected:
            raise CodecError(
                f"{self.name} payload of {len(payload)} bytes, but ({num_rows}, {num_classes}) takes {expected}"
            )


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
