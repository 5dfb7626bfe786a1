"""Owns how a loader of timm is changed so that it gives the batches, and draws the numbers, that all models share.

It knows no model and exchanges nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fairseq_codistill.config import ConfigError
from fairseq_codistill.sampling import CoordinatedBatches, Draw, augmentation_seed, seeded


class TimmBatches(CoordinatedBatches):
    """Batches of :class:`Draw`, which say when an iteration over them begins."""

    def __init__(self, num_samples: int, batch_size: int, data_seed: int, before: Callable[[], None]):
        super().__init__(num_samples, batch_size, data_seed, draws=True)
        self._before, self._begun_at = before, -1

    def __iter__(self) -> Iterator[list[Any]]:
        if self._begun_at != self.elapsed:  # a loader with workers asks twice for the first of its iterations
            self._begun_at = self.elapsed
            self._before()
            self._begun_at = self.elapsed  # it may have moved on to where the others are
        self._trained_on = super().__iter__()
        return super().__iter__()

    def at_hand(self) -> list[Draw]:
        """The batch that is trained on now, whatever the loader has fetched in advance; ask once a batch."""
        return next(self._trained_on)


class _Drawn(Dataset):
    """Samples by :class:`Draw`; what is random about one is seeded by the data seed and the draw alone."""

    def __init__(self, dataset: Any, data_seed: int):
        self._dataset, self._data_seed = dataset, data_seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, draw: Draw) -> tuple[Any, int]:
        seed = augmentation_seed(self._data_seed, draw)
        with seeded(seed):
            return self._dataset[draw.sample], seed


class _Collated:
    """A collator of such samples; how it mixes them is seeded by the first of them."""

    def __init__(self, collate: Any):
        self.inner = collate

    def __call__(self, samples: list[tuple[Any, int]]) -> Any:
        with seeded(samples[0][1] + 1):
            return self.inner([sample for sample, _ in samples])


class Mixed(_Collated, FastCollateMixup):
    """Such a collator that mixes: timm's train script looks for the class, and switches it off in the end."""

    mixup_enabled = property(
        lambda self: self.inner.mixup_enabled, lambda self, is_on: setattr(self.inner, "mixup_enabled", is_on)
    )


def coordinate(loader: Any, data_seed: int, before: Callable[[], None]) -> TimmBatches:
    """Change a loader of timm in place, so that it gives the batches that all models see.

    Args:
        loader: as ``create_loader`` returned it, before its first iteration.
        data_seed: shared by all models.
        before: called in the training process when an iteration over the loader begins.

    Raises:
        ConfigError: its batches cannot be those of the other models.
    """
    inner = getattr(loader, "loader", loader)  # timm's prefetcher has one
    images = getattr(inner, "dataset", None)
    for is_wrong, what in (
        (not isinstance(inner, DataLoader), f"is a {type(loader).__name__}; give what timm's create_loader returned"),
        (isinstance(inner, MultiEpochsDataLoader), "has started already (--use-multi-epochs-loader); leave that off"),
        (isinstance(images, IterableDataset), "has a dataset that is a stream (wds/, tfds/, hfids/), whose samples "
         "have no numbers; give --dataset one that is read by index, such as a folder of images"),
        (not hasattr(images, "__len__"), "has a dataset without length, whose samples have no numbers"),
        (isinstance(images, AugMixDataset), "gives several views of each image; leave --aug-splits off"),
        (getattr(inner, "batch_size", 1) is None, "draws batches of several sizes; leave --input-size-choices off"),
        (isinstance(getattr(inner, "sampler", None), RepeatAugSampler), "repeats images, which the order of all models "
         "does not; leave --aug-repeats off"),
        (getattr(loader, "random_erasing", None) is not None, "erases at random while it trains; use --reprob 0"),
    ):  # fmt: skip
        if is_wrong:
            raise ConfigError(f"CodistillationTask: loader {what}")
    batches = TimmBatches(len(inner.dataset), int(inner.batch_size), data_seed, before)
    # A loader refuses to have these replaced once it is made, but reads them only when an iteration begins.
    for name, value in (
        ("dataset", _Drawn(inner.dataset, data_seed)),
        ("batch_sampler", batches),
        ("collate_fn", (Mixed if isinstance(inner.collate_fn, FastCollateMixup) else _Collated)(inner.collate_fn)),
    ):
        object.__setattr__(inner, name, value)
    return batches


def are_mixed_elsewhere(loader: Any) -> bool:
    """Whether targets that are vectors come from outside of a coordinated loader: its own collator makes none, and its
    data set has classes."""
    inner = getattr(loader, "loader", loader)
    if isinstance(inner.collate_fn, Mixed):
        return False
    (_, target), _ = inner.dataset[Draw(1, 0)]
    return bool(torch.as_tensor(target).dim() == 0)
