"""Owns how a codistilled fairseq training ends before its time: it saves after the update at hand, and leaves.

It is asked to by SIGTERM or SIGINT, or by an error of the exchange that it cannot go on from. Before the first update
there is nothing to save: the process ends at once. It never validates on the way out (that may take longer than whoever
sent the signal waits), and decides nothing about when fairseq saves otherwise.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import torch

from fairseq_codistill.workers import SAME_REQUEST_S

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# In the logging outputs, which fairseq sums over the ranks: whether to stop, and whether it is for an error.
KEY, FAILED = "codistill_stop", "codistill_failed"


class Stopping:
    """Of one rank; all ranks of a model stop after the same update.

    Args:
        interrupt: called from the signal handler with the reason; whatever waits for other models is to return.
    """

    def __init__(self, interrupt: Callable[[str], None]):
        self.trainer: Any = None
        self._interrupt = interrupt
        self._number: int | None = None  # of the signal that came to this rank
        self._came_at = 0.0
        self._error: Exception | None = None  # that this rank cannot go on from
        self._is_agreed = self._has_any_failed = False
        self._is_training = False
        self._is_saving = False
        self._pid = os.getpid()

    def install(self) -> None:
        """Take the signals over. Where this is not the main thread, whose handlers they are, nothing changes."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked worker, before it has handlers of its own
        if not self._is_training:
            raise SystemExit(128 + number)
        if self._number is None:
            self._number, self._came_at = number, time.monotonic()
            self._interrupt(signal.Signals(number).name)
        elif number == signal.SIGINT and not self._is_saving and time.monotonic() - self._came_at > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._pid, number)

    def begin(self) -> None:
        """From here on there is something to lose."""
        self._is_training = True

    def fail(self, error: Exception) -> None:
        """End with this error of the exchange after the update at hand, which is made without the peers."""
        if self._error is None:
            self._error = error
            logger.warning("codistillation: training ends after this update: %s", error)
            self._interrupt("an error")

    @property
    def is_leaving(self) -> bool:
        """Whether the checkpoint of the end is being written."""
        return self._is_saving

    @property
    def request(self) -> dict[str, float]:
        """What this rank asks for, for the logging outputs."""
        failed = float(self._error is not None)
        return {KEY: max(failed, float(self._number is not None)), FAILED: failed}

    def agree(self, logging_outputs: list[dict]) -> bool:
        """Whether to stop, from what fairseq summed over all ranks: all of them read the same."""
        asked, failed = (sum(float(log.get(key, 0)) for log in logging_outputs) > 0 for key in (KEY, FAILED))
        self._is_agreed, self._has_any_failed = self._is_agreed or asked, self._has_any_failed or failed
        return self._is_agreed

    def leave_if_asked(self, epoch_iterator: Any, say_goodbye: Callable[[str], None]) -> None:
        """Between two updates: save and end this process, if that was agreed on.

        Args:
            epoch_iterator: fairseq's, where training stands.
            say_goodbye: tells the peers why, before the checkpoint is written: nobody waits meanwhile.

        Raises:
            SystemExit: once the checkpoint is written, with 128 + the signal's number; with 1 after an error of another
                rank.
            Exception: that this rank could not go on from, as :meth:`fail` was told it.
        """
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if self._is_agreed or (is_alone and self.request[KEY]):
            self._leave(epoch_iterator, say_goodbye)

    def _leave(self, epoch_iterator: Any, say_goodbye: Callable[[str], None]) -> NoReturn:
        from fairseq import checkpoint_utils
        from fairseq.file_io import PathManager

        number = self._number or signal.SIGTERM
        has_failed = self._error is not None or self._has_any_failed
        if has_failed:
            name = "an error of another rank" if self._error is None else "an error"
        else:
            name = "a signal to another rank" if self._number is None else signal.Signals(number).name
        trainer = self.trainer
        assert trainer is not None  # fairseq loads a checkpoint, or finds none, before it trains
        settings = trainer.cfg.checkpoint
        self._is_saving = True
        say_goodbye(f"ended by {name}" if has_failed else f"stopped by {name}")  # what was stopped may come back
        saved = checkpoint_utils.save_checkpoint(settings, trainer, epoch_iterator, None)
        if settings.write_checkpoints_asynchronously:
            PathManager.async_close()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # who starts ranks ends all of them once one has ended
        logger.warning(
            "codistillation: stopped by %s after update %d; %s", name, trainer.get_num_updates(),
            f"saved {saved}" if saved else "the first rank saves" if trainer.data_parallel_rank else "nothing is saved "
            "(--no-save or --no-last-checkpoints)",
        )  # fmt: skip
        if self._error is not None:
            raise self._error
        raise SystemExit(1 if has_failed else 128 + number)
