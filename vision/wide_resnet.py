"""Owns wide residual networks for small images, and the cut of their channels into views; timm has none of them.

Source: Zagoruyko and Komodakis 2016; the cut is that of section 5 of the codistillation paper ("multi-view").
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_codistill.config import ConfigError

STEM_WIDTH = 16


def parse_name(name: str) -> tuple[int, int] | None:
    """``wrn28_10`` -> (28, 10); None for the name of another kind of model.

    Raises:
        ConfigError: there is no wide residual network of that depth.
    """
    match = re.fullmatch(r"wrn(\d+)_(\d+)", name)
    if match is None:
        return None
    depth, width = int(match.group(1)), int(match.group(2))
    if depth < 10 or (depth - 4) % 6 or width < 1:
        raise ConfigError(
            f"--model is {name!r}; the depth must be 10, 16, 22, 28, ... and the width 1 or more: wrn28_10"
        )
    return depth, width


class WideBlock(nn.Module):
    """Two 3 x 3 convolutions, each after batch normalisation and ReLU, around a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int, drop_rate: float):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(num_in), nn.BatchNorm2d(num_out)
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, padding=1, bias=False)
        self.dropout = nn.Dropout(drop_rate)
        is_same = num_in == num_out and stride == 1
        self.shortcut = None if is_same else nn.Conv2d(num_in, num_out, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, num_in, height, width) -> (batch, num_out, height / stride, width / stride)."""
        active = F.relu(self.norm1(images))
        shortcut = images if self.shortcut is None else self.shortcut(active)
        hidden = self.dropout(F.relu(self.norm2(self.conv1(active))))
        return self.conv2(hidden) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width.

    Args:
        depth: 6 k + 4, where a group has k blocks.
        width: the groups have 16, 32 and 64 times as many channels.
        num_classes: of the predictions.
        drop_rate: dropout inside the blocks.
        view: (split, num_splits): only that split of the first group's channels reaches the second; None: all do.
        frozen: the stem and the first group never change, their statistics included.

    Raises:
        ConfigError: the channels cannot be cut into that many equal splits.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        drop_rate: float = 0.0,
        view: tuple[int, int] | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        num_channels = STEM_WIDTH * width
        self.view = view_channels(num_channels, *view) if view else range(num_channels)
        self.frozen = frozen
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(3, STEM_WIDTH, 3, padding=1, bias=False)
        self.group1 = _group(STEM_WIDTH, num_channels, blocks, 1, drop_rate)
        self.group2 = _group(len(self.view), 2 * num_channels, blocks, 2, drop_rate)
        self.group3 = _group(2 * num_channels, 4 * num_channels, blocks, 2, drop_rate)
        self.norm = nn.BatchNorm2d(4 * num_channels)
        self.classifier = nn.Linear(4 * num_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)
        if frozen:
            for parameter in self.first_group_parameters():
                parameter.requires_grad_(False)

    def first_group_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the stem and the first group, which all models may share."""
        yield from self.stem.parameters()
        yield from self.group1.parameters()

    def train(self, mode: bool = True) -> "WideResNet":
        """As ever, but for a frozen group, whose batch normalisation keeps its statistics."""
        super().train(mode)
        if self.frozen:
            self.group1.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) normalised images -> (batch, num_classes) logits."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self.group1(self.stem(images))
        seen = hidden[:, self.view.start : self.view.stop]
        hidden = F.relu(self.norm(self.group3(self.group2(seen))))
        return self.classifier(hidden.mean(dim=(2, 3)))

    def load_first_group(self, state: dict[str, Any], source: str) -> None:
        """Take the stem and the first group from another wide residual network of the same width and depth.

        Raises:
            ConfigError: ``source`` is the checkpoint of something else.
        """
        own = {name: value for name, value in self.state_dict().items() if name.startswith(("stem.", "group1."))}
        unfit = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
        if unfit:
            raise ConfigError(
                f"--first-group is {source!r}, which has no fitting {unfit[0]}; it must come from the same --model"
            )
        self.load_state_dict({name: state[name] for name in own}, strict=False)


def view_channels(num_channels: int, split: int, num_splits: int) -> range:
    """The channels of one of ``num_splits`` equal splits. They are disjoint, and together they are all channels.

    Raises:
        ConfigError: the channels cannot be cut into that many equal splits, or there is no such split.
    """
    if num_channels % num_splits:
        raise ConfigError(
            f"--num-views is {num_splits}; {num_channels} channels cannot be cut into so many equal splits"
        )
    if not 0 <= split < num_splits:
        raise ConfigError(f"--view is {split}; it must be between 0 and {num_splits - 1}: --num-views is {num_splits}")
    size = num_channels // num_splits
    return range(split * size, (split + 1) * size)


def _group(num_in: int, num_out: int, num_blocks: int, stride: int, drop_rate: float) -> nn.Sequential:
    first = WideBlock(num_in, num_out, stride, drop_rate)
    return nn.Sequential(first, *(WideBlock(num_out, num_out, 1, drop_rate) for _ in range(num_blocks - 1)))
