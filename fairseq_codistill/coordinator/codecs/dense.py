"""Owns the codecs that send every logit: as floats of one dtype, or as 8-bit steps with a scale a row."""

import torch
from torch import Tensor

from fairseq_codistill.coordinator.buffers import Buffers
from fairseq_codistill.coordinator.codecs.codec import Codec, from_bytes
from fairseq_codistill.coordinator.late import LatePayload
from fairseq_codistill.coordinator.predictions import Steps


class DenseCodec(Codec):
    """Every logit, in one float dtype.

    Error: fp32 none; fp16 relative 2⁻¹¹, and a logit beyond ±65,504 becomes infinite, which the receiver sees as a
    row it must not distil from; bf16 relative 2⁻⁸ over the range of fp32.
    """

    def __init__(self, name: str, code: int, dtype: torch.dtype):
        self.name = name
        self.code = code
        self.dtype = dtype
        self._buffers = Buffers()

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return num_rows * num_classes * self.dtype.itemsize

    def encode(self, predictions: Tensor, seed: int = 0, targets: Tensor | None = None) -> memoryview | LatePayload:
        # A copy even where dtype and device already fit: the payload outlives the training step that made it. From an
        # accelerator it comes in the dtype that travels.
        values = predictions.detach()
        if values.device.type != "cpu":
            return self.payload(values.to(self.dtype, copy=True))
        payload = self._buffers.take(values.numel() * self.dtype.itemsize)
        if len(payload):
            torch.frombuffer(payload, dtype=self.dtype).view(values.shape).copy_(values)
        return payload

    def decode(
        self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0, targets: Tensor | None = None
    ) -> Tensor:
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

    def encode(self, predictions: Tensor, seed: int = 0, targets: Tensor | None = None) -> memoryview | LatePayload:
        values = predictions.detach().float()
        scales = values.abs().amax(dim=1) / 127 if values.numel() else values.new_zeros(values.size(0))
        steps = (values / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).nan_to_num(0, 0, 0)
        scales = torch.where(torch.isfinite(scales), scales, torch.nan)
        return self.payload(scales, steps.round().clamp(-127, 127).to(torch.int8))

    def decode(
        self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0, targets: Tensor | None = None
    ) -> Steps:
        self.check_length(payload, num_rows, num_classes)
        scales = from_bytes(memoryview(payload)[: 4 * num_rows], torch.float32)
        steps = from_bytes(memoryview(payload)[4 * num_rows :], torch.int8).view(num_rows, num_classes)
        return Steps(steps, scales)
