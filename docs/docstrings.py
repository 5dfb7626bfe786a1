"""Owns how docstrings of the package become Markdown: examples stand in a section, and roles of Sphinx become code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")


def as_markdown(text: str) -> str:
    """A docstring with its examples under a heading, each indented, and ``:class:`~a.B``` as ```B```."""
    text = ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", text)
    return EXAMPLE.sub(lambda example: "Examples:\n" + re.sub("^", "    ", example[0], flags=re.MULTILINE), text)


class Markdown(griffe.Extension):
    """Changes every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
