"""Owns the state of a peer: whether to wait for it. The only place where that state changes.

::

    EXPECTED --hello--> PRESENT --missed a whole timeout--> AWAY --posts within reach--> PRESENT
    EXPECTED --start timeout--> AWAY
    any --goodbye, or the launcher's notice of its death--> FINISHED
    any --restarted--> AWAY

A late peer costs its timeout once. While it is AWAY or FINISHED nobody waits for it; one that was restarted may be
far behind, so it counts as AWAY until it posts a position within reach: one of those this rank posted last, from which
the peer catches up without waiting, since the predictions for them lie in its mailbox. The next wait then brings the
two back into step.
"""

import enum
import logging
import re
import time

from fairseq_codistill.coordinator.keys import BatchKey

logger = logging.getLogger(__name__)

IN_ORDER = "finished"  # the reason of a goodbye after all of the training
GIVEN_UP = "given up: "  # what a launcher says to a process that it starts again of a model that failed before that
PROCESS_ENDED = "its process ended"  # the reason where nobody gave one: whether it failed says its exit code
STOPPED = re.compile(r"said goodbye: (?:stopped by |.*\bSIG[A-Z]+)")


def farewell(error: BaseException | None, interruption: str | None) -> str:
    """The reason of a goodbye.

    Args:
        error: that training ended with; None: with none.
        interruption: why it was to end before its end, if it was.

    >>> farewell(None, None), farewell(SystemExit(1), "SIGTERM"), farewell(ValueError(), "SIGTERM")
    ('finished', 'stopped by SIGTERM', 'failed: ValueError')
    >>> farewell(SystemExit(0), None), farewell(SystemExit(1), None)
    ('finished', 'failed: SystemExit')
    """
    if interruption is not None and (error is None or isinstance(error, (SystemExit, KeyboardInterrupt))):
        return f"stopped by {interruption}"
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return IN_ORDER
    return f"failed: {type(error).__name__}"


class PeerState(enum.Enum):
    """Where a peer stands, as this rank sees it."""

    EXPECTED = "expected"
    PRESENT = "present"
    AWAY = "away"
    FINISHED = "finished"


SAID = "it said goodbye: "  # what its reason begins with where it told itself why it ends


class Peer:
    """What one rank knows of the rank of the same number in another model.

    Attributes:
        model: index of the peer's model.
        hello: the settings it announced, or None before the first contact.
        newest: latest position it has posted, or None.
        reason: why it is in its state.
        is_done: it has said goodbye after all of its training.
        is_given_up: its launcher says that it failed for good, and that the process that hears of it was there before.
        mismatches_in_a_row: updates in a row whose batches were others.
        mismatched_at: the epoch and position of the latest of them.
        num_lost: how often it was present, and then was not, though it was not done.
        num_found: how often it was present again after that.
    """

    def __init__(self, model: int):
        self.model = model
        self.state = PeerState.EXPECTED
        self.hello: dict | None = None
        self.newest: BatchKey | None = None
        self.mismatches_in_a_row = 0
        self.mismatched_at: tuple[int, int] | None = None
        self.reason = "nothing was heard of it"
        self.is_done = self.is_given_up = False
        self.num_lost = self.num_found = 0
        self._heard_at = time.monotonic()
        self._is_fresh = False  # restarted, and has posted nothing since

    @property
    def is_waited_for(self) -> bool:
        """Whether a step may wait for this peer."""
        return self.state is PeerState.PRESENT

    @property
    def was_stopped(self) -> bool:
        """Whether it ended because it was told to, by a signal: it comes back, as a rule, from what it saved."""
        return STOPPED.search(self.reason) is not None

    def on_hello(self, hello: dict) -> None:
        """It announced itself: for the first time, or after a restart (a new ``incarnation``)."""
        if self.hello is None:
            restarted = self.state is PeerState.FINISHED  # its goodbye was all we had heard
        else:
            restarted = self.hello.get("incarnation") != hello.get("incarnation")
        self.hello = hello
        self._heard_at = time.monotonic()
        if restarted:
            self.newest = None
            self.mismatches_in_a_row, self.mismatched_at = 0, None
            self.is_done, self.is_given_up, self._is_fresh = False, False, True
            self._change(PeerState.AWAY, "it was restarted; exchanging again once it reaches the current position")
        elif self.state is PeerState.EXPECTED:
            self._change(PeerState.PRESENT, "first contact")

    def on_posted(self, key: BatchKey, within_reach: BatchKey | None) -> None:
        """It posted predictions for ``key``; it can catch up from ``within_reach`` on (None: no exchange yet)."""
        self._heard_at, self._is_fresh = time.monotonic(), False
        if self.newest is None or key > self.newest:
            self.newest = key
        if self.state is PeerState.AWAY and (within_reach is None or key >= within_reach):
            self._change(PeerState.PRESENT, f"it posted {key}")

    def on_missed(self, key: BatchKey, waited_s: float) -> None:
        """Its predictions for ``key`` did not come within the timeout."""
        if self.state is PeerState.PRESENT:
            self._change(
                PeerState.AWAY,
                f"nothing for {key} in {waited_s:.1f} s (its latest: {self.newest or 'none'}); "
                "nobody waits for it until it is back",
            )

    def on_start_timeout(self, waited_s: float) -> None:
        """It was never met within the start timeout."""
        if self.state is PeerState.EXPECTED:
            self._change(PeerState.AWAY, f"no contact in {waited_s:.1f} s; training starts without it")

    def on_goodbye(self, reason: str, is_done: bool = False) -> None:
        """It will post no more.

        Args:
            reason: for the log.
            is_done: after all of its training.
        """
        self.is_done = self.is_done or is_done
        if self.state is not PeerState.FINISHED:
            self._change(PeerState.FINISHED, reason)

    def on_notice(self, reason: str, is_done: bool = False) -> None:
        """Its launcher says that its process has ended.

        That news may be overtaken by the hello of the next process, which it is not about. What the dead one sent
        before may come after it, and does not bring it back. What it said of its end itself stands: a program that was
        stopped, or failed, may end with exit code 0 all the same.
        """
        is_told = self.state is PeerState.FINISHED and self.reason.startswith(SAID)
        if not self._is_fresh and (not is_told or self.reason == SAID + PROCESS_ENDED):
            self.is_given_up = GIVEN_UP in reason
            self.on_goodbye(reason, is_done)

    def expect_again(self) -> None:
        """Before training: its process has ended and is started again, so it is still to be met."""
        self.hello = self.newest = None
        self.is_given_up = False
        if self.state is not PeerState.EXPECTED:
            self._change(PeerState.EXPECTED, "its launcher starts it again")

    def is_gone(self, silent_since: float, dead_since: float) -> bool:
        """Whether nothing was heard of it for long.

        Args:
            silent_since: monotonic seconds; of one that nobody waits for.
            dead_since: likewise, of one that is present: where nothing is waited for, nobody misses it.
        """
        return self._heard_at <= (dead_since if self.state is PeerState.PRESENT else silent_since)

    @property
    def silent_s(self) -> float:
        """Seconds since anything was heard of it."""
        return time.monotonic() - self._heard_at

    def is_past(self, key: BatchKey) -> bool:
        """Whether it has gone beyond ``key``: posts are in order, so what has not come by then never will."""
        return self.newest is not None and self.newest > key

    def has_reached(self, key: BatchKey) -> bool:
        """Whether it has posted for ``key`` or gone beyond."""
        return self.newest is not None and self.newest >= key

    def _change(self, state: PeerState, reason: str) -> None:
        level = logging.INFO if state in (PeerState.PRESENT, PeerState.FINISHED) else logging.WARNING
        logger.log(
            level, "codistillation: model %d is %s (was %s): %s", self.model, state.value, self.state.value, reason
        )
        if self.state is PeerState.PRESENT:
            self.num_lost += not self.is_done
        elif state is PeerState.PRESENT:
            self.num_found += self.num_lost > self.num_found
        self.state, self.reason = state, reason
