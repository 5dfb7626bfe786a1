"""Owns ``--codistill-budget-mbit``: at which positions there is room for a message, and how many draws fit into it.

When is a pure function of the position and of the rows of its batch, which all models know: nobody asks. How many draws
a row is the sender's own affair, since a payload of ``counts`` says it; they are what its bits so far have left over.
"""

import math

from torch import Tensor

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.codecs.counts import CountsCodec
from fairseq_codistill.coordinator.transports.sealing import HEADER_OVERHEAD, PAYLOAD_OVERHEAD
from fairseq_codistill.coordinator.wire import HEADER_BYTES

WORTHWHILE_BITS = 24  # a row: below that, rather exchange less often
MOST_SAVED = 4  # messages' worth of bits that sharp predictions may leave to those after them
ATTEMPTS = 4


class Budget:
    """Of one rank.

    Args:
        budget_mbit: an update, over all peers and messages.
        num_receivers: peers that a message goes to.
        messages_per_update: micro-batches and their parts.
        interval: T.
        num_updates: of the whole run, None where nobody knows; then every position has the same.
        overhead_bytes: of a message, beside its payload.
    """

    def __init__(
        self,
        budget_mbit: float,
        num_receivers: int,
        messages_per_update: int,
        interval: int,
        num_updates: int | None = None,
        overhead_bytes: int = HEADER_BYTES,
    ):
        self._overhead_bits = 8 * overhead_bytes
        self._bits = int(budget_mbit * 1e6 * interval / max(1, num_receivers * messages_per_update))  # of a message
        self._interval, self._num_updates = interval, num_updates
        self._saved, self._cost = 0.0, 0
        self._bits_per_draw = float(WORTHWHILE_BITS) / 4  # a row: what the last message came to

    def spacing(self) -> int:
        """Updates between two positions that anything is sent at, as far as the last message tells."""
        return self._interval * max(1, -(-self._cost // max(1, self._bits)))

    def has_room(self, elapsed: int, num_rows: int) -> bool:
        """Whether anything is sent at a position that is due; the same on all models.

        Args:
            elapsed: updates' worth of batches since the start of training.
            num_rows: of the message.
        """
        turn, cost = elapsed // self._interval, self._least(num_rows)
        self._cost = cost
        return self._bits >= cost or (turn + 1) * self._bits // cost > turn * self._bits // cost

    def encode(
        self, codec: CountsCodec, predictions: Tensor, seed: int, targets: Tensor | None, elapsed: int
    ) -> memoryview:
        """A payload of as many draws a row as there is room for, 1 to K.

        Args:
            codec: its K is the most.
            predictions, seed, targets: as for :meth:`CountsCodec.encode`.
            elapsed: position; late ones get more than early ones, once and a half against half on average.
        """
        num_rows = max(1, predictions.size(0))
        room = max(self._bits, self._least(num_rows)) * self._share(elapsed)
        limit = room + self._saved - self._overhead_bits
        draws = self._draws(limit, num_rows, codec.num_tokens)
        payload = codec.encode(predictions, seed, targets, draws)
        for _ in range(ATTEMPTS):
            self._bits_per_draw = 8 * len(payload) / num_rows / draws
            if 8 * len(payload) <= limit or draws == 1:
                break
            draws = min(draws - 1, self._draws(limit, num_rows, codec.num_tokens))
            payload = codec.encode(predictions, seed, targets, draws)
        spent = 8 * len(payload) + self._overhead_bits
        self._saved = min(max(self._saved + room - spent, -room), MOST_SAVED * room)
        return payload

    def _least(self, num_rows: int) -> int:
        return max(1, self._overhead_bits + WORTHWHILE_BITS * num_rows)

    def _draws(self, limit: float, num_rows: int, most: int) -> int:
        return min(most, max(1, math.floor(limit / num_rows / max(self._bits_per_draw, 1e-3))))

    def _share(self, elapsed: int) -> float:
        if not self._num_updates:
            return 1.0
        return 0.5 + min(1.0, elapsed / self._num_updates)


def budget_of(
    config: CodistillationConfig, num_peers: int, messages_per_update: int, num_updates: int | None
) -> Budget | None:
    """That of a run; None where it has none. Through a relay a message leaves once, with a header for each receiver."""
    if not config.codistill_budget_mbit:
        return None
    num_receivers = config.codistill_peers_per_position or num_peers
    overhead_bytes = HEADER_BYTES
    if config.codistill_relay:
        overhead_bytes = num_receivers * (HEADER_BYTES + HEADER_OVERHEAD) + PAYLOAD_OVERHEAD
        num_receivers = 1
    interval, budget_mbit = config.codistill_interval, config.codistill_budget_mbit
    return Budget(budget_mbit, num_receivers, messages_per_update, interval, num_updates, overhead_bytes)
