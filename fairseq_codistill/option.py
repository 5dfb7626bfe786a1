"""Owns what an option is made of: a field with its help text, its flag, and the error of a setting that cannot work.

Nothing here knows an option by name, and nothing imports fairseq or torch.
"""

import argparse
import dataclasses
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work. The message names the option, its value and the fix."""


def option(default: Any, help_text: str, choices: tuple[str, ...] = (), repeatable: bool = False) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its type is the type of the option.
        help_text: for ``--help`` and the pages.
        choices: all values there are, where they can be listed.
        repeatable: a text whose flag may be given several times; the values are joined by commas.
    """
    return dataclasses.field(
        default=default, metadata={"help": help_text, "choices": choices, "repeatable": repeatable}
    )


def flag_name(field_name: str) -> str:
    """``codistill_weight_growth`` -> ``--codistill-weight-growth``."""
    return "--" + field_name.replace("_", "-")


def joined(before: str | None, value: str) -> str:
    """What a repeatable option is once more of it was given.

    >>> joined("a.pt:0.5", "b.pt"), joined("", "b.pt")
    ('a.pt:0.5,b.pt', 'b.pt')
    """
    return f"{before},{value}" if before else value


class JoinedAction(argparse.Action):
    """A flag that may be given several times: its values are joined by commas."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, joined("" if before == self.default else before, values))
