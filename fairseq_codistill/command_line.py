"""Owns reading the options of codistillation from a command, word by word, without a parser and in no time.

fairseq reads them too, seconds later and under its whole usage. What is refused here names the option, its value and
the fix. It must accept whatever fairseq would, but for abbreviations, and imports neither fairseq nor torch.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from fairseq_codistill.config import CodistillationConfig, ConfigError, FairseqConfig, LabelSmoothingConfig, flag_name
from fairseq_codistill.option import joined

PREFIX = "--codistill-"
KINDS = {int: "a whole number", float: "a number", str: "given with a value"}


def _fields(*classes: Any) -> dict[str, dataclasses.Field]:
    return {flag_name(field.name): field for cls in classes for field in dataclasses.fields(cls)}


OURS = _fields(CodistillationConfig)
SMOOTHING = _fields(LabelSmoothingConfig)
FAIRSEQ = _fields(FairseqConfig)


def read_options(arguments: Sequence[str]) -> tuple[CodistillationConfig, LabelSmoothingConfig]:
    """What a command says of codistillation; the last of several values counts, but of what may be repeated.

    Args:
        arguments: of a program, with whatever else it takes.

    Returns:
        options that are of their types, but not validated together.

    Raises:
        ConfigError: a name that is none, or a value of another type.
    """
    values: dict[str, Any] = {}
    known = OURS | SMOOTHING | FAIRSEQ
    for position, argument in enumerate(arguments):
        name, has_value, text = argument.partition("=")
        if name not in known:
            if name.startswith(PREFIX):
                raise ConfigError(_unknown(name))
            continue
        field = known[name]
        kind: Any = type(field.default)
        if kind is bool:
            if has_value:
                raise ConfigError(f"{name} is {text!r}; it takes no value: give it to switch it on, or leave it out")
            values[field.name] = True
            continue
        if not has_value:
            text = arguments[position + 1] if position + 1 < len(arguments) else ""
            if position + 1 == len(arguments) or text.startswith("--"):
                raise ConfigError(f"{name} has no value; it must be {KINDS[kind]}")
        if field.metadata.get("repeatable"):
            text = joined(values.get(field.name), text)
        try:
            values[field.name] = kind(text)
        except ValueError as error:
            raise ConfigError(f"{name} is {text!r}; it must be {KINDS[kind]}") from error
    ours = {name: value for name, value in values.items() if flag_name(name) in OURS}
    smoothing = {name: value for name, value in values.items() if flag_name(name) in SMOOTHING}
    return CodistillationConfig(**ours), LabelSmoothingConfig(**smoothing)


def _unknown(name: str) -> str:
    names = [*OURS, *FAIRSEQ]
    close = difflib.get_close_matches(name, names, n=1)
    return f"{name} is no option" + (
        f"; did you mean {close[0]}?" if close else f"; the options are {', '.join(names)}"
    )
