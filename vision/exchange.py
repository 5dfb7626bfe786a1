"""Owns what codistillation adds to vision training: which images, augmentation and model the others are told of.

A thin adapter of :class:`~fairseq_codistill.codistiller.Codistiller`.
"""

from collections.abc import Callable

import timm
from torch import Tensor, nn

from fairseq_codistill.codistiller import Batch, Codistiller
from fairseq_codistill.coordinator.keys import DataOrder
from fairseq_codistill.sampling import Timetable

from .config import VisionConfig
from .data import augmentation_of
from .datasets import Images
from .distributed import Place
from .metrics import Sums


class PeerExchange:
    """One rank's exchange with the same rank of the other models.

    Args:
        config: validated options.
        place: of this process in its model.
        timetable: of the run.

    Attributes:
        peers: as every training loop has them.
    """

    def __init__(self, config: VisionConfig, place: Place, timetable: Timetable):
        self._config, self._timetable = config, timetable
        self._order = DataOrder(timetable.updates_per_pass * config.update_freq, [config.update_freq])
        self.peers = Codistiller(config, rank=place.rank, world_size=place.world_size)

    def meet(self, images: Images, model: nn.Module, elapsed: int, num_updates: int) -> None:
        """Wait for the other models, and refuse those whose settings do not go with ours.

        Args:
            images: the data set.
            model: this model, without any wrapper, on its device.
            elapsed: updates' worth of batches before its first one.
            num_updates: of the whole run.

        Raises:
            ConfigError: a peer runs with other settings, or holds the same parameters.
        """
        config = self._config
        augmentation, size = augmentation_of(config, images)
        settings = {
            "--dataset": config.dataset.partition(":")[0],  # folders may differ between hosts
            "--batch-size": config.batch_size,
            "--update-freq": config.update_freq,
            "--augmentation": augmentation,
            "--image-size": size,
            "--color-jitter": config.color_jitter,
            "--auto-augment": config.auto_augment,
            "--mixup": config.mixup,
            "--cutmix": config.cutmix,
            "--data-fraction": f"1/{config.data_divisor}",
            "classes": images.num_classes,
            "images": len(images.train),
            "updates per epoch": self._timetable.updates_per_epoch,
        }
        remarks = {"timm version": str(timm.__version__), "--model": config.model}
        self.peers.meet(
            model,
            self._order,
            settings=settings,
            remarks=remarks,
            seed=config.seed,
            elapsed=elapsed,
            num_updates=num_updates,
        )

    def interrupt(self, reason: str) -> None:
        """End the wait for a peer that is under way, and let no other begin; a signal handler may call it."""
        if self.peers.coordinator is not None:
            self.peers.coordinator.interrupt(reason)

    def term(
        self,
        predictions: Tensor,
        elapsed: int,
        micro_batch: int,
        fingerprint: bytes,
        forward: Callable[[nn.Module], Tensor],
        figures: Sums,
    ) -> Tensor | None:
        """α · mean divergence from the peers at one batch.

        Args:
            predictions: (batch, num_classes) float32 logits of this model, with gradient.
            elapsed: updates' worth of batches since the start.
            micro_batch: index inside the update.
            fingerprint: of the batch.
            forward: a copy of a peer -> its (batch, num_classes) logits, where checkpoints are exchanged.
            figures: what there is to log is added to them.

        Returns:
            () float32, summed over the batch; None where nothing is distilled.
        """
        key = self._order.key(elapsed)._replace(micro_batch=micro_batch)
        batch = Batch(key, elapsed, fingerprint, epoch=self._timetable.epoch(elapsed))
        found = self.peers.step(batch, predictions, forward=forward)
        figures.add(**self.peers.sums)
        return None if found is None else found.total
