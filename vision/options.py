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
from fairseq_codistill.config import ConfigError, flag_name

from .config import VisionConfig

PRESETS = Path(__file__).parent / "configs"
TYPES: dict[str, Any] = typing.get_type_hints(VisionConfig)
FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(VisionConfig)}


def make_parser() -> argparse.ArgumentParser:
    """Every field of :class:`VisionConfig` as a flag; flags that are not given leave no trace in what it returns."""
    parser = argparse.ArgumentParser(
        prog="codistill-vision",
        description="Train an image classifier, alone or with other models that it learns from and teaches.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"YAML files of options, later ones win; also by the name of a preset: {presets}",
    )
    for field in FIELDS.values():
        kind, choices = TYPES[field.name], field.metadata.get("choices") or None
        settings: dict[str, Any] = {"help": f"{field.metadata['help']} [{_shown(_default(field))}]".replace("%", "%%")}
        if kind is bool:  # argparse would take --no-save for the opposite of --save
            is_negative = field.name.startswith("no_")
            settings["action"] = "store_true" if is_negative else argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            settings |= {"type": typing.get_args(kind)[0], "nargs": "*"}
        else:
            settings |= {"type": kind, "choices": choices}
        parser.add_argument(flag_name(field.name), **settings)
    return parser


def read_config(path: str) -> dict[str, Any]:
    """The options of one YAML file, with the types of their fields.

    Args:
        path: a file, or the name of a preset of ``vision/configs``.

    Raises:
        ConfigError: there is no such file, or something in it is no option or of another type.
    """
    file = Path(path)
    if not file.is_file():
        # Presets are found from any folder: after installation nobody knows where they lie.
        file = PRESETS / f"{file.stem}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise ConfigError(f"--config {path}: no such file, and no preset of that name; the presets are {known}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: it must hold 'option: value' lines, not a {type(content).__name__}")
    return {_known(name, path): _typed(name, value, path) for name, value in content.items()}


def parse_options(argv: Sequence[str] | None = None) -> VisionConfig:
    """The validated options of a command line.

    Raises:
        ConfigError: naming the first setting that cannot work.
        SystemExit: argparse could not read the command line, or was asked for help.
    """
    given = vars(make_parser().parse_args(argv))
    values: dict[str, Any] = {}
    for path in given.pop("config"):
        values |= read_config(path)
    config = VisionConfig(**(values | given))
    for name, field in FIELDS.items():  # argparse checks choices of flags, not those of YAML files
        choices = field.metadata.get("choices")
        if choices and getattr(config, name) not in choices:
            raise ConfigError(f"{flag_name(name)} is {getattr(config, name)!r}; it must be one of {', '.join(choices)}")
    config.validate()
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
