"""Owns the order of the images and the seeds of their augmentation, the same on all models.

Both are functions of the data seed. Nothing here depends on the number of loading processes, on the model, or on where
training was interrupted.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator import BatchKey


class Draw(NamedTuple):
    """One image as it is seen in one pass over the data: its augmentation is a function of this and the data seed."""

    data_pass: int  # from 1
    image: int


def augmentation_seed(data_seed: int, draw: Draw) -> int:
    """Seed of everything random about one image in one pass."""
    name = repr((data_seed, draw.data_pass, draw.image)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


class Timetable:
    """Which images make up each update, and what time it is.

    The clock is ``elapsed``: updates' worth of batches since the start. An *epoch* is as many updates as the whole
    data set takes (times ``stretch``), so that schedules and the length of the training do not depend on
    ``--data-fraction``; a *pass* is one run through the part that is used. A last batch that would not be full is left
    out.

    Args:
        num_images: of the training split.
        divisor: k, a fixed k-th part of them is used.
        batch_size: images of one rank in one update.
        world_size: X, ranks of one model.
        data_seed: shared by all models.
        stretch: runs through the whole data that count as one epoch.

    Raises:
        ConfigError: there are fewer images than one update needs.
    """

    def __init__(
        self, num_images: int, divisor: int, batch_size: int, world_size: int, data_seed: int, stretch: float = 1.0
    ):
        self.batch_size, self.world_size, self.data_seed = batch_size, world_size, data_seed
        update_size = batch_size * world_size
        generator = torch.Generator().manual_seed(data_seed)
        kept = torch.randperm(num_images, generator=generator)[: num_images // divisor]
        self.images = kept.sort().values  # (num_used,) int64
        self.updates_per_epoch = max(1, round(num_images // update_size * stretch))
        self.updates_per_pass = len(self.images) // update_size
        if self.updates_per_pass < 1:
            raise ConfigError(
                f"--batch-size is {batch_size} on {world_size} devices, but there are only {len(self.images)} images "
                "to train on; make it smaller, or use more of the data"
            )

    def key(self, elapsed: int) -> BatchKey:
        """The data position of an update."""
        passes, position = divmod(elapsed, self.updates_per_pass)
        return BatchKey(passes + 1, position, 0)

    def progress(self, elapsed: int) -> float:
        """Epochs since the start, a fraction inside one."""
        return elapsed / self.updates_per_epoch

    def epoch(self, elapsed: int) -> int:
        """Current epoch, from 1."""
        return elapsed // self.updates_per_epoch + 1

    def order(self, data_pass: int) -> list[int]:
        """The images in the order of one pass."""
        seed = augmentation_seed(self.data_seed, Draw(data_pass, -1))
        shuffled = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        return self.images[shuffled].tolist()


class CoordinatedBatches(Sampler[list[Draw]]):
    """The batches of one rank from one update to another, over the passes: no pause between two of them.

    Args:
        timetable: of the run.
        rank: inside the model; rank r of every model gets the same images.
        start: first update.
        stop: the update to stop before.
    """

    def __init__(self, timetable: Timetable, rank: int, start: int, stop: int):
        self._timetable, self._rank, self._start, self._stop = timetable, rank, start, stop

    def __len__(self) -> int:
        return max(0, self._stop - self._start)

    def __iter__(self) -> Iterator[list[Draw]]:
        table, order, of_pass = self._timetable, list[int](), 0
        for elapsed in range(self._start, self._stop):
            data_pass, position, _ = table.key(elapsed)
            if data_pass != of_pass:
                order, of_pass = table.order(data_pass), data_pass
            first = (position * table.world_size + self._rank) * table.batch_size
            yield [Draw(data_pass, image) for image in order[first : first + table.batch_size]]
