"""Owns why training ends before its last update: a signal, or a loss that is not finite any more.

Nothing here saves or ends anything; the trainer does, between two updates.
"""

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairseq_codistill.workers import SAME_REQUEST_S


class NonFiniteLossError(RuntimeError):
    """The loss was not finite for too many updates in a row."""


class Stop:
    """Remembers that SIGTERM or SIGINT came, once there is something to save; a second SIGINT ends the process at once.

    It must come ``SAME_REQUEST_S`` later: whoever signals every process of a job, and the launcher that passes it on,
    say the same thing several times.

    Attributes:
        number: of the signal; 0 until one came.
        is_training: set it once there is something to save. Before, a signal ends the process by ``SystemExit``.
        interrupt: called with the signal's name when it comes, to end a wait that is under way; from the handler.
    """

    def __init__(self) -> None:
        self.number, self._came_at = 0, 0.0
        self.interrupt: Callable[[str], None] = lambda reason: None
        self.is_training = False
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if not self.is_training:
            sys.exit(128 + number)
        if not self.number:
            self.number, self._came_at = number, time.monotonic()
            self.interrupt(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._came_at > SAME_REQUEST_S:
            signal.default_int_handler(number, frame)


class NonFiniteRun:
    """Counts updates in a row whose loss is not finite, on the device: counting waits for nothing, only asking does.

    Args:
        device: of the losses.
    """

    def __init__(self, device: torch.device):
        self._current = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: Tensor) -> None:
        """One update.

        Args:
            loss: () of any float dtype, detached.
        """
        self._current = torch.where(torch.isfinite(loss), 0, self._current + 1)
        self._longest = torch.maximum(self._longest, self._current)

    def longest(self) -> int:
        """The longest such run so far."""
        return int(self._longest)

    def check(self, most: int, elapsed: int, largest: Callable[[int], int]) -> None:
        """Look at the longest run of any rank.

        Args:
            most: updates, ``--max-nonfinite``.
            elapsed: updates' worth of batches so far.
            largest: value of this rank -> the largest one of all ranks.

        Raises:
            NonFiniteLossError: it is that long; on all ranks at once.
        """
        found = largest(self.longest())
        if found >= most:
            raise NonFiniteLossError(
                f"the loss was not finite in {found} updates in a row, up to update {elapsed} (--max-nonfinite is "
                f"{most}); a lower --lr, a longer --warmup-epochs or --amp bf16 may help. What was saved last is finite"
            )
