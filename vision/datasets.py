"""Owns where images come from: the training and validation splits of every ``--dataset``, before augmentation."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from fairseq_codistill.config import ConfigError

from .broken import BrokenImageError, check_folders, read_image
from .config import DataConfig
from .distributed import Place

logger = logging.getLogger("vision.datasets")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
HALF = (0.5, 0.5, 0.5)
STATISTICS = {  # mean and std of the channels, where white is 1, by the kind of --dataset
    "digits": (HALF, HALF),
    "fake": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": (CIFAR_MEAN, CIFAR_STD),
    "imagefolder": (IMAGENET_MEAN, IMAGENET_STD),
}
VALIDATION_NAMES = ("val", "valid", "validation", "test")
NUM_NAMED = 5  # suffixes in a warning, images in an error


@dataclasses.dataclass
class Images:
    """A data set.

    Attributes:
        train: index -> (image, class); an image is a PIL image or a (3, height, width) uint8 tensor.
        valid: the same, for evaluation.
        num_classes: classes are numbered from 0.
        mean: of the red, green and blue channel, where white is 1.
        std: likewise.
        image_size: usual side of the images, in pixels.
        augmentation: the usual one.
        num_broken: images that were left out because they cannot be decoded.
        classes: (num_classes,) names by class number: of the folders, or of what is known. Data without such, as those
            of ``fake``, have their numbers.
    """

    train: Any
    valid: Any
    num_classes: int
    mean: Sequence[float]
    std: Sequence[float]
    image_size: int
    augmentation: str
    num_broken: int = 0
    classes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.classes = tuple(self.classes) or tuple(map(str, range(self.num_classes)))


class TensorImages:
    """Images held in memory.

    Args:
        images: (num_images, 3, height, width) uint8.
        targets: (num_images,) int64.
    """

    def __init__(self, images: Tensor, targets: Tensor):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


class FakeImages:
    """Images made by code: noise over a colour pattern of their class. An image is a function of its index alone."""

    def __init__(self, num_images: int, num_classes: int, size: int, first_index: int):
        self._num_images, self._num_classes, self._size, self._first = num_images, num_classes, size, first_index

    def __len__(self) -> int:
        return self._num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        target = index % self._num_classes
        pattern = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(target))
        noise_of = torch.Generator().manual_seed(10**6 + self._first + index)
        large = torch.nn.functional.interpolate(pattern[None], size=(self._size, self._size))[0]
        noisy = large + 0.25 * torch.randn(large.shape, generator=noise_of)
        return (noisy.clamp(0, 1) * 255).to(torch.uint8), target


def load_images(config: DataConfig, place: Place | None = None, kept_in: Path | None = None) -> Images:
    """The data set that ``--dataset`` names, its files checked.

    Args:
        config: validated options.
        place: of this process in its model, whose ranks share the work of checking files.
        kept_in: file to keep what was found in; None keeps nothing.

    Raises:
        ConfigError: it is not where it should be, a file in it is no image, or a library is missing.
    """
    kind, _, folder = config.dataset.partition(":")
    if kind == "digits":
        return _digits()
    if kind == "fake":
        size = config.image_size or 64
        sizes = (config.fake_images, max(config.fake_images // 8, 1))
        train = FakeImages(sizes[0], config.fake_classes, size, 0)
        valid = FakeImages(sizes[1], config.fake_classes, size, sizes[0])
        return Images(train, valid, config.fake_classes, *STATISTICS[kind], size, "goyal")
    if kind == "cifar10":
        return _cifar10(Path(folder), config, place, kept_in)
    train, valid, num_broken = _folders(Path(folder), config, place, kept_in)
    classes = train.classes
    return Images(train, valid, len(classes), *STATISTICS[kind], 224, "goyal", num_broken, classes)


def load_unlabelled(config: DataConfig, place: Place | None = None, kept_in: Path | None = None) -> ImageFolder | None:
    """The images below ``imagefolder:DIR`` where DIR has no ``train``; None for every other form of ``--dataset``.

    Args:
        config, place, kept_in: as for :func:`load_images`.

    Raises:
        ConfigError: it holds no folder with images, or a file in it is no image.
    """
    kind, _, folder = config.dataset.partition(":")
    if kind != "imagefolder" or (Path(folder) / "train").is_dir():
        return None
    found = _image_folder(Path(folder), config.dataset, place)
    check_folders((found,), config.skip_broken, place, max(config.num_workers, 1), kept_in)
    return found


def _digits() -> Images:
    """1,797 handwritten digits of 8 x 8 pixels; every fifth one is for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("--dataset is 'digits', which scikit-learn embeds: pip install scikit-learn") from error
    data = load_digits()
    grey = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))  # (1797, 8, 8), 0 to 16 in the original
    images, targets = grey[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target).long()
    is_valid = torch.arange(len(targets)) % 5 == 0
    train, valid = (TensorImages(images[chosen], targets[chosen]) for chosen in (~is_valid, is_valid))
    return Images(train, valid, 10, *STATISTICS["digits"], 8, "crop")


def _cifar10(folder: Path, config: DataConfig, place: Place | None, kept_in: Path | None) -> Images:
    """As torchvision unpacks it, or as a folder of images for each class; in memory either way."""
    num_broken = 0
    if (folder / CIFAR10.base_folder).is_dir():
        splits = []
        for is_train in (True, False):
            try:
                stored = CIFAR10(str(folder), train=is_train)
            except RuntimeError as error:
                raise ConfigError(
                    f"--dataset is 'cifar10:{folder}', whose {CIFAR10.base_folder} is not whole; unpack it anew"
                ) from error
            pixels = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
            splits.append(TensorImages(pixels, torch.tensor(stored.targets)))
        classes = stored.classes
    elif (folder / "train").is_dir():
        train, valid, num_broken = _folders(folder, config, place, kept_in)
        classes, splits = train.classes, [_in_memory(train), _in_memory(valid)]
    else:
        raise ConfigError(
            f"--dataset is 'cifar10:{folder}', which holds neither {CIFAR10.base_folder} (as torchvision unpacks it) "
            "nor train/ and test/ with a folder of images for each class"
        )
    return Images(splits[0], splits[1], len(classes), *STATISTICS["cifar10"], 32, "cifar", num_broken, classes)


def _in_memory(folder: ImageFolder) -> TensorImages:
    """Small images are decoded once: decoding them anew in every epoch would take longer than training on them."""
    arrays, broken = [], []
    for i, (path, _) in enumerate(folder.samples):
        try:
            arrays.append(np.array(folder[i][0]))
        except BrokenImageError:
            broken.append(path)
    if broken:
        raise ConfigError(
            f"{len(broken)} of {len(folder)} images of {folder.root} cannot be read: {', '.join(broken[:NUM_NAMED])}; "
            "mend or remove them, or leave them out by --skip-broken"
        )
    if len(sizes := {array.shape[1::-1] for array in arrays}) > 1:
        found = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:3])
        raise ConfigError(f"--dataset is 'cifar10:...', and images differ in size ({found}); give imagefolder:DIR")
    pixels = torch.stack([torch.from_numpy(array) for array in arrays])
    return TensorImages(pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(folder.targets))


def _folders(
    folder: Path, config: DataConfig, place: Place | None, kept_in: Path | None
) -> tuple[ImageFolder, ImageFolder, int]:
    """Training and validation images, and how many were left out."""
    dataset = config.dataset
    name = next((name for name in VALIDATION_NAMES if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or name is None:
        raise ConfigError(
            f"--dataset is {dataset!r}; {folder} must hold train/ and val/ (or test/), with a folder of images for "
            "each class"
        )
    train, valid = (_image_folder(folder / split, dataset, place) for split in ("train", name))
    if train.classes != valid.classes:
        differing = sorted(set(train.classes) ^ set(valid.classes))
        raise ConfigError(
            f"--dataset is {dataset!r}: train/ has {len(train.classes)} classes and {name}/ {len(valid.classes)}; only "
            f"one of them has {', '.join(differing[:3])}; both need the same"
        )
    if dataset.startswith("cifar10") and not config.skip_broken:
        return train, valid, 0  # they are decoded at once, before training
    num_threads = max(config.num_workers, 1)
    return train, valid, check_folders((train, valid), config.skip_broken, place, num_threads, kept_in)


def _image_folder(folder: Path, dataset: str, place: Place | None) -> ImageFolder:
    """The files whose suffix is that of an image; a warning counts the others, but for hidden ones."""
    others: Counter[str] = Counter()

    def is_image(path: str) -> bool:
        found = has_file_allowed_extension(path, IMG_EXTENSIONS)
        if not found and not Path(path).name.startswith("."):
            others[Path(path).suffix.lower() or "no suffix"] += 1
        return bool(found)

    try:
        images = ImageFolder(str(folder), loader=read_image, is_valid_file=is_image)
    except FileNotFoundError as error:  # its message fills several lines
        said = str(error).splitlines()[0].rstrip(". ")
        raise ConfigError(
            f"--dataset is {dataset!r}: in {folder}: {said}; put images ({', '.join(IMG_EXTENSIONS)}) into each "
            "class's folder, or remove it from train/ and from the validation images"
        ) from error
    except OSError as error:
        raise ConfigError(f"--dataset is {dataset!r}: {folder} cannot be read: {error.strerror}") from error
    if others and (place is None or place.is_first):
        most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:NUM_NAMED]
        named = ", ".join(f"{suffix}: {count}" for suffix, count in most)
        logger.warning(
            "%d files below %s are left out, since their suffix is none of an image (%s%s); convert those that are "
            "images to one of %s",
            others.total(),
            folder,
            named,
            ", ..." if len(others) > NUM_NAMED else "",
            ", ".join(IMG_EXTENSIONS),
        )
    return images
