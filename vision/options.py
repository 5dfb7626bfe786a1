"""Owns the way options are read: YAML presets first, then the command line, which wins. Knows no option by name."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fairseq_codistill import __version__
from fairseq_codistill.config import CodistillationConfig, ConfigError, LabelSmoothingConfig, flag_name
from fairseq_codistill.option import JoinedAction

from .config import DataConfig, ModelConfig, OptimizationConfig, RunConfig, VisionConfig

PRESETS = Path(__file__).parent / "configs"
PRESET_HOME = ("vision", "configs")  # where they lie in the repository
TYPES: dict[str, Any] = typing.get_type_hints(VisionConfig)
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(VisionConfig)}


GROUPS: dict[str, Any] = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": OptimizationConfig,
    "label smoothing": LabelSmoothingConfig,
    "codistillation": CodistillationConfig,
    "run": RunConfig,
}
EXAMPLES = """\
examples:
  one model on the embedded digits, on a CPU within a minute:
    codistill-vision --cpu --model wrn10_1 --epochs 2 --save-dir checkpoints/alone
  two models of 8 devices that teach each other, with the schedules of the paper:
    codistill-launch --num-models 2 --devices-per-model 8 -- codistill-vision \\
        --config resnet50_goyal codistill_step --dataset imagefolder:DIR --seed {model+1} --save-dir checkpoints/{model}

exit codes: 0 finished; 128 + N saved after signal N, the same command goes on; 2 a setting cannot work; 1 other errors
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, not below a hundred lines of usage."""

    def error(self, message: str) -> typing.NoReturn:
        named = next((word.partition("=")[0] for word in message.split() if word.startswith("--")), "")
        meant = difflib.get_close_matches(named, map(flag_name, FIELDS), n=1) if "unrecognized" in message else []
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        raise ConfigError(f"{message}{hint}; {self.prog} --help lists all options")


def make_parser() -> argparse.ArgumentParser:
    """Every field of :class:`VisionConfig` as a flag; flags that are not given leave no trace in what it returns."""
    parser = Parser(
        prog="codistill-vision",
        usage="%(prog)s [--config FILE ...] [--OPTION VALUE ...] --save-dir DIR",
        description="Train an image classifier, alone or with other models that it learns from and teaches.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    parser.add_argument(
        "--config",
        action="extend",  # given twice it is one list
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"YAML files of options, later ones win; also by the name of a preset: {presets}",
    )
    for title, owner in GROUPS.items():
        group = parser.add_argument_group(title, (owner.__doc__ or "").strip().splitlines()[0].replace("``", ""))
        for field in dataclasses.fields(owner):
            group.add_argument(flag_name(field.name), **_settings(field))
    return parser


def _settings(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """What argparse is told of a field, but for choices: :func:`parse_options` checks those, of YAML files as well."""
    kind, choices = TYPES[field.name], field.metadata.get("choices")
    text = f"{field.metadata['help']} [{_shown(_default(field))}]".replace("%", "%%")
    if kind is bool:  # argparse would take --no-save for the opposite of --save
        is_negative = field.name.startswith("no_")
        return {"help": text, "action": "store_true" if is_negative else argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return {"help": text, "type": item, "nargs": "*", "metavar": METAVARS[item]}
    if field.metadata.get("repeatable"):
        return {"help": text, "action": JoinedAction, "metavar": METAVARS[kind]}
    metavar = "{" + ",".join(choices) + "}" if choices else METAVARS[kind]
    return {"help": text, "type": kind, "metavar": metavar}


def read_config(path: str) -> dict[str, Any]:
    """The options of one YAML file, with the types of their fields.

    Args:
        path: a file, or the name of a preset, also with ``vision/configs/`` before it.

    Raises:
        ConfigError: there is no such file, or something in it is no option or of another type.
    """
    file = Path(path)
    if not file.is_file() and (path == file.name or file.parent.parts[-2:] == PRESET_HOME):
        # Presets are found from any folder: after installation nobody knows where they lie. Another path is a file.
        file = PRESETS / f"{file.stem}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise ConfigError(f"--config {path}: no such file, and no preset of that name; the presets are {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {path}: it is not UTF-8 ({error.reason} at byte {error.start}); save it so"
        ) from error
    except OSError as error:
        raise ConfigError(f"--config {path}: it cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: it must hold 'option: value' lines, not a {type(content).__name__}")
    return {_known(name, path): _typed(name, value, path) for name, value in content.items()}


def parse_options(argv: Sequence[str] | None = None) -> VisionConfig:
    """The validated options of a command line.

    Raises:
        ConfigError: naming the first setting that cannot work.
        SystemExit: help was asked for.
    """
    given = vars(make_parser().parse_args(argv))
    values: dict[str, Any] = {}
    for path in given.pop("config"):
        values |= read_config(path)
    config = VisionConfig(**(values | given))
    config.validate()
    for name, field in FIELDS.items():
        choices = field.metadata.get("choices")
        if choices and getattr(config, name) not in choices:
            raise ConfigError(f"{flag_name(name)} is {getattr(config, name)!r}; it must be one of {', '.join(choices)}")
    return config


def _known(name: Any, path: str) -> str:
    if name in FIELDS:
        return str(name)
    close = difflib.get_close_matches(str(name), FIELDS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "; see --help, with _ for -"
    raise ConfigError(f"--config {path}: {name!r} is no option{hint}")


def _typed(name: str, value: Any, path: str) -> Any:
    """``value`` with the type of its field; whole numbers do for fractions, and one value for a list of one."""
    kind = TYPES[name]
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return [_scalar(name, entry, item, path) for entry in (value if isinstance(value, list) else [value])]
    return _scalar(name, value, kind, path)


def _scalar(name: str, value: Any, kind: type, path: str) -> Any:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as text: it wants 1.0e-4
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    if type(value) is kind:
        return value
    raise ConfigError(f"--config {path}: {name} is {value!r}; it must be of type {kind.__name__}")


def _default(field: dataclasses.Field[Any]) -> Any:
    return getattr(VisionConfig(), field.name)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(item) for item in value) or "none"
    return "none" if value == "" else str(value)
