"""Owns what one data position brought: the peers' predictions, and what they cost."""

import dataclasses

from fairseq_codistill.coordinator.sampled_codecs import PeerPredictions


@dataclasses.dataclass
class Exchange:
    """What one position brought.

    Attributes:
        predictions: model -> what that peer sent, on the CPU: (num_rows, num_classes) logits in the dtype that
            travelled, or one of the classes of ``sampled_codecs``.
        num_skipped: peers whose predictions were due but cannot be used (late, away, misaligned).
        wait_s: seconds spent waiting for them.
        sent_bytes: handed to the transport for this position.
    """

    predictions: dict[int, PeerPredictions]
    num_skipped: int = 0
    wait_s: float = 0.0
    sent_bytes: int = 0
