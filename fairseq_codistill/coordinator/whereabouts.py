"""Owns where this model and its peers are in the data, and at which positions they exchange.

Positions are counted in updates' worth of batches since the start of training, over all epochs, from 0.
"""

from collections.abc import Iterable

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.shelf import CAPACITY


class Whereabouts:
    """Of one rank.

    Args:
        config: validated options.

    Attributes:
        order: how batches are counted; None where nobody said.
        elapsed: position of this rank.
    """

    def __init__(self, config: CodistillationConfig):
        self.order: DataOrder | None = None
        self.elapsed = 0
        self._config = config

    def elapsed_of(self, key: BatchKey) -> int:
        """The position of ``key``; 0 without an order."""
        return 0 if self.order is None else self.order.elapsed(key.epoch, key.position)

    def is_due(self, elapsed: int) -> bool:
        """Whether an exchange happens at a position."""
        return elapsed % self._config.codistill_interval == 0

    def next_exchange(self, elapsed: int) -> int:
        """The first position from ``elapsed`` on at which models wait for each other."""
        interval = self._config.codistill_interval
        return -(-max(elapsed, self._config.codistill_burn_in) // interval) * interval

    def num_behind(self, elapsed: int, peers: Iterable[Peer], within_reach: bool) -> int:
        """How far the most advanced of ``peers`` is ahead; see ``Coordinator.num_behind``."""
        if self.order is None or (
            self._config.codistill_exchange == "checkpoints" and not self._config.codistill_replica_wait
        ):
            return 0  # a copy predicts whatever batch this model is at
        furthest = elapsed
        for peer in peers:
            if peer.hello is None or peer.state is PeerState.FINISHED:
                continue
            announced = peer.hello.get("elapsed")
            if isinstance(announced, int):
                furthest = max(furthest, announced)
            if peer.newest is not None:
                furthest = max(furthest, self.elapsed_of(peer.newest))
        reach = CAPACITY * self._config.codistill_interval
        if not within_reach:
            reach = min(reach, self.next_exchange(elapsed) - elapsed)
        return furthest - elapsed if furthest - elapsed > reach else 0
