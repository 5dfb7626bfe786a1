"""Owns the arithmetic of traffic: bits counted as they leave, and the formulas they are compared with.

The formulas are those of the paper (section 3.1): bits that one device sends in one iteration.

    all_reduce     2 · b_model
    checkpoints    (n − 1) · b_model / T
    predictions    (n − 1) · b_pred · B / T

``b_model`` is the size of the model in bits, ``b_pred`` that of the predictions of one row (an image, a target
token), ``B`` the number of rows of one device, ``T`` the exchange interval. Only traffic between models counts.
"""

import dataclasses


def all_reduce_bits(num_parameters: int, bits_per_parameter: int = 32) -> float:
    """Bits a device sends per update to average gradients: ``2 · b_model``.

    Args:
        num_parameters: trained parameters of one model.
        bits_per_parameter: width of one gradient value (32 for fp32, 16 for a compressed all_reduce).
    """
    return 2.0 * num_parameters * bits_per_parameter


def checkpoint_bits(num_models: int, num_parameters: int, interval: int, bits_per_parameter: int = 32) -> float:
    """Bits a device sends per update when parameters are exchanged every ``interval`` updates."""
    return (num_models - 1) * num_parameters * bits_per_parameter / interval


def prediction_bits(
    num_models: int, num_rows: float, num_classes: int, interval: int, bits_per_value: float = 32
) -> float:
    """Bits a device sends per update when predictions are exchanged every ``interval`` updates.

    Args:
        num_models: n, at least 1 (one model sends nothing).
        num_rows: rows of one device's share of an update: images, or non-pad target tokens.
        num_classes: classes, or the size of the target vocabulary.
        interval: T.
        bits_per_value: what the codec spends on one logit on average (32, 16, ...; a fraction where it samples).
    """
    return (num_models - 1) * num_rows * num_classes * bits_per_value / interval


@dataclasses.dataclass
class TrafficMeter:
    """Counts what one rank hands to its transport, and what becomes of what it receives.

    ``sent_bytes`` includes our header (see :mod:`~fairseq_codistill.coordinator.wire`) and excludes the framing of
    ZeroMQ (at most 18 bytes a message) and of TCP/IP.
    """

    sent_bytes: int = 0
    sent_messages: int = 0
    unsent_messages: int = 0  # the queue to the peer was full or the peer not connected: dropped here
    received_bytes: int = 0
    received_messages: int = 0
    rejected_messages: int = 0  # malformed, foreign run, impossible sizes
    refused_connections: int = 0  # without the right key
    stale_messages: int = 0  # for a position that is already behind us, or pushed out by newer ones
    mismatched_messages: int = 0  # right position, different batch
    delivered_messages: int = 0  # handed to the coordinator, which counts among them those that are mismatched
    control_messages: int = 0  # hellos and goodbyes
    lost_messages: int = 0  # left a peer, as their numbers tell, and never came: cut off, or killed on their way

    def count_sent(self, num_bytes: int) -> None:
        self.sent_bytes += num_bytes
        self.sent_messages += 1

    def count_received(self, num_bytes: int) -> None:
        self.received_bytes += num_bytes
        self.received_messages += 1

    def summary(self) -> dict[str, int]:
        """Every counter by name, for the log."""
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Tally:
    """What one rank did in all, for the end of a run.

    Attributes:
        updates: updates' worth of batches that this process was at, however many were made before it came.
        exchanges: positions at which something was sent to the peers, or would have been.
        batches_due: batches that were to be distilled on.
        batches_distilled: those of them for which there was something of a peer.
    """

    updates: int = 0
    exchanges: int = 0
    batches_due: int = 0
    batches_distilled: int = 0

    def count_batch(self, is_distilled: bool) -> None:
        """One that was to be distilled on."""
        self.batches_due += 1
        self.batches_distilled += is_distilled

    def summary(self) -> dict[str, float]:
        """Every count by name, and ``share_distilled`` of the batches that were due."""
        share = self.batches_distilled / self.batches_due if self.batches_due else 0.0
        return {**dataclasses.asdict(self), "share_distilled": share}


class Numbering:
    """Tells from the numbers of one peer's messages how many of them never came."""

    def __init__(self) -> None:
        self._lost_before = 0  # of earlier processes of the peer
        self._first: int | None = None
        self._highest = 0
        self._count = 0  # since the peer's last restart

    def restart(self) -> None:
        """The peer is a new process and counts from the beginning."""
        self._lost_before = self.num_lost
        self._first = None

    def note(self, number: int) -> None:
        """A message came. Those before the first one went to an earlier process of ours; 0 is no number."""
        if number < 1:
            return
        if self._first is None:
            self._first, self._highest, self._count = number, number, 0
        self._first, self._highest = min(self._first, number), max(self._highest, number)
        self._count += 1

    def summary(self) -> dict[str, int]:
        """Of the peer's present process: first and highest number seen, how many came, how many are missing."""
        return {
            "first": self._first or 0,
            "highest": self._highest if self._first else 0,
            "received": self._count if self._first else 0,
            "lost": self.num_lost - self._lost_before,
        }

    @property
    def num_lost(self) -> int:
        """So far; one that is overtaken counts until it comes."""
        if self._first is None:
            return self._lost_before
        return self._lost_before + max(0, self._highest - self._first + 1 - self._count)
