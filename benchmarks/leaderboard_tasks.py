"""What models of the leaderboard learn: translation, or images. Settings, data, model, schedule; no method of training.

A setting is all that the rows of one table have in common; it makes the model and its optimizer, loads the data and
says how good a model is. What it does not say is how models help each other: that is leaderboard_methods.py.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import translation_task
from fairseq_codistill.vision.datasets import CIFAR_MEAN, CIFAR_STD
from fairseq_codistill.vision.wide_resnet import WideResNet, parse_name
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

TUNING_SEED = 9  # settings are chosen by it, so its rows are of no use beside
NUM_TOLD = 128  # pairs by which peers are weighted; nothing else is trained or measured on them


@dataclasses.dataclass(frozen=True)
class Data:
    """Data sets of a task.

    Attributes:
        train: what all models are trained on.
        final: what rows are measured on.
        held_out: what settings are chosen by.
        told: what peers are weighted by, where there is any left for that.
    """

    train: Any
    final: Any
    held_out: Any
    told: Any = None


@dataclasses.dataclass(frozen=True)
class Translation:
    """Multi30k, English to German, and a small transformer.

    Attributes:
        pairs: "third" of the training pairs, or "all".
        num_pieces: of the vocabulary.
        width, layers: of the model.
        sentences: in a batch of one device.
        updates: of every model.
        rate: the highest of the learning rate, after a tenth of the updates.
        smoothing: of the labels.
        burn_in: updates before models begin to teach each other.
        alpha: of the peers' term, where a method does not say its own.
    """

    pairs: str = "third"
    num_pieces: int = 3000
    width: int = 64
    layers: int = 1
    sentences: int = 64
    updates: int = 600
    rate: float = 5e-3
    smoothing: float = 0.1
    burn_in: int = 0
    alpha: float = 1.0

    clip = 1.0
    columns = 256

    @property
    def batch_size(self) -> int:
        """Of one device."""
        return self.sentences

    def load(self, data: Path, runs: Path) -> Data:
        """The validation pairs serve for both; ``told`` are training pairs that are not trained on, if there are."""
        share = {"third": 3, "all": 1}[self.pairs]
        train, valid, rest = translation_task.load(data, runs, self.num_pieces, share)
        told = translation_task.Pairs(rest.source[:NUM_TOLD], rest.target[:NUM_TOLD]) if len(rest) else None
        return Data(train, valid, valid, told)

    def model(self) -> nn.Module:
        """With the initialisation of torch's generator."""
        return translation_task.Translator(self.num_pieces, self.width, self.layers, dropout=0.1)

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(parameters, lr=self.rate, betas=(0.9, 0.98))

    def rate_of(self, update: int) -> float:
        """Linear warm-up, then the inverse square root. The first update is 1."""
        warm_up = max(1, self.updates // 10)
        return self.rate * min(update / warm_up, (warm_up / update) ** 0.5)

    @staticmethod
    def collate(samples: list[tuple[Any, Any, int]]) -> Any:
        """Of (source, target, id): (inputs, targets), ids; targets and ids one a target piece."""
        inputs, targets = translation_task.batch_of([(source, target) for source, target, _ in samples])
        return (inputs, targets), torch.tensor([number for _, target, number in samples for _ in target])

    def inputs(self, batch: Any, seed: int) -> tuple[Any, Tensor]:
        """(inputs, targets) of what collate made; nothing is drawn."""
        del seed
        inputs, targets = batch
        return inputs, targets

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        """(rows, num_pieces)."""
        found: Tensor = model(inputs)
        return found

    def figures(self, model: nn.Module, data: Any) -> dict[str, float]:
        """``nll_bits``: of the validation pairs, in bits a target piece."""
        return {"nll_bits": translation_task.validation_bits(model, data)}


@dataclasses.dataclass(frozen=True)
class Images:
    """CIFAR-10 at 16 pixels and a wide residual network: the short setting of the test of the claim (recipes/claim).

    Attributes:
        name: of the model.
        images: in a batch of one device.
        updates: of every model; learning rate and its drops are those of the claim, at the same shares of them.
        rate: the highest of the learning rate.
        decay: of the weights, all the time.
        smoothing, burn_in, alpha: as in Translation.
    """

    name: str = "wrn16_1"
    images: int = 64
    updates: int = 1404
    rate: float = 0.4
    decay: float = 5e-4
    smoothing: float = 0.0
    burn_in: int = 0
    alpha: float = 0.3

    clip = math.inf
    columns = 4
    num_classes = 10
    drops = (18 / 45, 38 / 45, 44 / 45)
    warm_up = 1 / 18
    first_rate = 0.1

    @property
    def batch_size(self) -> int:
        """Of one device."""
        return self.images

    def load(self, data: Path, runs: Path) -> Data:
        """The folders ``train``, ``test`` and ``val``."""
        del runs
        return Data(*(_Pixels(data / name) for name in ("train", "test", "val")))

    def model(self) -> nn.Module:
        """With the initialisation of torch's generator."""
        shape = parse_name(self.name)
        assert shape is not None
        return WideResNet(*shape, self.num_classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """SGD with Nesterov's momentum; nothing that has one dimension decays."""
        every = list(parameters)
        groups = [
            {"params": [one for one in every if one.dim() > 1], "weight_decay": self.decay},
            {"params": [one for one in every if one.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, self.rate, momentum=0.9, nesterov=True)

    def rate_of(self, update: int) -> float:
        """Linear warm-up, then steps of a tenth. The first update is 1."""
        done = (update - 1) / self.updates
        if done < self.warm_up:
            first = min(self.rate, self.first_rate)
            return first + (self.rate - first) * done / self.warm_up
        return self.rate * 0.1 ** sum(done >= drop for drop in self.drops)

    @staticmethod
    def collate(samples: list[tuple[Any, Any, int]]) -> Any:
        """Of (pixels, target, id): (pixels, targets), ids; one an image."""
        pixels, targets, ids = zip(*samples, strict=True)
        return (torch.stack(pixels), torch.stack(targets)), torch.tensor(ids)

    def inputs(self, batch: Any, seed: int) -> tuple[Any, Tensor]:
        """(images, targets), shifted by up to an eighth and mirrored as the seed says: the same for all models."""
        pixels, targets = batch
        generator = torch.Generator().manual_seed(seed)
        number, size, margin = len(pixels), pixels.shape[-1], pixels.shape[-1] // 8
        shifts = torch.randint(0, 2 * margin + 1, (2, number, 1), generator=generator) + torch.arange(size)
        mirrored = torch.rand(number, 1, generator=generator) < 0.5  # noqa: PLR2004
        rows, columns = shifts[0], torch.where(mirrored, shifts[1].flip(1), shifts[1])
        padded = nn.functional.pad(pixels, [margin] * 4)
        chosen = padded[torch.arange(number)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return _normalised(chosen.permute(0, 3, 1, 2)), targets

    def logits(self, model: nn.Module, inputs: Any) -> Tensor:
        """(images, classes) float32; computed in bfloat16 where autocast holds that to be safe."""
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = model(inputs)
        return found.float()

    @torch.no_grad()
    def figures(self, model: nn.Module, data: Any) -> dict[str, float]:
        """``nll_bits`` and ``top1`` (percent), in float32."""
        was_training = model.training
        model.eval()
        logits = torch.cat([model(_normalised(part)) for part in data.pixels.split(500)])
        model.train(was_training)
        nll = nn.functional.cross_entropy(logits.double(), data.targets) / math.log(2)
        top1 = 100 * (logits.argmax(dim=1) == data.targets).double().mean()
        return {"nll_bits": float(nll), "top1": float(top1)}


class _Pixels(torch.utils.data.Dataset):
    """A folder of images for each class, in memory."""

    def __init__(self, folder: Path):
        found = ImageFolder(str(folder))
        self.pixels = torch.stack([torch.from_numpy(np.array(image)) for image, _ in found]).permute(0, 3, 1, 2)
        self.targets = torch.tensor(found.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pixels[index], self.targets[index]


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (CIFAR_MEAN, CIFAR_STD))
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


TASKS: dict[str, Any] = {"translation": Translation, "images": Images}
