"""Owns the mixing of the images of a batch with each other: timm's mixup and cutmix, drawn alike on all models.

What is drawn is a function of the data seed and of the batch's position, so that rank r of every model mixes alike, and
a run that goes on mixes as one without a pause. Fingerprints are those of the images before it.
"""

import hashlib

import numpy as np
from timm.data import Mixup
from torch import Tensor

from .config import VisionConfig


class Mixing:
    """Mixes the batches of one rank.

    Args:
        config: validated options, of which ``is_mixed`` holds.
        num_classes: of the data set.
        rank: inside the model.
    """

    def __init__(self, config: VisionConfig, num_classes: int, rank: int):
        self._seed, self._rank = config.codistill_data_seed, rank
        self._mixup = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=num_classes)

    def __call__(self, images: Tensor, targets: Tensor, elapsed: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """One batch, mixed.

        Args:
            images: (batch, 3, size, size) float, changed in place; an even number of them.
            targets: (batch,) int64 classes.
            elapsed: updates' worth of batches before this one.
            micro_batch: index inside the update.

        Returns:
            the images, and (batch, num_classes) float32 shares of the classes.
        """
        name = repr(("mixing", self._seed, self._rank, elapsed, micro_batch)).encode()
        state = np.random.get_state()  # timm draws from numpy's global generator
        np.random.seed(int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little"))
        try:
            mixed, shares = self._mixup(images, targets)
        finally:
            np.random.set_state(state)
        return mixed, shares
