"""Owns the files a run leaves: what training needs to go on, written so that a crash leaves the last whole one.

Nothing half-written ever stands under a final name, and no parameter that is not finite is written over one that is.
"""

import contextlib
import dataclasses
import itertools
import logging
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fairseq_codistill.config import ConfigError, LabelSmoothingConfig, flag_name
from fairseq_codistill.whole_files import UNFINISHED, SaveError, reason, whole_file

from .config import OptimizationConfig, VisionConfig
from .log import LOG_NAME

logger = logging.getLogger("vision.checkpoints")
FREE = ("max_updates", "max_nonfinite", "channels_last", "compile")  # nothing that is learned depends on them
FIXED = (
    "model model_kwargs dataset batch_size update_freq devices_per_model data_fraction stretch "
    "codistill_data_seed seed optimizer momentum norm_weight_decay num_views freeze_first_group "
    "transfer_dataset"
).split()
# What a training may go on with otherwise, but not without a word.
TOLD = (
    *(field.name for field in dataclasses.fields(OptimizationConfig) if field.name not in (*FREE, *FIXED)),
    *(field.name for field in dataclasses.fields(LabelSmoothingConfig)),
    "drop_rate",
)
LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"
WEIGHTS = "checkpoint_best.safetensors"
AVERAGE = "model_ema"  # under which timm.create_model(checkpoint_path=) looks for a moving average
# What a file raises that is damaged, empty, or something else.
UNREADABLE = (
    *(OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)
UPDATE_KEY = "codistill_update"  # of the metadata of safetensors: updates' worth of batches done
DATASET_KEY = "codistill_dataset"  # of the metadata of safetensors: pixels are normalised as is usual for it


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
        evaluated_at: ``elapsed`` at the latest evaluation; None in a file that does not say.
        ema: moving average of ``model``, in the same form; empty without ``--ema-decay``. In the file it has
            the name that timm gives it, which takes it before ``model``.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    elapsed: int
    replicas: dict[str, Any]
    best_top1: float
    options: dict[str, Any]
    evaluated_at: int | None = None
    ema: dict[str, Any] = dataclasses.field(default_factory=dict)


def prepare(folder: Path) -> None:
    """Make the folder of a run, and remove what a killed run left half-written in it.

    Raises:
        ConfigError: nothing can be written there.
    """
    trial = folder / f"writable{UNFINISHED}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"1")
        trial.unlink()
        for name in (LAST, BEST, WEIGHTS):
            for path in folder.glob(f"{name}*{UNFINISHED}"):
                path.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            trial.unlink()
        raise ConfigError(f"--save-dir is {str(folder)!r}, which cannot be written to: {reason(error)}") from error
    log = folder / LOG_NAME
    try:
        if log.exists():  # and may be somebody else's
            log.open("a+b").close()
    except OSError as error:
        raise ConfigError(f"{log} cannot be written to: {reason(error)}; give another --save-dir") from error


def save(folder: Path, name: str, checkpoint: Checkpoint, writer: str = "") -> None:
    """Write a checkpoint, or leave the file of that name as it was; ``writer`` as for ``whole_file``.

    Raises:
        SaveError: it cannot be written; nothing of it is left.
    """
    content = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    if average := content.pop("ema"):
        content[AVERAGE] = average
    with whole_file(folder / name, writer) as file:
        torch.save(content, file)


def save_weights(folder: Path, checkpoint: Checkpoint) -> None:
    """Write what is evaluated, the moving average if there is one, as safetensors.

    Raises:
        SaveError: it cannot be written; nothing of it is left.
    """
    state = checkpoint.ema or checkpoint.model
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    # The format is what other readers look at.
    said = {"format": "pt", DATASET_KEY: checkpoint.options["dataset"].partition(":")[0]}
    said[UPDATE_KEY] = str(checkpoint.elapsed)
    with whole_file(folder / WEIGHTS) as file:
        file.write(safetensors.torch.save(tensors, said))


def save_best_weights(folder: Path, checkpoint: Checkpoint, are_wanted: bool) -> None:
    """Write them with the best checkpoint; those that only an earlier start was asked for are not left behind it.

    Raises:
        SaveError: they are wanted, and cannot be written.
    """
    if not (are_wanted or (folder / WEIGHTS).exists()):
        return
    try:
        save_weights(folder, checkpoint)
    except SaveError as error:
        if are_wanted:
            raise
        with contextlib.suppress(OSError):
            (folder / WEIGHTS).unlink()
        logger.warning("%s, of an earlier start, is removed: %s", folder / WEIGHTS, error)


def write_missing_weights(folder: Path) -> None:
    """Write the safetensors of the best checkpoint where they are missing or of another: it was saved without them.

    A best checkpoint that cannot be read is a warning.

    Raises:
        SaveError: they cannot be written; nothing of them is left.
    """
    best, weights = folder / BEST, folder / WEIGHTS
    if not best.exists():
        return
    try:
        checkpoint = load(folder, BEST)
    except ConfigError as error:
        logger.warning("--safetensors: %s is not written: %s", weights, error)
        return
    is_older = weights.exists() and weights.stat().st_mtime_ns < best.stat().st_mtime_ns
    if checkpoint is not None and (is_older or _update_of(weights) != str(checkpoint.elapsed)):
        save_weights(folder, checkpoint)


def _update_of(weights: Path) -> str | None:
    """The update that a file of safetensors is of; None where it is missing, damaged or does not say."""
    try:
        with safetensors.safe_open(str(weights), "pt") as file:
            return (file.metadata() or {}).get(UPDATE_KEY)
    except UNREADABLE:
        return None


def load(folder: Path, name: str = LAST) -> Checkpoint | None:
    """A checkpoint in a folder, or None where there is none. Fields that came later may be missing in it.

    Raises:
        ConfigError: the file is not one of ours.
    """
    path = folder / name
    if not path.exists():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ConfigError(
            f"{path} cannot be read: {reason(error)}; remove it to begin anew, or give another --save-dir"
        ) from error
    if isinstance(stored, dict) and AVERAGE in stored:
        stored["ema"] = stored.pop(AVERAGE)
    fields = dataclasses.fields(Checkpoint)
    missing = dataclasses.MISSING
    needed = {field.name for field in fields if field.default is missing and field.default_factory is missing}
    if not isinstance(stored, dict) or not needed <= set(stored) <= {field.name for field in fields}:
        raise ConfigError(f"{path} is not a checkpoint of codistill-vision; give another --save-dir")
    return Checkpoint(**stored)


def tell_changes(checkpoint: Checkpoint, options: dict[str, Any], folder: Path) -> None:
    """Warn of each setting of the training that is not the checkpoint's; what that does not hold is not compared."""
    before = checkpoint.options
    for name in TOLD:
        if name in before and before[name] != options[name]:
            changed = f"{flag_name(name)} was {before[name]!r} and is {options[name]!r}"
            logger.warning("going on otherwise than up to %s: %s", folder / LAST, changed)


def check_options(checkpoint: Checkpoint, options: dict[str, Any], folder: Path) -> None:
    """Raises:
    ConfigError: training would go on with another model, or with other batches at the same position.
    """
    defaults = VisionConfig()
    for name in FIXED:
        before = checkpoint.options.get(name, getattr(defaults, name, None))  # options that came later
        if _what_counts(name, before) != _what_counts(name, options[name]):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} is {options[name]!r}, but {folder / LAST} was trained with {before!r}; give that, or another "
                "--save-dir"
            )
    then, now = (_split_of(each) for each in (checkpoint.options, options))
    if then != now:
        raise ConfigError(
            f"--view is {options['view']!r}, {_channels(now)} for model {options['codistill_model_index']}, but "
            f"{folder / LAST} was trained with {_channels(then)}; give --view {then.partition(' ')[0] or repr('')}, or "
            "another --save-dir"
        )
    if checkpoint.ema and not options["ema_decay"]:
        raise ConfigError(
            f"--ema-decay is {options['ema_decay']}, but {folder / LAST} holds a moving average, which would be lost; "
            f"give --ema-decay {checkpoint.options.get('ema_decay')} as before, or another --save-dir"
        )
    decay = checkpoint.options.get("weight_decay", options["weight_decay"])
    if any(decay) != any(options["weight_decay"]):  # which parameters have any is a part of the optimizer
        raise ConfigError(
            f"--weight-decay is {options['weight_decay']}, but {folder / LAST} was trained with {decay}: a training "
            "with none and one with some do not go on from each other; give that, or another --save-dir"
        )
    begun_with = checkpoint.options.get("first_group", options["first_group"])
    if bool(begun_with) != bool(options["first_group"]):  # the file itself may have been moved
        raise ConfigError(
            f"--first-group is {options['first_group']!r}, but {folder / LAST} was begun with {begun_with!r}; give "
            "that, or another --save-dir"
        )
    names = ("pretrained", "initial_checkpoint")
    begun_from = _weights_of({name: checkpoint.options.get(name, options[name]) for name in names})
    if bool(begun_from) != bool(now_from := _weights_of(options)):  # the distance is measured from them
        raise ConfigError(
            f"training starts from {now_from or 'no weights'}, but {folder / LAST} was begun from "
            f"{begun_from or 'none'}, and its distance is measured from there; give the same options, or another "
            "--save-dir"
        )
    models = checkpoint.options.get("codistill_num_models")
    if checkpoint.replicas.get("copies") and models != options["codistill_num_models"]:
        raise ConfigError(
            f"--codistill-num-models is {options['codistill_num_models']}, but {folder / LAST} holds copies of the "
            f"peers of a run of {models} models; give that, or another --save-dir"
        )
    before = checkpoint.options.get("num_images", options["num_images"])
    if before != options["num_images"]:
        raise ConfigError(
            f"--dataset has {options['num_images']} images to train on, but {folder / LAST} was trained on {before}, "
            "in another order; give those (mend or replace a broken image, rather than leave it out), or another "
            "--save-dir"
        )
    _check_classes(checkpoint.options.get("class_names", []), options.get("class_names", []), folder)
    for flag, value in checkpoint.options.get("pixels", {}).items():  # of files that do not say it nothing is known
        now = options["pixels"].get(flag, value)
        if now != value:
            raise ConfigError(
                f"{flag} is {now!r}, but {folder / LAST} was trained with {value!r}; give that, or another --save-dir"
            )


def _check_classes(before: list[str], now: list[str], folder: Path) -> None:
    """Raises: ConfigError, where an output would stand for another class. Older checkpoints do not say."""
    pairs = enumerate(itertools.zip_longest(before, now)) if before and now else []
    for number, (then, found) in pairs:
        if then != found:
            raise ConfigError(
                f"class {number} of --dataset is {found!r}, but {folder / LAST} was trained with {then!r} in its "
                "place; name the folders of the classes as before, or give another --save-dir"
            )


def _split_of(options: dict[str, Any]) -> str:
    """As :attr:`VisionConfig.split`; options that came later may be missing."""
    names = ("view", "num_views", "codistill_model_index")
    return VisionConfig(**{name: options[name] for name in names if name in options}).split


def _channels(split: str) -> str:
    return f"split {split}" if split else "all channels"


def _weights_of(options: dict[str, Any]) -> str:
    """Which option says what weights training starts from; empty for none."""
    file = options["initial_checkpoint"]
    return f"--initial-checkpoint {file}" if file else "--pretrained weights" if options["pretrained"] else ""


def _what_counts(name: str, value: Any) -> Any:
    """Of an option's value: folders may be moved, and what is dropped out changes no parameter's meaning."""
    if name in ("dataset", "transfer_dataset"):
        return value.partition(":")[0]
    return sorted(pair for pair in value if not pair.startswith("drop")) if name == "model_kwargs" else value


class Finite:
    """Whether a state is finite where it was at the start: some models clamp by buffers that are infinite.

    Args:
        model: at its start.
    """

    def __init__(self, model: nn.Module):
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        self._names = {name for name, value in state.items() if value.isfinite().all()}
        self._others = state.keys() - self._names
        self._infinite = {name for name in self._others if not state[name].isnan().any()}

    @torch.no_grad()
    def holds(self, state: dict[str, Any]) -> bool:
        """It waits for the device once, not for every tensor. What was infinite at the start may be so, but not NaN."""
        flags = [torch.isfinite(value).all() for name, value in state.items() if name in self._names]
        flags += [~torch.isnan(value).any() for name, value in state.items() if name in self._infinite]
        return not flags or bool(torch.stack(flags).all())

    @torch.no_grad()
    def mend(self, average: nn.Module, model: nn.Module) -> None:
        """Give a moving average what was not finite at the start as the model has it: infinities average to NaN."""
        if self._others:
            state = average.state_dict()
            for name, value in model.state_dict().items():
                if name in self._others:
                    state[name].copy_(value)


def load_into(model: nn.Module, state: dict[str, Any], folder: Path) -> None:
    """Give a model the state of a checkpoint.

    Raises:
        ConfigError: they do not fit together.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = [line.strip() for line in str(error).splitlines() if line.strip()][:2]
        raise ConfigError(
            f"the model does not fit {folder / LAST} ({' '.join(first)}); give what it was trained with, classes of "
            "the data among them, or another --save-dir"
        ) from error
