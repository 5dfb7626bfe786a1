"""The examples in docstrings run as they stand."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "recipes" / "tools"
sys.path.insert(0, str(TOOLS))


def name_of(path):
    """What a module is imported as: vision is installed as a part of the package, the tools of recipes are scripts."""
    if path.parent == TOOLS:
        return path.stem
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return f"fairseq_codistill.{name}" if name.startswith("vision.") else name


MODULES = sorted(
    name_of(path)
    for folder in (ROOT / "fairseq_codistill", ROOT / "vision", TOOLS)
    for path in folder.rglob("*.py")
    if ">>> " in path.read_text()
)


def test_examples_are_found():
    assert len(MODULES) >= 20


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
