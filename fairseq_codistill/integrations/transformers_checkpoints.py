"""Owns which checkpoint of a Hugging Face trainer is whole, and what of codistillation is in it.

When one is written, and where training goes on, the trainer says.
"""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from fairseq_codistill.whole_files import whole_file

STATE = "codistill.pt"  # in every checkpoint's folder
WRITTEN_LAST = "trainer_state.json"  # by the trainer itself
PREFIX = "checkpoint-"
logger = logging.getLogger(__name__)


def newest_checkpoint(folder: str) -> str | None:
    """The newest one in ``output_dir`` that was written to its end; those that are passed over are warned of.

    Args:
        folder: need not be there.

    Returns:
        its folder; None where there is none.
    """
    numbers = {path: path.name.removeprefix(PREFIX) for path in Path(folder).glob(PREFIX + "*") if path.is_dir()}
    found = [path for path, number in numbers.items() if number.isdecimal()]
    for path in sorted(found, key=lambda path: int(numbers[path]), reverse=True):
        if _is_whole(path):
            return str(path)
        logger.warning(
            "codistillation: %s has no whole %s, so the model ended while it was written; passed over",
            path,
            WRITTEN_LAST,
        )
    return None


def _is_whole(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / WRITTEN_LAST).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def write_state(folder: str, state: dict[str, Any]) -> None:
    """Put what :meth:`Codistiller.state_dict` gave into a checkpoint.

    Raises:
        SaveError: it cannot be written.
    """
    with whole_file(Path(folder, STATE)) as file:
        torch.save(state, file)


def read_state(folder: str, has_copies: bool) -> dict[str, Any] | None:
    """What :func:`write_state` put there; None where it is not there or damaged.

    Args:
        has_copies: copies of the peers are in it, so that a warning is due where it is not there.
    """
    path = Path(folder, STATE)
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return found
    except FileNotFoundError:
        why = "is not there"
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        why = "is damaged"
    if has_copies or why == "is damaged":
        logger.warning(
            "codistillation: %s %s; training goes on without%s",
            path,
            why,
            " the copies of the peers, until they send theirs" if has_copies else " it",
        )
    return None
