"""Owns the codecs that send some of the logits: sampled columns, and the largest."""

import numpy as np
import torch
from torch import Tensor

from fairseq_codistill.coordinator.codecs.codec import Codec, CodecError, from_bytes
from fairseq_codistill.coordinator.codecs.ids import id_dtype, read_ids
from fairseq_codistill.coordinator.late import LatePayload
from fairseq_codistill.coordinator.predictions import Columns, TopK, moved


class SampledColumnsCodec(Codec):
    """S classes, drawn anew at every position without replacement, in fp16. No class id travels.

    All models draw the same classes from the seed of the position. The mean squared error over them is an unbiased
    estimate of that over all classes; its variance falls with 1/S. Error of a value: that of fp16.

    Args:
        num_columns: S; where there are fewer classes, all are sent.
    """

    name = "columns"
    code = 5

    def __init__(self, num_columns: int):
        self.num_columns = num_columns

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return 4 + 2 * num_rows * min(self.num_columns, num_classes)

    def encode(self, predictions: Tensor, seed: int, targets: Tensor | None = None) -> memoryview | LatePayload:
        columns, digest = self._draw(predictions.size(1), seed)
        values = predictions.detach().index_select(1, moved(columns, predictions.device))
        return self.payload(digest, values.to(torch.float16))

    def decode(
        self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0, targets: Tensor | None = None
    ) -> Columns:
        self.check_length(payload, num_rows, num_classes)
        columns, digest = self._draw(num_classes, seed)
        if bytes(payload[:4]) != digest.numpy().tobytes():
            raise CodecError(
                "the peer drew other columns for this position; give all models the same --codistill-data-seed and "
                "install the same release on all of them"
            )
        values = from_bytes(memoryview(payload)[4:], torch.float16)
        return Columns(values.view(num_rows, len(columns)), columns)

    def _draw(self, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """The columns, and 4 bytes that tell whether the peer drew the same."""
        # Of numpy's generators this one is promised to draw the same in every release, on every machine.
        generator = np.random.RandomState(seed % 2**32)
        columns = generator.permutation(num_classes)[: self.num_columns]
        check = torch.tensor([int(generator.randint(2**31 - 1))], dtype=torch.int32)
        return torch.from_numpy(columns.astype(np.int64)), check


class TopKCodec(Codec):
    """The K largest logits of each row in fp16, their classes (16 or 32 bits), and the row's logsumexp in fp32.

    Missing entries: for ``mse`` they contribute nothing, so the sum of squares is a lower bound of the dense one. For
    ``kl`` all missing classes together are one event, whose probability is what the K leave over; the divergence over
    these K + 1 events is a lower bound of the dense one. Both bounds are reached when K is the number of classes.

    Args:
        num_kept: K; where there are fewer classes, all are sent.
    """

    name = "topk"
    code = 7

    def __init__(self, num_kept: int):
        self.num_kept = num_kept

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return num_rows * (4 + min(self.num_kept, num_classes) * (2 + id_dtype(num_classes).itemsize))

    def encode(self, predictions: Tensor, seed: int = 0, targets: Tensor | None = None) -> memoryview | LatePayload:
        predictions = predictions.detach()
        log_norm = torch.logsumexp(predictions.float(), dim=1)
        values, classes = predictions.topk(min(self.num_kept, predictions.size(1)), dim=1)
        ids = classes.to(id_dtype(predictions.size(1)))
        values, exact = values.to(torch.float16), values.float()
        # Of what travels: else rounding alone would move probability between the kept classes and all others.
        moved = ((exact - log_norm.unsqueeze(1)).exp() * (values.float() - exact).expm1()).sum(dim=1)
        return self.payload(log_norm + moved.log1p(), values, ids)

    def decode(
        self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0, targets: Tensor | None = None
    ) -> TopK:
        self.check_length(payload, num_rows, num_classes)
        kept, view = min(self.num_kept, num_classes), memoryview(payload)
        ends = 4 * num_rows, 4 * num_rows + 2 * num_rows * kept
        values = from_bytes(view[ends[0] : ends[1]], torch.float16).view(num_rows, kept)
        classes = read_ids(view[ends[1] :], num_rows, kept, num_classes)
        if bool((classes < 0).any()):
            raise CodecError("top-k payload with an empty class")
        return TopK(values, classes, from_bytes(view[: ends[0]], torch.float32))
