"""Owns where this model and its peers are in the data, and at which positions they exchange.

Positions are counted in updates' worth of batches since the start of training, over all epochs, from 0.
"""

from collections.abc import Iterable
from typing import Any

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.meter import Tally
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.shelf import CAPACITY


class Whereabouts:
    """Of one rank.

    Args:
        config: validated options.
        tally: takes the number of positions that this rank was at.

    Attributes:
        order: how batches are counted; None where nobody said.
        is_steady: it is the same in all epochs.
        elapsed: position of this rank.
    """

    def __init__(self, config: CodistillationConfig, tally: Tally):
        self.order: DataOrder | None = None
        self.elapsed, self.is_steady = 0, True
        self._config, self._tally = config, tally
        self._counted: Any = None  # the last position in the tally

    def elapsed_of(self, key: BatchKey) -> int:
        """The position of ``key``; 0 without an order."""
        return 0 if self.order is None else self.order.elapsed(key.epoch, key.position)

    def follow(self, order: DataOrder) -> None:
        """From here on batches are counted so: of data that are made anew for every epoch, which then differ in length.

        Positions are compared within an epoch, and one in a later epoch is ahead of it. What a peer announced as its
        position may be of an epoch of another length, and counts at the start alone.
        """
        self.is_steady, self.order = False, order

    def come_to(self, key: BatchKey) -> None:
        """This rank is at ``key`` now."""
        self.elapsed = self.elapsed_of(key)
        self._count(key[:2] if self.order is None else self.elapsed)

    def pass_by(self, elapsed: int) -> None:
        """This rank is at a position at which nothing may be due."""
        self.elapsed = max(self.elapsed, elapsed)
        self._count(elapsed)

    def _count(self, position: Any) -> None:
        self._tally.updates += position != self._counted
        self._counted = position

    def is_due(self, elapsed: int) -> bool:
        """Whether an exchange happens at a position."""
        return self._config.codistill_weight > 0 and elapsed % self._config.codistill_interval == 0

    def next_exchange(self, elapsed: int) -> int:
        """The first position from ``elapsed`` on at which models wait for each other."""
        interval = self._config.codistill_interval
        return -(-max(elapsed, self._config.codistill_burn_in) // interval) * interval

    def num_behind(self, elapsed: int, peers: Iterable[Peer], within_reach: bool, spacing: int = 1) -> int:
        """How far the most advanced of ``peers`` is ahead; see ``Coordinator.num_behind``.

        Args:
            spacing: updates between two exchanges, where that is more than the interval.
        """
        if self.order is None or (
            self._config.codistill_exchange == "checkpoints" and not self._config.codistill_replica_wait
        ):
            return 0  # a copy predicts whatever batch this model is at
        if self._config.codistill_weight == 0:
            return 0  # nobody waits for anybody
        furthest = elapsed
        for peer in peers:
            if peer.hello is None or peer.state is PeerState.FINISHED:
                continue
            announced = peer.hello.get("elapsed")
            if isinstance(announced, int) and (self.is_steady or not within_reach):
                furthest = max(furthest, announced)
            if peer.newest is not None:
                furthest = max(furthest, self.elapsed_of(peer.newest))
        interval, until_next = self._config.codistill_interval, self.next_exchange(elapsed) - elapsed
        # The mailbox bridges so many exchanges, and who is ahead waits at the first of them, which may be far in a
        # burn-in. At the start the mailbox is empty.
        reach = max(CAPACITY * interval, until_next + (CAPACITY - 1) * interval)
        reach = max(reach, CAPACITY * spacing)
        if not within_reach:
            reach = min(CAPACITY * interval, until_next)
        return furthest - elapsed if furthest - elapsed > reach else 0
