"""Owns what codistillation adds to vision training: which images, augmentation and model the others are told of.

A thin adapter of :class:`~fairseq_codistill.codistiller.Codistiller`.
"""

import dataclasses
from collections.abc import Callable

import timm
from torch import Tensor, nn

from fairseq_codistill.codistiller import Batch, Codistiller
from fairseq_codistill.coordinator.keys import DataOrder, SampleMarks
from fairseq_codistill.figures import with_shared
from fairseq_codistill.sampling import Timetable

from .config import VisionConfig
from .data import augmentation_of
from .datasets import Images
from .distributed import Place
from .metrics import Sums
from .teachers import load_teacher
from .transfer import TransferSet


class PeerExchange:
    """One rank's exchange with the same rank of the other models.

    Args:
        config: validated options.
        place: of this process in its model.
        timetable: of the run.
        transfer: what is exchanged in place of what is trained on.

    Attributes:
        peers: as every training loop has them.
    """

    def __init__(self, config: VisionConfig, place: Place, timetable: Timetable, transfer: TransferSet | None = None):
        self._config, self._timetable, self._transfer = config, timetable, transfer
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
        settings = {"classes": images.num_classes, "--image-size": size}
        batch_settings = {
            "--dataset": config.dataset.partition(":")[0],  # folders may differ between hosts
            "--batch-size": config.batch_size,
            "--update-freq": config.update_freq,
            "--augmentation": augmentation,
            "--color-jitter": config.color_jitter,
            "--auto-augment": config.auto_augment,
            "--mixup": config.mixup,
            "--cutmix": config.cutmix,
            "--data-fraction": f"1/{config.data_divisor}",
            "images": len(images.train),
            "updates per epoch": self._timetable.updates_per_epoch,
        }
        remarks = {"timm version": str(timm.__version__), "--model": config.model}
        self.peers.meet(
            model,
            self._order,
            settings=settings,
            batch_settings=batch_settings,
            remarks=remarks,
            seed=config.seed,
            elapsed=elapsed,
            num_updates=num_updates,
            transfer=None if self._transfer is None else self._transfer.settings,
            load_teacher=lambda file: load_teacher(config, file, images.num_classes),
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
        samples: SampleMarks | None = None,
        predict: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """α · mean divergence from the peers at one batch, and what the teachers add.

        Args:
            predictions: (batch, num_classes) float32 logits of this model, with gradient.
            elapsed: updates' worth of batches since the start.
            micro_batch: index inside the update.
            fingerprint: of the batch.
            forward: a copy of a peer, or a teacher -> its (batch, num_classes) logits, where there are such.
            figures: what there is to log is added to them.
            samples: what each image is called, where the predictions of teachers are kept.
            predict: (batch, 3, size, size) uint8 images of the transfer set -> (batch, num_classes) logits.

        Returns:
            () float32, summed over the batch; None where nothing is distilled.
        """
        key = self._order.key(elapsed)._replace(micro_batch=micro_batch)
        batch = Batch(key, elapsed, fingerprint, epoch=self._timetable.epoch(elapsed), samples=samples)
        found = self.peers.step(batch, predictions, forward=forward)
        total = None if found is None else found.total
        shared = dataclasses.replace(batch, is_shared=True, samples=None)
        if self._transfer is not None and predict is not None and self.peers.weight(shared) != 0.0:
            own, images = self.peers.sums, self._transfer.at(elapsed, micro_batch)
            logits = predict(images.images)
            found = self.peers.step(dataclasses.replace(shared, fingerprint=images.fingerprint), logits)
            scale = len(predictions) / len(logits)  # the mean over them counts as much as that over the batch
            self.peers.sums = with_shared(own, self.peers.sums, scale)
            if found is not None:
                total = scale * found.total if total is None else total + scale * found.total
        figures.add(**self.peers.sums)
        return total
