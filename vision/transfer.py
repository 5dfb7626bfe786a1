"""Owns the transfer set of image models: which batch of it belongs to which update. Its labels are never looked at."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.keys import ENDLESS
from fairseq_codistill.sampling import Timetable

from .config import VisionConfig
from .data import Batch, augmentation_of, train_loader
from .datasets import IMAGENET_MEAN, Images, load_images, load_unlabelled
from .distributed import Place


class TransferSet:
    """The images that all models have, in the order of the data seed, without end.

    Args:
        config: validated options.
        place: of this process in its model.
        own: the data that this model trains on, for augmentation and size.
        kept_in: as for :func:`load_images`; not the file of ``own``.

    Raises:
        ConfigError: it cannot be read, or is smaller than one batch.
    """

    def __init__(self, config: VisionConfig, place: Place, own: Images, kept_in: Path | None = None):
        named = dataclasses.replace(config, dataset=config.transfer_dataset)
        try:
            train, mean = load_unlabelled(named, place, kept_in), tuple(IMAGENET_MEAN)
            if train is None:
                labelled = load_images(named, place, kept_in)
                train, mean = labelled.train, tuple(labelled.mean)
            self._table = Timetable(
                len(train), 1, config.batch_size * config.update_freq, place.world_size, config.codistill_data_seed
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("--dataset", "--transfer-dataset")) from error
        augmentation, size = augmentation_of(config, own)
        # What policies of augmentation fill gaps with is the same on all models, whatever their own images are.
        self._images = dataclasses.replace(own, train=Unlabelled(train), mean=mean)
        # The teachers' cache is of images that are trained on.
        self._config = dataclasses.replace(config, codistill_teacher_cache="")
        self._rank, self._on_gpu = place.rank, place.device.type == "cuda"
        self.settings: dict[str, Any] = {
            "--transfer-dataset": config.transfer_dataset.partition(":")[0],
            "images of the transfer set": len(train),
            "--batch-size": config.batch_size,
            "--update-freq": config.update_freq,
            "--augmentation": augmentation,
            "--image-size": size,
            "--color-jitter": config.color_jitter,
            "--auto-augment": config.auto_augment,
        }
        self._batches: Iterator[Batch] = iter(())
        self._next = -1

    def at(self, elapsed: int, micro_batch: int) -> Batch:
        """The batch of an update that is due, on the CPU.

        Args:
            elapsed: updates since the start of training.
            micro_batch: index inside the update.
        """
        number = elapsed // self._config.codistill_interval * self._config.update_freq + micro_batch
        if number != self._next:
            first = number // self._config.update_freq
            loader = train_loader(
                self._config, self._images, self._table, self._rank, first, ENDLESS, pin_memory=self._on_gpu
            )
            self._batches = iter(loader)
            for _ in range(number % self._config.update_freq):
                next(self._batches)
        self._next = number + 1
        return next(self._batches)


class Unlabelled:
    """Images of a data set, all of class 0.

    Args:
        images: index -> (image, class).
    """

    def __init__(self, images: Any):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._images[index][0], 0
