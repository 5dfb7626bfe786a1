"""Owns the step on one batch: its forward pass, what is exchanged of it, its loss and its gradients, whole or in parts.

In how many parts is what the models agreed on; the gradient is the same. It never touches the optimizer.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_codistill import schedules
from fairseq_codistill.lookahead import undisturbed
from fairseq_codistill.sampling import Timetable
from fairseq_codistill.split_step import part_bounds, run_split_step

from .config import VisionConfig
from .data import Batch
from .exchange import Begun


@contextlib.contextmanager
def finite_buffers(model: nn.Module, is_needed: bool) -> Iterator[None]:
    """What fp16 overflows to goes into no running mean: the update is left out, but they would keep it for ever."""
    buffers = [value for value in model.buffers() if value.is_floating_point()] if is_needed else []
    kept = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(torch.where(buffer.isfinite(), buffer, before))


def loss_scale(scaler: torch.amp.GradScaler) -> Tensor:
    """() the scale as it is now, where it lies: asking for its value would wait for an accelerator."""
    scale = scaler._get_scale_async() if scaler.is_enabled() else None  # None too before anything was scaled
    return torch.ones(()) if scale is None else scale.clone()


def smoothing_at(config: VisionConfig, timetable: Timetable, elapsed: int) -> float:
    """The label smoothing in force after so many updates."""
    return schedules.label_smoothing(
        config.label_smoothing,
        config.label_smoothing_end,
        timetable.epoch(elapsed),
        elapsed,
        config.label_smoothing_decay_updates,
        config.label_smoothing_decay_epochs,
        config.label_smoothing_drop_epoch,
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Some images of a batch, or all of them, after their forward pass.

    Attributes:
        classes: (part,) int64.
        predictions: (part, num_classes) float32 logits with gradient.
        supervised: () float32, summed over the images.
        begun: their exchange.
    """

    classes: Tensor
    predictions: Tensor
    supervised: Tensor
    begun: Begun


class Step:
    """Of one of the batches of an update.

    Args:
        trainer: whose it is, of :mod:`~fairseq_codistill.vision.engine`.
        batch: as the loader made it.
        micro_batch: index inside the update.
        following: the batch that comes next.
    """

    def __init__(self, trainer: Any, batch: Batch, micro_batch: int, following: Batch | None = None):
        self._trainer, self._batch, self._micro_batch, self._following = trainer, batch, micro_batch, following
        self._classes = batch.targets.to(trainer.place.device, non_blocking=True)
        self._inputs, self._targets = trainer.normalised(batch.images), self._classes
        if trainer.mixing is not None:  # before it is cut: images are mixed with any other of the batch
            self._inputs, self._targets = trainer.mixing(self._inputs, self._classes, trainer.elapsed, micro_batch)
        num_parts = trainer.exchange.parts_of(trainer.elapsed, micro_batch)
        self._bounds = part_bounds(len(batch.targets), num_parts)

    def run(self, divisor: int) -> Tensor:
        """Add its gradients to those of the parameters.

        Args:
            divisor: of the sum of the losses of the images.

        Returns:
            () float32, that sum, detached.
        """
        trainer, losses = self._trainer, []

        def finish(part: int, begun: Part) -> Tensor:
            loss = self.finish(begun)
            losses.append(loss.detach())
            if self._following is not None and part == len(self._bounds) - 1:
                self._look_ahead(self._following)
            return loss / divisor

        def scaled(loss: Tensor) -> Tensor:
            return trainer.scaler.scale(loss)

        run_split_step(
            len(self._bounds),
            self.forward,
            finish,
            lambda loss: scaled(loss).backward(),  # type: ignore[no-untyped-call]
            trainer.wrapped,
            scaled,
        )
        return torch.stack(losses).sum()

    def forward(self, part: int = 0) -> Part:
        """Forward pass of a part, whose predictions are sent."""
        trainer, config = self._trainer, self._trainer.config
        piece = slice(*self._bounds[part])
        inputs, targets = self._inputs[piece], self._targets[piece]
        predictions = trainer.logits(trainer.forward, inputs)
        smoothing = smoothing_at(config, trainer.timetable, trainer.elapsed)
        supervised = F.cross_entropy(predictions, targets, reduction="sum", label_smoothing=smoothing)
        begun = trainer.exchange.begin(
            predictions,
            trainer.elapsed,
            self._micro_batch,
            self._batch.fingerprint,
            lambda replica: trainer.logits(replica, inputs),
            self._batch.samples,
            (part, self._bounds),
        )
        return Part(self._classes[piece], predictions, supervised, begun)

    def _look_ahead(self, batch: Batch) -> None:
        """Send what the model predicts of the batch that comes next, where that is wanted."""
        trainer = self._trainer
        passed, micro_batch = divmod(self._micro_batch + 1, trainer.config.update_freq)
        elapsed = trainer.elapsed + passed
        if not trainer.exchange.is_next_due(elapsed, micro_batch):
            return
        with undisturbed(trainer.wrapped) as model:
            inputs = trainer.normalised(batch.images)
            if trainer.mixing is not None:
                classes = batch.targets.to(trainer.place.device, non_blocking=True)
                inputs, _ = trainer.mixing(inputs, classes, elapsed, micro_batch)
            trainer.exchange.post_ahead(trainer.logits(model, inputs), elapsed, micro_batch, batch.fingerprint)

    def finish(self, part: Part) -> Tensor:
        """() float32, summed over the images of a part, with gradient; its figures are added up. It waits."""
        trainer = self._trainer
        # Not the wrapped model: it is armed by its own batch, whose backward pass reduces the gradients of both.
        term = trainer.exchange.finish(
            part.begun, trainer.sums, lambda images: trainer.logits(trainer.model, trainer.normalised(images))
        )
        loss = part.supervised if term is None else part.supervised + term
        trainer.sums.add(
            images=len(part.classes),
            loss=loss.detach(),
            nll_loss=part.supervised.detach(),
            correct=(part.predictions.detach().argmax(dim=1) == part.classes).sum(),
        )
        return loss
