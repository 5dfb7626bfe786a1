"""Owns the average of the last checkpoints of a training, which pip does not install with fairseq.

The average is an ordinary fairseq checkpoint. Files are read with torch's safe loader only.
"""

import argparse
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_codistill.fairseq_side import compat
from fairseq_codistill.whole_files import whole_file

EPOCH_CHECKPOINT = re.compile(r"checkpoint(\d+)\.pt")


def last_checkpoints(folder: Path, num_last: int) -> list[Path]:
    """The checkpoints of the last epochs, oldest first.

    Raises:
        ValueError: ``folder`` holds fewer than ``num_last`` of them.
    """
    if num_last < 1:
        raise ValueError(f"--last is {num_last}; it must be at least 1")
    epochs = {}
    for path in folder.glob("checkpoint*.pt"):
        match = EPOCH_CHECKPOINT.fullmatch(path.name)
        if match:
            epochs[int(match.group(1))] = path
    if len(epochs) < num_last:
        raise ValueError(
            f"{folder} holds {len(epochs)} checkpoints of epochs (checkpoint<epoch>.pt) and --last is {num_last}; "
            "train longer, keep more with --keep-last-epochs, or average fewer"
        )
    return [epochs[epoch] for epoch in sorted(epochs)[-num_last:]]


def average_parameters(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of every floating-point tensor, summed in float64 and returned in its own dtype.

    Tensors of integers (counters, versions) are not averaged: the last one is kept.

    Args:
        states: parameters by name, one entry a checkpoint, oldest first.

    Raises:
        ValueError: the checkpoints do not have the same parameters, or not of the same shapes.
    """
    last = states[-1]
    for state in states:
        if state.keys() != last.keys():
            raise ValueError(f"checkpoints of different models: {sorted(state.keys() ^ last.keys())} are not in all")
    averaged = {}
    for name, tensor in last.items():
        if any(state[name].shape != tensor.shape for state in states):
            raise ValueError(f"checkpoints of different models: {name} has several shapes")
        if tensor.is_floating_point():
            total = torch.zeros_like(tensor, dtype=torch.float64)
            for state in states:
                total += state[name]
            averaged[name] = (total / len(states)).to(tensor.dtype)
        else:
            averaged[name] = tensor.clone()
    return averaged


def average_checkpoints(paths: Sequence[Path]) -> dict[str, Any]:
    """A checkpoint whose parameters are the mean; everything else, as the configuration, is the last one's.

    The optimizer's state is left out: it belongs to none of the averaged points.
    """
    compat.apply()
    states = []
    checkpoint: dict[str, Any] = {}
    for path in paths:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        states.append(checkpoint["model"])
    checkpoint["model"] = average_parameters(states)
    checkpoint.pop("last_optimizer_state", None)
    return checkpoint


def main() -> None:
    """Command line: ``python -m fairseq_codistill.fairseq_side.average --checkpoint-dir DIR --last 5 --out FILE``."""
    parser = argparse.ArgumentParser(description="Average the checkpoints of the last epochs.")
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="the --save-dir of a training")
    parser.add_argument("--last", type=int, default=5, help="how many epochs")
    parser.add_argument("--out", type=Path, required=True, help="where to write the averaged checkpoint")
    args = parser.parse_args()
    try:
        paths = last_checkpoints(args.checkpoint_dir, args.last)
        averaged = average_checkpoints(paths)
        with whole_file(args.out) as file:
            torch.save(averaged, file)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        sys.exit(f"average: {type(error).__name__}: {error}" if isinstance(error, KeyError) else f"average: {error}")
    print(f"average of {', '.join(path.name for path in paths)} written to {args.out}")


if __name__ == "__main__":
    main()
