"""Owns what codistillation adds to an update of vision training: α · divergence from the peers, and its figures.

A thin adapter: what waits is in the coordinator, the divergences are in ``fairseq_codistill.losses``, the schedule of α
in ``fairseq_codistill.schedules``.
"""

import logging
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fairseq_codistill import schedules
from fairseq_codistill.coordinator import Coordinator, DataOrder, Identity, parameters_digest
from fairseq_codistill.coordinator.replicas import Replicas
from fairseq_codistill.distillation import distil
from vision.config import VisionConfig
from vision.data import augmentation_of
from vision.datasets import Images
from vision.distributed import Place
from vision.metrics import Sums
from vision.sampling import Timetable

logger = logging.getLogger(__name__)


class PeerExchange:
    """One rank's exchange with the same rank of the other models.

    Args:
        config: validated options.
        place: of this process in its model.
        timetable: of the run.
    """

    def __init__(self, config: VisionConfig, place: Place, timetable: Timetable):
        self._config, self._timetable = config, timetable
        self._told = (0.0, 0)  # alpha and epoch that were last in the log
        self._coordinator: Coordinator | None = None
        self._replicas: Replicas | None = None
        self._saved_replicas: dict[str, Any] = {}  # of the checkpoint that training goes on from
        if config.is_codistilled:
            self._coordinator = Coordinator(config, place.rank, place.world_size)

    def meet(self, images: Images, model: nn.Module, elapsed: int) -> None:
        """Wait for the other models, and refuse those whose settings do not go with ours.

        Args:
            images: the data set.
            model: this model, without any wrapper, on its device.
            elapsed: updates' worth of batches before its first one.

        Raises:
            ConfigError: a peer runs with other settings, or holds the same parameters.
        """
        if self._coordinator is None:
            return
        config = self._config
        augmentation, size = augmentation_of(config, images)
        settings = {
            "--dataset": config.dataset.partition(":")[0],  # folders may differ between hosts
            "--batch-size": config.batch_size,
            "--augmentation": augmentation,
            "--image-size": size,
            "--color-jitter": config.color_jitter,
            "--data-fraction": f"1/{config.data_divisor}",
            "classes": images.num_classes,
            "images": len(images.train),
            "updates per epoch": self._timetable.updates_per_epoch,
        }
        if config.codistill_exchange == "checkpoints":
            self._replicas = Replicas(model, config.codistill_codec, config.codistill_replica_mode)
            self._replicas.load_state_dict(self._saved_replicas)
            settings.update(self._replicas.settings(config.codistill_max_message_mb))
        remarks = {
            "torch version": str(torch.__version__),
            "timm version": str(timm.__version__),
            "--model": config.model,
        }
        digest = parameters_digest(model.parameters())
        order = DataOrder(self._timetable.updates_per_pass)
        self._coordinator.meet(Identity(settings, remarks, digest, config.seed), order, elapsed)

    def num_behind(self, elapsed: int, within_reach: bool = True) -> int:
        """Updates' worth of batches to skip, to be where the other models are.

        Args:
            elapsed: this model's position.
            within_reach: whether a lead of theirs that can be caught up counts as none.
        """
        return 0 if self._coordinator is None else self._coordinator.num_behind(elapsed, within_reach)

    def state_dict(self) -> dict[str, Any]:
        """For this model's checkpoint: the copies of the peers, where checkpoints are exchanged."""
        return self._saved_replicas if self._replicas is None else self._replicas.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave; before :meth:`meet`."""
        self._saved_replicas = state

    def term(
        self,
        predictions: Tensor,
        elapsed: int,
        fingerprint: bytes,
        forward: Callable[[nn.Module], Tensor],
        figures: Sums,
    ) -> Tensor | None:
        """α · mean divergence from the peers at one update.

        Args:
            predictions: (batch, num_classes) float32 logits of this model, with gradient.
            elapsed: updates' worth of batches since the start.
            fingerprint: of the batch.
            forward: a copy of a peer -> its (batch, num_classes) logits, where checkpoints are exchanged.
            figures: what there is to log is added to them.

        Returns:
            () float32, summed over the batch; None where nothing is distilled.
        """
        if self._coordinator is None:
            return None
        weight = self._weight(elapsed)
        if weight == 0.0:
            self._coordinator.poll(elapsed)
            return None
        key = self._timetable.key(elapsed)
        if self._replicas is None:
            self._coordinator.post(key, fingerprint, predictions.detach())
            exchange = self._coordinator.collect()
        else:
            exchange = self._coordinator.ask_replicas(key, self._replicas, forward)
            figures.add(staleness=sum(self._replicas.staleness(elapsed)))
        result = distil(predictions, exchange.predictions.values(), self._config.codistill_divergence)
        figures.add(
            exchanges=1,
            weight=weight,
            peers=result.num_peers,
            skipped=exchange.num_skipped,
            wait_ms=exchange.wait_s * 1e3,
            mbit=exchange.sent_bytes * 8e-6,
            divergence=result.divergence,
            distilled_rows=result.num_rows,
            agreeing=result.num_agreeing,
            compared=result.num_compared,
            nonfinite=result.num_nonfinite,
        )
        if result.loss is None:
            return None
        term = weight * result.loss
        figures.add(codistill_loss=term.detach())
        return term

    def poll(self) -> None:
        """Answer peers while this model does something else, such as evaluating."""
        if self._coordinator is not None:
            self._coordinator.poll()

    def close(self, reason: str) -> None:
        """Say goodbye, so that no peer waits. May be called twice."""
        if self._coordinator is not None:
            self._coordinator.close(reason)

    def _weight(self, elapsed: int) -> float:
        assert self._coordinator is not None
        if self._replicas is None and not self._coordinator.is_due(elapsed):
            return 0.0  # copies teach every batch
        config, epoch = self._config, self._timetable.epoch(elapsed)
        weight = schedules.distill_weight(
            config.codistill_weight,
            config.codistill_weight_growth,
            epoch,
            elapsed,
            config.codistill_burn_in,
            config.codistill_weight_max,
        )
        if self._told != (weight, epoch):
            self._told = (weight, epoch)
            logger.info("codistillation: alpha is %.4g in epoch %d", weight, epoch)
        return weight
