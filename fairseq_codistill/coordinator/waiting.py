"""Owns waiting: the one loop that all waits for peers go through, and the interrupt that ends it.

Every wait has a timeout, and none outlives an interrupt by more than ``POLL_S`` seconds.
"""

import logging
import time
from collections.abc import Callable

from fairseq_codistill.coordinator.peers import Peer

logger = logging.getLogger(__name__)

POLL_S = 0.25  # how often a waiting rank looks up, to repeat its hello or notice a deadline or an interrupt
LONGEST_LOOK_S = 2.0  # of a process that runs; a longer one was suspended in between


class Waiting:
    """Waits for peers while messages are taken in.

    Args:
        pump: takes in what is there; if nothing is, waits up to the given seconds for something.

    Attributes:
        interruption: why nothing is waited for any more; None while it is.
    """

    def __init__(self, pump: Callable[[float], None]):
        self._pump = pump
        self.interruption: str | None = None

    def interrupt(self, reason: str) -> None:
        """End the wait that is under way, and let no other begin. Only leaves a note: a signal handler may call it."""
        self.interruption = self.interruption or reason

    def wait(
        self,
        missing: Callable[[], list[Peer]],
        timeout_s: float,
        before_each_look: Callable[[list[Peer]], None] = lambda peers: None,
    ) -> tuple[list[Peer], float]:
        """Take messages in until nobody is missing or the time is up.

        Returns:
            who is still missing, nobody after an interrupt; and the seconds waited: a process that was suspended for a
            while did not listen, so that while hardly counts.
        """
        looked, waited_s = time.monotonic(), 0.0
        while True:
            still = missing()
            now = time.monotonic()
            waited_s += min(now - looked, LONGEST_LOOK_S)
            looked = now
            if still and self.interruption is not None:
                models = [peer.model for peer in still]
                logger.info("codistillation: not waiting for models %s: %s", models, self.interruption)
                return [], waited_s
            if not still or waited_s >= timeout_s:
                return still, waited_s
            before_each_look(still)
            self._pump(min(POLL_S, timeout_s - waited_s))
