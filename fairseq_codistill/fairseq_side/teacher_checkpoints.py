"""Owns reading a fairseq checkpoint as a teacher: its own architecture, with the dictionaries of the task at hand."""

import contextlib
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_codistill.config import ConfigError
from fairseq_codistill.fairseq_side import compat

logger = logging.getLogger(__name__)
UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, AttributeError, TypeError, ValueError, pickle.UnpicklingError)


def load_teacher(file: str, task: Any, build_model: Callable[[Any], Any]) -> Any:
    """The model of a checkpoint, on the CPU.

    Args:
        file: that fairseq-train wrote, with or without codistillation.
        task: of the model that is taught, whose dictionaries the teacher must know.
        build_model: of the task: settings of a model -> that model.

    Raises:
        ConfigError: it is no such checkpoint, or knows other dictionaries.
    """
    flag = f"--codistill-teacher is {file!r}"
    compat.apply()
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(file)
        cfg = convert_namespace_to_omegaconf(state["args"]) if state.get("args") is not None else state["cfg"]
        settings, parameters = cfg.model, state["model"]
    except UNREADABLE as error:
        raise ConfigError(f"{flag}, which is no checkpoint of fairseq: {_first_line(error)}") from error
    _check_dictionaries(flag, file, cfg.task, task)
    model = build_model(settings)
    if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
        raise ConfigError(
            f"{flag}, which was trained with --adaptive-softmax-cutoff: an adaptive softmax has no logits of the whole "
            "vocabulary to teach by; give a teacher without it"
        )
    try:
        model.load_state_dict(parameters, strict=True, model_cfg=settings)
    except RuntimeError as error:
        raise ConfigError(
            f"{flag}, whose parameters do not fit its own settings with the dictionaries of this run "
            f"({_first_line(error)}); a teacher must know the same dictionaries"
        ) from error
    return model


def _check_dictionaries(flag: str, checkpoint: str, theirs: Any, task: Any) -> None:
    """Compare symbol by symbol where the teacher's data are still there; sizes are compared in any case."""
    folder = str(getattr(theirs, "data", None) or "").split(":")[0]
    for which in ("source", "target"):
        own = getattr(task, f"{which}_dictionary", None)
        language = getattr(theirs, f"{which}_lang", None)
        file = Path(folder) / (f"dict.{language}.txt" if language else "dict.txt")
        if own is None:
            continue
        if not folder or not file.is_file():
            logger.info("codistillation: %s; %s is not here: only the dictionary's size is compared", flag, file)
            continue
        if is_newer(file, checkpoint):
            logger.warning(
                "codistillation: %s, and %s is newer: if the data were prepared anew since it was trained, its symbols "
                "mean something else, which cannot be seen here",
                flag,
                file,
            )
        symbols = type(task).load_dictionary(str(file)).symbols
        if symbols != own.symbols[: len(symbols)]:  # behind them is what the task adds, such as a mask
            raise ConfigError(
                f"{flag}, which was trained with another {which} dictionary ({file}, {len(symbols)} symbols) than this "
                f"run's ({len(own.symbols)} symbols); prepare the data with its dictionaries (fairseq-preprocess "
                "--srcdict and --tgtdict)"
            )


def is_newer(file: Path, checkpoint: str) -> bool:
    """Whether a file was written after a checkpoint; False where that cannot be told."""
    try:
        return file.stat().st_mtime > Path(checkpoint).stat().st_mtime
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


@contextlib.contextmanager
def unchanged(task: Any) -> Iterator[None]:
    """Leave a task as it was: some keep something of the model that they built last (a generator, for BLEU)."""
    kept = dict(task.__dict__)
    try:
        yield
    finally:
        task.__dict__.clear()
        task.__dict__.update(kept)
