"""Owns the files a run leaves: what training needs to go on, written so that a crash leaves the last whole one."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from fairseq_codistill.config import ConfigError

FIXED = (
    "model dataset batch_size devices_per_model data_fraction stretch codistill_data_seed seed optimizer view num_views"
).split()
LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"


@dataclasses.dataclass
class Checkpoint:
    """What a file holds; all of it plain data, which ``torch.load(weights_only=True)`` reads.

    Attributes:
        model: state of the model, without any wrapper: ``timm.create_model(...).load_state_dict`` takes it.
        optimizer: its state.
        scaler: state of the loss scaling of fp16.
        elapsed: updates' worth of batches done. It is the whole state of data and random numbers: both are functions
            of it.
        replicas: copies of the peers, where checkpoints are exchanged: they are part of what is learned from next.
        best_top1: highest validation accuracy so far, in percent.
        options: of the run, by name.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    elapsed: int
    replicas: dict[str, Any]
    best_top1: float
    options: dict[str, Any]


def save(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, or leave the file of that name as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / (name + ".tmp")
    torch.save({field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}, unfinished)
    os.replace(unfinished, folder / name)


def load(folder: Path) -> Checkpoint | None:
    """The last checkpoint in a folder, or None where there is none.

    Raises:
        ConfigError: the file is not one of ours.
    """
    path = folder / LAST
    if not path.exists():
        return None
    stored = torch.load(path, map_location="cpu", weights_only=True)
    names = {field.name for field in dataclasses.fields(Checkpoint)}
    if not isinstance(stored, dict) or set(stored) != names:
        raise ConfigError(f"{path} is not a checkpoint of codistill-vision; give another --save-dir")
    return Checkpoint(**stored)


def check_options(checkpoint: Checkpoint, options: dict[str, Any], folder: Path) -> None:
    """Raises:
    ConfigError: training would go on with another model, or with other batches at the same position.
    """
    for name in FIXED:
        before = checkpoint.options.get(name)
        if before != options[name]:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} is {options[name]!r}, but {folder / LAST} was trained with {before!r}; give that, or another "
                "--save-dir"
            )
