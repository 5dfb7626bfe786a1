"""Owns the way from a data set to batches: augmentation, fingerprints, loaders.

Images stay uint8 until they are on the device: they are small on the way, and two models that see the same pixels have
the same fingerprint whatever their precision.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.keys import SampleMarks, fingerprint, sample_marks
from fairseq_codistill.sampling import BatchSpan, Draw, Timetable, augmentation_seed, generators_kept, seed_generators
from fairseq_codistill.workers import ignore_signals, signals_held

from .config import VisionConfig
from .datasets import Images


class Batch(NamedTuple):
    """What a loader yields.

    Attributes:
        images: (batch, 3, size, size) uint8.
        targets: (batch,) int64.
        fingerprint: of the sample ids, the targets and the pixels; empty where nobody asks for it.
        samples: what each image is called, where the predictions of teachers are kept.
    """

    images: Tensor
    targets: Tensor
    fingerprint: bytes
    samples: SampleMarks | None = None


def train_transform(
    augmentation: str,
    size: int,
    color_jitter: float = 0.0,
    auto_augment: str = "",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
) -> Callable[[Any], Tensor]:
    """Random augmentation of a PIL image or a uint8 tensor; torch's, Python's and numpy's global generators draw.

    Args:
        augmentation: ``goyal``, ``cifar``, ``crop`` or ``none``.
        size: side of the result.
        color_jitter: share by which ``goyal`` changes brightness, contrast and saturation.
        auto_augment: policy of timm after it; empty for none.
        mean: (3,) of the data set, where white is 1: what such a policy fills with.

    Returns:
        function to (3, size, size) uint8.

    Raises:
        ConfigError: timm has no such policy.

    Source: Goyal et al. 2017, section 5.1; Zagoruyko and Komodakis 2016, section 3 (4 pixels at 32).
    """
    steps: list[Any] = []
    if augmentation == "goyal":
        steps += [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        if color_jitter:
            steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    else:
        steps.append(v2.Resize((size, size), antialias=True))
        if augmentation in ("cifar", "crop"):
            steps.append(v2.RandomCrop(size, padding=size // 8))
        if augmentation == "cifar":
            steps.append(v2.RandomHorizontalFlip())
    if auto_augment:
        steps += [v2.ToPILImage(), _policy(auto_augment, size, mean)]
    return v2.Compose([*steps, v2.ToImage()])


def _policy(name: str, size: int, mean: Sequence[float]) -> Callable[[Any], Any]:
    # As timm's own loader sets it: shifts of up to 45 % of the image, gaps in its mean colour.
    settings = {"translate_const": int(size * 0.45), "img_mean": tuple(round(255 * value) for value in mean)}
    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    try:
        return makers.get(name.partition("-")[0], auto_augment_transform)(name, settings)
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--auto-augment is {name!r}, which timm cannot read ({error}); one of its policies is rand-m9-mstd0.5"
        ) from error


def eval_transform(augmentation: str, size: int) -> Callable[[Any], Tensor]:
    """The middle of an image: with ``goyal`` 224 pixels of 256, otherwise all of it."""
    if augmentation == "goyal":
        steps = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    else:
        steps = [v2.Resize((size, size), antialias=True)]
    return v2.Compose([*steps, v2.ToImage()])


class AugmentedImages(Dataset[tuple[Tensor, int, int]]):
    """Training images; the augmentation of each is seeded by the data seed, the pass and the image alone."""

    def __init__(self, images: Any, transform: Callable[[Any], Tensor], data_seed: int):
        self._images, self._transform, self._data_seed = images, transform, data_seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> list[tuple[Tensor, int, int]]:
        """A batch, for torch's loader: without workers this is the training process, whose generators are kept once."""
        with generators_kept():
            return [self._augmented(draw) for draw in draws]

    def _augmented(self, draw: Draw) -> tuple[Tensor, int, int]:
        image, target = self._images[draw.sample]
        seed_generators(augmentation_seed(self._data_seed, draw))
        return self._transform(image), target, draw.sample


class PlainImages(Dataset[tuple[Tensor, int, int]]):
    """Images for evaluation."""

    def __init__(self, images: Any, transform: Callable[[Any], Tensor]):
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image, target = self._images[index]
        return self._transform(image), target, index


class Collate:
    """Samples -> Batch. The fingerprint is made here, in the loading process, before anything can touch the pixels."""

    def __init__(self, with_fingerprint: bool, with_samples: bool = False):
        self._with_fingerprint, self._with_samples = with_fingerprint, with_samples

    def __call__(self, samples: list[tuple[Tensor, int, int]]) -> Batch:
        images = torch.stack([torch.as_tensor(image) for image, _, _ in samples])
        targets = torch.tensor([target for _, target, _ in samples])
        ids = torch.tensor([index for _, _, index in samples])
        mark = fingerprint(ids, targets, images) if self._with_fingerprint else b""
        if not self._with_samples:
            return Batch(images, targets, mark)
        # An image is another one in every pass, so its number does not say which.
        return Batch(images, targets, mark, sample_marks(ids, targets, [1] * len(ids), images)._replace(ids=()))


def augmentation_of(config: VisionConfig, images: Images) -> tuple[str, int]:
    """(augmentation, image size) in force: what is set, else what is usual for the data set."""
    augmentation = images.augmentation if config.augmentation == "auto" else config.augmentation
    return augmentation, config.image_size or images.image_size


def pixel_settings(config: VisionConfig, images: Images) -> dict[str, Any]:
    """What makes the pixels of a batch out of its images, by flag: the values in force, not those that say "usual"."""
    augmentation, size = augmentation_of(config, images)
    return {
        "--image-size": size,
        "--augmentation": augmentation,
        "--color-jitter": config.color_jitter if augmentation == "goyal" else 0.0,
        "--auto-augment": config.auto_augment,
        "--mixup": config.mixup,
        "--cutmix": config.cutmix,
    }


def train_transform_of(config: VisionConfig, images: Images) -> Callable[[Any], Tensor]:
    """The augmentation in force, see :func:`train_transform`."""
    augmentation, size = augmentation_of(config, images)
    return train_transform(augmentation, size, config.color_jitter, config.auto_augment, images.mean)


class Loader(DataLoader[Any]):
    """torch's, whose processes leave signals to the training, and end with it."""

    def __init__(self, dataset: Dataset[Any], num_workers: int, **settings: Any):
        super().__init__(dataset, num_workers=num_workers, worker_init_fn=ignore_signals, **settings)

    def __iter__(self) -> Any:
        with signals_held():
            return super().__iter__()


class MicroBatches(Sampler[list[Draw]]):
    """The batches of updates, cut into those that are computed on at once: an update is the same however it is cut."""

    def __init__(self, updates: BatchSpan, batch_size: int, update_freq: int):
        self._updates, self._batch_size, self._update_freq = updates, batch_size, update_freq

    def __len__(self) -> int:
        return len(self._updates) * self._update_freq

    def __iter__(self) -> Iterator[list[Draw]]:
        for update in self._updates:
            for first in range(0, len(update), self._batch_size):
                yield update[first : first + self._batch_size]


def train_loader(
    config: VisionConfig, images: Images, timetable: Timetable, rank: int, start: int, stop: int, pin_memory: bool
) -> Loader:
    """The batches of one rank from update ``start`` up to ``stop``, ``--update-freq`` of them for each update.

    Args:
        timetable: whose batches are those of a whole update.

    Raises:
        ConfigError: timm does not know the policy of augmentation.
    """
    updates = BatchSpan(timetable, rank, start, stop)
    return Loader(
        AugmentedImages(images.train, train_transform_of(config, images), config.codistill_data_seed),
        batch_sampler=MicroBatches(updates, config.batch_size, config.update_freq),
        collate_fn=Collate(config.is_codistilled, with_samples=bool(config.codistill_teacher_cache)),
        num_workers=config.num_workers,
        pin_memory=pin_memory,
    )


def valid_loader(config: VisionConfig, images: Images, rank: int, world_size: int, pin_memory: bool) -> Loader:
    """The share of the validation images that one rank evaluates: every one of them is in exactly one share.

    Its processes stay for the next evaluation: starting them takes as long as a small data set does.
    """
    augmentation, size = augmentation_of(config, images)
    mine = torch.arange(rank, len(images.valid), world_size).tolist()
    return Loader(
        PlainImages(images.valid, eval_transform(augmentation, size)),
        batch_size=max(config.batch_size, 64),
        sampler=mine,
        collate_fn=Collate(with_fingerprint=False),
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=pin_memory,
    )
