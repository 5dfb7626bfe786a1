"""Owns the order of the samples and the seeds of their augmentation, the same on all models.

Both are functions of the data seed alone: of no number of loading processes, of no model, and not of where training was
interrupted. Nothing here knows what a sample is.
"""

import contextlib
import hashlib
import operator
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fairseq_codistill.config import ConfigError
from fairseq_codistill.environment import data_seed_of_environment
from fairseq_codistill.ranks import rank_and_world_size


class Draw(NamedTuple):
    """One sample as it is seen in one pass over the data: its augmentation is a function of this and the data seed."""

    data_pass: int  # from 1
    sample: int


def augmentation_seed(data_seed: int, draw: Draw) -> int:
    """Seed of everything random about one sample in one pass.

    >>> augmentation_seed(1, Draw(data_pass=1, sample=7)) == augmentation_seed(1, Draw(data_pass=2, sample=7))
    False
    """
    name = repr((data_seed, draw.data_pass, draw.sample)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


def seed_generators(seed: int) -> None:
    """From here on, what torch, Python and numpy draw on the CPU is a function of ``seed``."""
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed GPUs as well
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """After it, the generators of torch (CPU), Python and numpy go on as before."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, what torch, Python and numpy draw on the CPU is a function of ``seed``; after it they go on as before."""
    with generators_kept():
        seed_generators(seed)
        yield


class Timetable:
    """Which samples make up each update, and what time it is.

    The clock is ``elapsed``: updates' worth of batches since the start. A *pass* is one run through the part of the
    data that is used; a last batch of it that would not be full is left out. An *epoch* is as many updates as the whole
    data set takes (times ``stretch``), so that schedules and the length of the training do not depend on ``divisor``.

    Args:
        num_samples: of the training data.
        divisor: k, a fixed k-th part of them is used.
        batch_size: samples of one rank in one update.
        world_size: X, ranks of one model.
        data_seed: shared by all models.
        stretch: runs through the whole data that count as one epoch.

    Raises:
        ConfigError: there are fewer samples than one update needs.
    """

    def __init__(
        self, num_samples: int, divisor: int, batch_size: int, world_size: int, data_seed: int, stretch: float = 1.0
    ):
        self.batch_size, self.world_size, self.data_seed = batch_size, world_size, data_seed
        update_size = batch_size * world_size
        generator = torch.Generator().manual_seed(data_seed)
        kept = torch.randperm(num_samples, generator=generator)[: num_samples // divisor]
        self.samples = kept.sort().values  # (num_used,) int64
        self.updates_per_epoch = max(1, round(num_samples // update_size * stretch))
        self.updates_per_pass = len(self.samples) // update_size
        if self.updates_per_pass < 1:
            raise ConfigError(
                f"--batch-size is {batch_size} on {world_size} devices, but there are only {len(self.samples)} samples "
                "to train on; make it smaller, or use more of the data"
            )

    def progress(self, elapsed: int) -> float:
        """Epochs since the start, a fraction inside one."""
        return elapsed / self.updates_per_epoch

    def epoch(self, elapsed: int) -> int:
        """Current epoch, from 1."""
        return elapsed // self.updates_per_epoch + 1

    def order(self, data_pass: int) -> list[int]:
        """The samples in the order of one pass."""
        seed = augmentation_seed(self.data_seed, Draw(data_pass, -1))
        shuffled = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(seed))
        return self.samples[shuffled].tolist()

    def draws(self, rank: int, start: int, stop: int) -> Iterator[list[Draw]]:
        """The batches of one rank from update ``start`` up to ``stop``, over the passes: no pause between two of them.

        Args:
            rank: inside the model; rank r of every model gets the same samples.
        """
        order, of_pass = list[int](), 0
        for elapsed in range(start, stop):
            passes, position = divmod(elapsed, self.updates_per_pass)
            if passes + 1 != of_pass:
                order, of_pass = self.order(passes + 1), passes + 1
            first = (position * self.world_size + rank) * self.batch_size
            yield [Draw(of_pass, sample) for sample in order[first : first + self.batch_size]]


class BatchSpan(Sampler[list[Draw]]):
    """The batches of one rank from update ``start`` up to ``stop`` of a timetable, as a batch sampler."""

    def __init__(self, table: Timetable, rank: int, start: int, stop: int):
        self._table, self._rank, self._start, self._stop = table, rank, start, stop

    def __len__(self) -> int:
        return max(0, self._stop - self._start)

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._table.draws(self._rank, self._start, self._stop)


class CoordinatedBatches(Sampler[list[Any]]):
    """A batch sampler whose batches are the same on rank r of every model; give it to a loader as ``batch_sampler``.

    Each iteration yields the batches of one pass over the data, from :attr:`elapsed` to the end of the pass; the next
    iteration is the next pass, in another order. :class:`~fairseq_codistill.codistiller.Codistiller`, which is given
    this sampler when the models meet, counts the batches that were trained on in :attr:`elapsed`, whatever a loader has
    fetched in advance. A loop without one calls :meth:`move_to` itself.

    Args:
        num_samples: of the training data.
        batch_size: samples of one rank in one batch.
        data_seed: shared by all models; default: ``CODISTILL_DATA_SEED`` of the environment, or 1.
        rank: inside the model; default: that of torch.distributed, or 0.
        world_size: X, ranks of one model; default: that of torch.distributed, or 1.
        draws: yield :class:`Draw` in place of plain indices, for a data set whose augmentation is seeded by
            :func:`augmentation_seed`.

    Attributes:
        elapsed: batches of this rank since the start of training that are done with.

    Raises:
        ConfigError: there are fewer samples than one batch of every rank needs.

    >>> batches = CoordinatedBatches(num_samples=5, batch_size=2, data_seed=1)
    >>> [len(batch) for batch in batches]
    [2, 2]
    >>> list(batches) == list(CoordinatedBatches(5, 2, data_seed=1))
    True
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        data_seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        draws: bool = False,
    ):
        data_seed = data_seed_of_environment() if data_seed is None else data_seed
        num_samples, batch_size = _whole("num_samples", num_samples), _whole("batch_size", batch_size)
        here, everywhere = rank_and_world_size()
        self.is_placed = rank is not None and world_size is not None  # by whoever made it
        self.rank = here if rank is None else rank
        world_size = everywhere if world_size is None else world_size
        if num_samples < batch_size * world_size:  # before the timetable speaks of options, which a loop has not
            each = f"batch_size is {batch_size}" + (f" on each of {world_size} ranks" if world_size > 1 else "")
            raise ConfigError(
                f"{each}, but num_samples is {num_samples}: no batch would be full; make batch_size smaller, or give "
                "more samples"
            )
        self.num_samples, self._draws = num_samples, draws
        self.table = Timetable(num_samples, 1, batch_size, world_size, data_seed)
        self.elapsed = 0

    def __len__(self) -> int:
        """Batches of this rank in a whole pass."""
        return self.table.updates_per_pass

    def __iter__(self) -> Iterator[list[Any]]:
        end = (self.elapsed // len(self) + 1) * len(self)
        for batch in self.table.draws(self.rank, self.elapsed, end):
            yield batch if self._draws else [draw.sample for draw in batch]

    @property
    def epoch(self) -> int:
        """The pass that the next iteration belongs to, from 1."""
        return self.elapsed // len(self) + 1

    def move_to(self, elapsed: int) -> None:
        """Let the next iteration begin there.

        Args:
            elapsed: batches of this rank since the start of training.
        """
        self.elapsed = elapsed


def _whole(name: str, value: Any) -> int:
    """Of Python, numpy or a tensor."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, 1 or more")
    return whole


class Numbered(Dataset):
    """A data set whose samples end with their number, for loops that need the ids of a batch: (input, target, id).

    Args:
        dataset: whose samples are tuples or lists; whatever else a sample is, a tensor for one, is an input alone:
            (input, id).

    Raises:
        TypeError: of a sample that is a dictionary.

    >>> Numbered([("a", 7), ("b", 8)])[1], Numbered(["a", "b"])[1]
    (('b', 8, 1), ('b', 1))
    """

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = self._dataset[index]
        if isinstance(sample, Mapping):  # whose names would be taken for what they name
            raise TypeError(
                "Numbered: samples are dictionaries; give each its index under a name of its own, "
                '{**sample, "ids": index}, in the data set'
            )
        return (*sample, index) if isinstance(sample, (tuple, list)) else (sample, index)
