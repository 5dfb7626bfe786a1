"""Owns the codecs that send a part of the predictions: sampled columns, sampled tokens, and the largest logits."""

import numpy as np
import torch
from torch import Tensor

from fairseq_codistill.coordinator.codecs.codec import Codec, CodecError, from_bytes, joined
from fairseq_codistill.coordinator.predictions import Columns, Tokens, TopK

MAX_SHORT_CLASSES = 2**16 - 1  # class ids below this fit 16 bits, with one value left to mark a row
CHUNK_ROWS = 512  # rows whose softmax is made at a time while drawing


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

    def encode(self, predictions: Tensor, seed: int) -> memoryview:
        columns, digest = self._draw(predictions.size(1), seed)
        values = predictions.detach().index_select(1, columns.to(predictions.device))
        return joined(digest, values.to("cpu", torch.float16))

    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int) -> Columns:
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


class SampledTokensCodec(Codec):
    """K classes a row, drawn from the sender's softmax with replacement: 16 bits each up to 65,535 classes, else 32.

    The mean of −log p over them is an unbiased estimate of the cross entropy towards the sender, whose gradient is that
    of the KL divergence; its variance falls with 1/K. Draws depend on the seed and the sender only.

    Args:
        num_tokens: K.
        salt: added to the seed, so that no two models draw alike.
    """

    name = "tokens"
    code = 6

    def __init__(self, num_tokens: int, salt: int = 0):
        self.num_tokens = num_tokens
        self.salt = salt

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return num_rows * self.num_tokens * _id_dtype(num_classes).itemsize

    def encode(self, predictions: Tensor, seed: int) -> memoryview:
        generator = torch.Generator(predictions.device).manual_seed((seed + 1_000_003 * self.salt) % 2**63)
        drawn = []
        for rows in predictions.detach().split(CHUNK_ROWS):  # the softmax of all rows would double the memory
            probabilities = torch.softmax(rows.float(), dim=1)
            finite = torch.isfinite(probabilities).all(dim=1, keepdim=True)
            probabilities = torch.where(finite, probabilities, 1.0)
            # A single draw takes torch another way, which on the CPU needs five times as long as two draws.
            tokens = torch.multinomial(probabilities, max(2, self.num_tokens), replacement=True, generator=generator)
            drawn.append(torch.where(finite, tokens[:, : self.num_tokens], -1))
        classes = torch.cat(drawn) if drawn else torch.empty(0, self.num_tokens)
        return joined(classes.to(_id_dtype(predictions.size(1))).cpu())

    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0) -> Tokens:
        self.check_length(payload, num_rows, num_classes)
        return Tokens(_read_ids(payload, num_rows, self.num_tokens, num_classes))


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
        return num_rows * (4 + min(self.num_kept, num_classes) * (2 + _id_dtype(num_classes).itemsize))

    def encode(self, predictions: Tensor, seed: int = 0) -> memoryview:
        predictions = predictions.detach()
        log_norm = torch.logsumexp(predictions.float(), dim=1)
        values, classes = predictions.topk(min(self.num_kept, predictions.size(1)), dim=1)
        ids = classes.cpu().to(_id_dtype(predictions.size(1)))
        return joined(log_norm.cpu(), values.to("cpu", torch.float16), ids)

    def decode(self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0) -> TopK:
        self.check_length(payload, num_rows, num_classes)
        kept, view = min(self.num_kept, num_classes), memoryview(payload)
        ends = 4 * num_rows, 4 * num_rows + 2 * num_rows * kept
        values = from_bytes(view[ends[0] : ends[1]], torch.float16).view(num_rows, kept)
        classes = _read_ids(view[ends[1] :], num_rows, kept, num_classes)
        if bool((classes < 0).any()):
            raise CodecError("top-k payload with an empty class")
        return TopK(values, classes, from_bytes(view[: ends[0]], torch.float32))


def _id_dtype(num_classes: int) -> torch.dtype:
    """int16 holds the 16 bits of an unsigned id, of which −1 marks a row."""
    return torch.int16 if num_classes <= MAX_SHORT_CLASSES else torch.int32


def _read_ids(payload: bytes | memoryview, num_rows: int, per_row: int, num_classes: int) -> Tensor:
    """(num_rows, per_row) int64 classes, -1 where the sender marked the row.

    Raises:
        CodecError: there is no such class, or a row is marked in part.
    """
    dtype = _id_dtype(num_classes)
    ids = from_bytes(payload, dtype).view(num_rows, per_row).to(torch.int64)
    marked = ids == -1
    if dtype is torch.int16:
        ids = torch.where(marked, ids, ids % 2**16)
    if bool((marked.any(dim=1) != marked.all(dim=1)).any()) or bool(((ids < -1) | (ids >= num_classes)).any()):
        raise CodecError(f"payload with class ids that are not below {num_classes}")
    return ids
