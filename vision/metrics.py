"""Owns the figures of training and evaluation: summed where they arise, turned into means where they are logged."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fairseq_codistill.figures import FLOAT_SUMS, TEACHER_SUM, TENSOR_SUMS, means

from .distributed import Place

TRAIN_SUMS = ("updates", "images", "loss", "nll_loss", "correct", "overflows", *TENSOR_SUMS, TEACHER_SUM, *FLOAT_SUMS)


class Sums:
    """Sums of figures since the last line of the log. Tensors stay on their device: adding does not wait for it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._tensors: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self._tensors, self._numbers = {}, dict.fromkeys(TRAIN_SUMS, 0.0)
        self._started = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done here, an evaluation or saving, is no time of training."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began

    def add(self, **figures: Tensor | float) -> None:
        """Add to the sums; a () tensor must be detached."""
        for name, value in figures.items():
            if isinstance(value, Tensor):
                value = value.to(self._device, torch.float32)
                self._tensors[name] = self._tensors[name] + value if name in self._tensors else value
            else:
                self._numbers[name] += value

    def train_record(self, place: Place) -> dict[str, float]:
        """Means over what was added on all ranks, by the names of the log; all ranks must ask at once."""
        total = self._total(place)
        images = max(total["images"], 1)
        seconds = max(time.monotonic() - self._started, 1e-9)
        record = {
            "loss": total["loss"] / images,
            "nll_loss": total["nll_loss"] / images,
            "top1": 100 * total["correct"] / images,
            "images_per_s": total["images"] / seconds,
            "overflows": total["overflows"] / place.world_size,
        }
        has_teachers = TEACHER_SUM in self._tensors  # and so on all ranks
        if total["codistill_exchanges"] or total["codistill_loss"] or has_teachers:
            record |= {name: mean.value for name, mean in means(total, images, has_teachers=has_teachers).items()}
        return record

    def _total(self, place: Place) -> dict[str, float]:
        names = sorted(self._numbers)
        local = [self._tensors.get(name, torch.zeros((), device=self._device)).double() for name in names]
        numbers = torch.tensor([self._numbers[name] for name in names], dtype=torch.float64, device=self._device)
        return dict(zip(names, place.sum(torch.stack(local) + numbers).tolist(), strict=True))


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor], batches: Any, place: Place, between: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Loss and accuracy over the validation images of all ranks.

    Args:
        forward: (batch, 3, size, size) uint8 images -> (batch, num_classes) logits.
        batches: this rank's share, of :func:`vision.data.valid_loader`.
        place: of this process in its model.
        between: called after each batch.

    Returns:
        ``valid_loss`` (cross entropy in nats, without label smoothing), ``valid_top1`` and ``valid_top5`` in percent,
        ``valid_images``.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=place.device)
    for batch in batches:
        images, targets = batch.images.to(place.device), batch.targets.to(place.device)
        logits = forward(images).float()
        best = logits.topk(min(5, logits.size(1)), dim=1).indices  # (batch, 5)
        hits = best == targets[:, None]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum(), torch.tensor(len(targets)).to(place.device)])
        between()
    loss_sum, top1, top5, num_images = place.sum(sums).tolist()
    count = max(num_images, 1)
    return {
        "valid_loss": loss_sum / count,
        "valid_top1": 100 * top1 / count,
        "valid_top5": 100 * top5 / count,
        "valid_images": num_images,
    }
