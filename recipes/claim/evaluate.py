"""Owns what a trained image classifier predicts: accuracy, NLL, calibration. Reads checkpoints, never writes one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq_codistill.vision.config import VisionConfig
from fairseq_codistill.vision.datasets import CIFAR_MEAN, CIFAR_STD
from fairseq_codistill.vision.models import make_model
from torch import Tensor
from torchvision.datasets import ImageFolder

NUM_BINS = 15


def expected_calibration_error(logits: Tensor, targets: Tensor, num_bins: int = NUM_BINS) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their images; from 0 to 1.

    Args:
        logits: (num_images, num_classes).
        targets: (num_images,) int64.
        num_bins: over (0, 1]; a confidence on an edge belongs to the bin below.

    Source: Guo et al. 2017, section 2.
    """
    confidences, predicted = logits.double().softmax(dim=1).max(dim=1)
    bins = (confidences * num_bins).ceil().long().clamp(1, num_bins) - 1
    difference = confidences - (predicted == targets).double()
    sums = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, difference)
    return float(sums.abs().sum() / len(targets))


def figures(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """``top1`` (percent), ``nll`` (nats), ``ece`` (percent) of (num_images, num_classes) logits."""
    return {
        "top1": 100 * float((logits.argmax(dim=1) == targets).double().mean()),
        "nll": float(torch.nn.functional.cross_entropy(logits.double(), targets)),
        "ece": 100 * expected_calibration_error(logits, targets),
    }


def load_folder(folder: Path) -> tuple[Tensor, Tensor]:
    """((num_images, 3, height, width) uint8, (num_images,) int64) of a folder of images for each class."""
    images = ImageFolder(str(folder))
    pixels = torch.stack([torch.from_numpy(np.array(images[i][0])) for i in range(len(images))])
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.tensor(images.targets)


@torch.no_grad()
def predict(checkpoint: Path, pixels: Tensor, num_classes: int = 10) -> Tensor:
    """(num_images, num_classes) float32 logits of the model in a checkpoint, in float32 whatever it trained in."""
    stored: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    options = {name: value for name, value in stored["options"].items() if name in VisionConfig.__dataclass_fields__}
    model = make_model(VisionConfig(**options), num_classes)
    model.load_state_dict(stored["model"])
    model.eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (CIFAR_MEAN, CIFAR_STD))
    batches = [model((part.float() - mean) / std) for part in pixels.split(500)]
    return torch.cat(batches)


def log_mean_probability(logits: list[Tensor]) -> Tensor:
    """What models predict together: the logarithm of the mean of their probabilities, same shape as each."""
    return torch.stack([one.double().log_softmax(dim=1) for one in logits]).logsumexp(dim=0) - np.log(len(logits))
