"""Owns what a run tells: a JSON line for every record in ``SAVE_DIR/log.jsonl``, TensorBoard, a progress bar.

A record is a flat object; a number that is not finite is ``null``. Every one has ``kind``, ``time`` (seconds since
1970), ``update`` (updates' worth of batches so far) and ``epoch`` (a fraction inside one).

- ``start``: once for every start or resumption: ``options``, ``parameters``, ``classes``, ``updates``, ``versions``.
- ``train``: means since the last such line: ``loss`` = ``nll_loss`` + ``codistill_loss`` + ``codistill_teacher_loss``
  (nats for each image, the first with label smoothing; the last with ``--codistill-teacher``), ``top1`` (percent),
  ``lr``, ``weight_decay``, ``images_per_s``, ``distance`` (of the parameters from their start), ``overflows`` (updates
  that fp16 skipped), and where something was distilled
  ``codistill_mse`` (divergence for each image and peer), ``codistill_agreement`` (share of equal top-1),
  ``codistill_weight``, ``codistill_peers``, ``codistill_skipped``, ``codistill_nonfinite``, ``codistill_wait_ms``,
  ``codistill_staleness`` (age of the copies, with checkpoints) and ``codistill_mbit`` (sent by one device, for each
  update).
- ``valid``: ``valid_loss``, ``valid_top1``, ``valid_top5``, ``valid_images``, ``distance``, ``best_top1``.
- ``end``: ``reason``: ``finished``, the name of a signal, or what went wrong.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_codistill.whole_files import SaveError

logger = logging.getLogger("vision.log")
LOG_NAME = "log.jsonl"
BLOCK_BYTES = 65536


class RunLog:
    """The log of one rank; only the first rank of a model writes anything.

    Args:
        folder: of ``log.jsonl`` and of the files of TensorBoard; None writes no files.
        is_first: whether this is the first rank.
        start: update to begin at.
        stop: update to end at.
        updates_per_epoch: for ``epoch``.
        with_bar: whether to draw a progress bar, where there is a terminal to draw it on.
    """

    def __init__(
        self, folder: Path | None, is_first: bool, start: int, stop: int, updates_per_epoch: int, with_bar: bool
    ):
        self._updates_per_epoch, self._is_first = updates_per_epoch, is_first
        self._file = None
        self._board: Any = None
        if is_first and folder is not None:
            self._file = (folder / LOG_NAME).open("a+b", buffering=0)
            _drop_half_a_line(self._file)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"))
            except ImportError:  # an extra: the JSON lines hold the same
                pass
            except OSError as error:
                _tell_of_board(error)
        hidden = not (is_first and with_bar and sys.stderr.isatty())
        self._bar = tqdm(total=stop, initial=start, disable=hidden, unit="update", dynamic_ncols=True)

    def write(self, kind: str, update: int, **figures: Any) -> None:
        """One record.

        Raises:
            SaveError: it cannot be written.
        """
        if not self._is_first:
            return
        epoch = round(update / self._updates_per_epoch, 4)
        figures = _finite(figures)
        record = {"kind": kind, "time": round(time.time(), 3), "update": update, "epoch": epoch, **figures}
        if self._file is not None:
            self._append(self._file, json.dumps(record, allow_nan=False).encode() + b"\n")
        self._draw(kind, update, figures)
        if kind in ("train", "valid"):
            known = {name: value for name, value in figures.items() if name in SHOWN}
            shown = [f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in known.items()]
            self._say(f"{kind}: epoch {epoch:.2f} update {update}  " + "  ".join(shown))

    def advance(self, images_per_s: float | None = None) -> None:
        """An update is done."""
        if images_per_s is not None:
            self._bar.set_postfix_str(f"{images_per_s:.0f} images/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Let go of the files."""
        self._bar.close()
        for stream in (self._file, self._board):
            if stream is not None:
                with contextlib.suppress(OSError):  # each line was written when it was made
                    stream.close()

    def _draw(self, kind: str, update: int, figures: dict[str, Any]) -> None:
        if self._board is None:
            return
        try:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, update)
        except OSError as error:  # log.jsonl, which is written first, holds the same
            _tell_of_board(error)
            self._board = None

    @staticmethod
    def _append(file: Any, line: bytes) -> None:
        """A whole line, or none of it."""
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            file.truncate(end)
            raise SaveError(f"cannot write {file.name}: {error.strerror}") from error

    def _say(self, line: str) -> None:
        if self._bar.disable:
            logger.info(line)
        else:
            self._bar.write(line, file=sys.stderr)


SHOWN = (
    "loss nll_loss lr images_per_s distance codistill_mse codistill_agreement codistill_mbit valid_loss valid_top1 "
    "valid_top5 best_top1"
).split()


def _finite(value: Any) -> Any:
    """With None, which JSON knows, for NaN and infinity, which it does not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def _tell_of_board(error: OSError) -> None:
    logger.warning("TensorBoard's files cannot be written: %s; going on without", error.strerror)


def _drop_half_a_line(file: Any) -> None:
    """Cut off what a killed run, or a full disk, left after the last whole line."""
    end = position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - BLOCK_BYTES)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position < end:
        file.truncate(position)
