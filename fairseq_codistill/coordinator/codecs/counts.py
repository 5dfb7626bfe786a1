"""Owns the codecs that send classes by how often each was drawn, entropy coded: ``counts``, ``label`` and ``vote``.

A payload: 1 byte of flags, 2 of K, 4 that check what is decoded, a bit for each row if any is marked, then the coder's
message. What is said in it is the business of ``frame``.
"""

import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from fairseq_codistill.coordinator.codecs.codec import Codec, CodecError
from fairseq_codistill.coordinator.codecs.coder import Ints, Reader, Writer
from fairseq_codistill.coordinator.codecs.draws import draw_systematically
from fairseq_codistill.coordinator.codecs.frame import Frame, code
from fairseq_codistill.coordinator.codecs.tokens import SENDER_STRIDE
from fairseq_codistill.coordinator.predictions import Tokens

HAS_TARGETS, HAS_MARKS, IS_PLAIN = 1, 2, 4
_HEAD = struct.Struct("<BHI")


class CountsCodec(Codec):
    """The draws of ``tokens``, said by how often each class came, in a fourth of the bits or less.

    The draws that arrive are those of ``tokens:K``, bit for bit. How many bits they take depends on how sure the sender
    is: a row whose target is all that was drawn takes a part of a bit.

    Args:
        num_tokens: K, at most 256.
        salt: added to the seed, so that no two models draw alike.
    """

    name = "counts"
    code = 9

    def __init__(self, num_tokens: int, salt: int = 0):
        self.num_tokens = num_tokens
        self.salt = salt

    def num_bytes(self, num_rows: int, num_classes: int) -> int:
        return _HEAD.size + -(-num_rows // 8) + 4 * num_rows * self.num_tokens

    def encode(
        self, predictions: Tensor, seed: int, targets: Tensor | None = None, num_draws: int | None = None
    ) -> memoryview:
        """As every codec; fewer than K draws a row where ``num_draws`` says so, which the payload tells."""
        draws = self.draw(predictions, seed, num_draws or self.num_tokens)
        return memoryview(pack(draws, predictions.size(1), targets))

    def draw(self, predictions: Tensor, seed: int, num_draws: int) -> Tensor:
        """(num_rows, num_draws) int64 classes, ascending; -1 marks a row."""
        return draw_systematically(predictions, num_draws, seed + SENDER_STRIDE * self.salt)

    def decode(
        self, payload: bytes | memoryview, num_rows: int, num_classes: int, seed: int = 0, targets: Tensor | None = None
    ) -> Tokens:
        if len(payload) > self.num_bytes(num_rows, num_classes):
            raise CodecError(f"{self.name} payload of {len(payload)} bytes, too long for ({num_rows}, {num_classes})")
        return Tokens(unpack(payload, num_rows, num_classes, targets, self.num_tokens))


class LabelCodec(CountsCodec):
    """The most likely class of each row alone.

    Error: it is biased. The cross entropy towards it is that of a peer which is always sure, and pulls a prediction to
    one class where the peer's own is spread over several; nothing of how sure the peer is arrives.
    """

    name = "label"
    code = 10

    def __init__(self) -> None:
        super().__init__(1)

    def draw(self, predictions: Tensor, seed: int, num_draws: int) -> Tensor:
        predictions = predictions.detach()
        # Their largest passes NaN and infinity on, and is -inf where all are; a sum of many would overflow in half.
        finite = torch.isfinite(predictions.amax(dim=1)) if predictions.numel() else predictions.new_ones(0) > 0
        return torch.where(finite, predictions.argmax(dim=1), -1).unsqueeze(1)


class VoteCodec(LabelCodec):
    """As ``label``; the receiver distils from the class that most of all models say, see ``losses.vote``."""

    name = "vote"
    code = 11


def pack(classes: Tensor, num_classes: int, targets: Tensor | None) -> bytes:
    """(R, K) ascending draws, -1 throughout a marked row -> payload."""
    drawn = classes.cpu().numpy()
    marked = drawn[:, 0] < 0
    held = None if targets is None or not _are_classes(targets, num_classes) else targets.cpu().numpy()
    flags = HAS_TARGETS * (held is not None) + HAS_MARKS * bool(marked.any())
    marks = np.packbits(marked).tobytes() if flags & HAS_MARKS else b""
    kept = drawn[~marked]
    coder = Writer()
    code(
        coder, _frame(kept, None if held is None else held[~marked]), drawn.shape[1], num_classes,
        None if held is None else held[~marked], len(kept),
    )  # fmt: skip
    return _HEAD.pack(flags, drawn.shape[1], _check(drawn)) + marks + coder.message()


def unpack(
    payload: bytes | memoryview, num_rows: int, num_classes: int, targets: Tensor | None, most_draws: int
) -> Tensor:
    """The draws that :func:`pack` was given.

    Raises:
        CodecError: it was given none for that shape and those targets, or with more draws a row than ``most_draws``.
    """
    view = memoryview(payload)
    if len(view) < _HEAD.size:
        raise CodecError(f"payload of {len(view)} bytes, without its head of {_HEAD.size}")
    flags, num_draws, check = _HEAD.unpack(view[: _HEAD.size])
    view = view[_HEAD.size :]
    if not 0 < num_draws <= most_draws:
        raise CodecError(f"payload of {num_draws} draws a row, here at most {most_draws}")
    held = None
    if flags & HAS_TARGETS:
        if targets is None or len(targets) != num_rows or not _are_classes(targets, num_classes):
            raise CodecError("the peer's payload leaves out the targets of the batch, and there are none here")
        held = targets.cpu().numpy()
    marked = np.zeros(num_rows, bool)
    if flags & HAS_MARKS:
        num_bytes = -(-num_rows // 8)
        if len(view) < num_bytes:
            raise CodecError(f"payload that ends in its marks of {num_rows} rows")
        marked = np.unpackbits(np.frombuffer(view[:num_bytes], np.uint8), count=num_rows).astype(bool)
        view = view[num_bytes:]
    kept = None if held is None else held[~marked]
    num_kept = int((~marked).sum())
    drawn = np.full((num_rows, num_draws), -1, np.int64)
    drawn[~marked] = _draws(code(Reader(view), None, num_draws, num_classes, kept, num_kept), num_draws, kept)
    if _check(drawn) != check:
        raise CodecError(
            "the draws that were decoded are not those that were sent: the payload is damaged, or the other side has "
            "another release of constriction; install the same on all models"
        )
    return torch.from_numpy(drawn)


def _frame(drawn: Ints, targets: Ints | None) -> Frame:
    num_rows, num_draws = drawn.shape
    is_first = np.ones((num_rows, num_draws), bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    starts = np.flatnonzero(is_first)
    counts = np.diff(starts, append=drawn.size)
    row, classes = starts // max(num_draws, 1), drawn.reshape(-1)[starts]
    of_target, is_other = np.zeros(num_rows, np.int64), np.ones(len(classes), bool)
    if targets is not None:
        is_other = classes != targets[row]
        of_target[row[~is_other]] = counts[~is_other]
    return Frame(of_target, np.bincount(row[is_other], minlength=num_rows), classes[is_other], counts[is_other])


def _draws(frame: Frame, num_draws: int, targets: Ints | None) -> Ints:
    num_rows = len(frame.of_target)
    row = np.repeat(np.arange(num_rows), frame.num_others)
    classes, counts = frame.classes, frame.counts
    if targets is not None:
        row = np.concatenate([row, np.arange(num_rows)])
        classes, counts = np.concatenate([classes, targets]), np.concatenate([counts, frame.of_target])
    order = np.lexsort((classes, row))
    return np.repeat(classes[order], counts[order]).reshape(num_rows, num_draws)


def _are_classes(targets: Tensor, num_classes: int) -> bool:
    return bool(((targets >= 0) & (targets < num_classes)).all())


def _check(drawn: Ints) -> int:
    return zlib.crc32(np.ascontiguousarray(drawn, "<i4").tobytes())
