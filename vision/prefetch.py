"""Owns the way of batches to the device: the next one is copied there while the current one is computed on.

Only a GPU has anything to gain; elsewhere batches pass as they are. Nothing here waits for the device.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

from .data import Batch

Item = TypeVar("Item")


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches, on a GPU copied in advance, on a stream of their own.

    Args:
        batches: on the CPU, in pinned memory where they are to be copied in the background.
        device: to compute on.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    coming: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)
            targets = batch.targets.to(device, non_blocking=True)
            copied = stream.record_event()
        if coming is not None:
            yield _ready(*coming)
        coming = batch._replace(images=images, targets=targets), copied
    if coming is not None:
        yield _ready(*coming)


def _ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(copied)
    for tensor in (batch.images, batch.targets):
        tensor.record_stream(current)  # or its memory might be given away while it is still read
    return batch


def in_groups(batches: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Batches of one update at a time; one that is not complete is left out.

    Args:
        size: batches of one update.
    """
    iterator = iter(batches)
    while len(group := list(islice(iterator, size))) == size:
        yield group
