"""Owns what a peer's predictions can be once they are decoded: all that losses need to know of how they travelled.

A dense codec's are a plain tensor; the others say which classes they speak of. Each is paired with the divergence that
is made for it in ``losses.distillation``.
"""

import dataclasses

import torch
from torch import Tensor


def moved(values: Tensor, device: torch.device) -> Tensor:
    """The same values on a device; to a GPU through pinned memory, which torch frees once read, so nothing waits."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Logits of some classes, the same for every row.

    Attributes:
        values: (num_rows, S) float.
        classes: (S,) int64, all different.
    """

    values: Tensor
    classes: Tensor

    def finite_rows(self) -> Tensor:
        """(num_rows,) bool: rows that can be distilled from."""
        return torch.isfinite(self.values).all(dim=1)

    def select(self, rows: Tensor | slice) -> "Columns":
        """Only some rows: a slice of them, or those that are True in (num_rows,) ``rows``."""
        return dataclasses.replace(self, values=self.values[rows])

    def to(self, device: torch.device) -> "Columns":
        """The same, on ``device``."""
        return Columns(moved(self.values, device), moved(self.classes, device))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Classes drawn from the peer's softmax, with replacement.

    Attributes:
        classes: (num_rows, K) int64; -1 throughout a row whose softmax was not finite.
    """

    classes: Tensor

    def finite_rows(self) -> Tensor:
        """(num_rows,) bool: rows that can be distilled from."""
        return (self.classes >= 0).all(dim=1)

    def select(self, rows: Tensor | slice) -> "Tokens":
        """Only some rows: a slice of them, or those that are True in (num_rows,) ``rows``."""
        return Tokens(self.classes[rows])

    def to(self, device: torch.device) -> "Tokens":
        """The same, on ``device``."""
        return Tokens(moved(self.classes, device))


@dataclasses.dataclass(frozen=True)
class TopK:
    """The largest logits of each row.

    Attributes:
        values: (num_rows, K) float, logits in descending order.
        classes: (num_rows, K) int64, their classes.
        log_norm: (num_rows,) float32, logsumexp over all classes; ``values - log_norm`` are log-probabilities.
    """

    values: Tensor
    classes: Tensor
    log_norm: Tensor

    def finite_rows(self) -> Tensor:
        """(num_rows,) bool: rows that can be distilled from."""
        return torch.isfinite(self.values).all(dim=1) & torch.isfinite(self.log_norm)

    def select(self, rows: Tensor | slice) -> "TopK":
        """Only some rows: a slice of them, or those that are True in (num_rows,) ``rows``."""
        return TopK(self.values[rows], self.classes[rows], self.log_norm[rows])

    def to(self, device: torch.device) -> "TopK":
        """The same, on ``device``."""
        return TopK(moved(self.values, device), moved(self.classes, device), moved(self.log_norm, device))


@dataclasses.dataclass(frozen=True)
class Steps:
    """Every logit in 8 bits, as it travels: so it goes to an accelerator, and is multiplied out there.

    Attributes:
        values: (num_rows, num_classes) int8.
        scales: (num_rows,) float32, of one step; NaN for a row that was not finite.
    """

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """(num_rows, num_classes)"""
        return self.values.shape

    def logits(self) -> Tensor:
        """(num_rows, num_classes) float32, on the device where the steps are."""
        return self.values * self.scales.unsqueeze(1)

    def finite_rows(self) -> Tensor:
        """(num_rows,) bool: rows that can be distilled from."""
        return torch.isfinite(self.scales)

    def select(self, rows: Tensor | slice) -> "Steps":
        """Only some rows: a slice of them, or those that are True in (num_rows,) ``rows``."""
        return Steps(self.values[rows], self.scales[rows])

    def to(self, device: torch.device) -> "Steps":
        """The same, on ``device``."""
        return Steps(moved(self.values, device), moved(self.scales, device))


PeerPredictions = Tensor | Columns | Tokens | TopK | Steps


@dataclasses.dataclass
class Exchange:
    """What one position brought.

    Attributes:
        predictions: model -> what that peer sent, on the CPU: (num_rows, num_classes) logits in the dtype that
            travelled, or one of the classes above.
        num_skipped: peers whose predictions were due but cannot be used (late, away, misaligned).
        wait_s: seconds spent waiting for them.
        sent_bytes: handed to the transport for this position.
    """

    predictions: dict[int, PeerPredictions]
    num_skipped: int = 0
    wait_s: float = 0.0
    sent_bytes: int = 0
