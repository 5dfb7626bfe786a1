"""The examples in docstrings run as they stand."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["codistiller", "config", "sampling", "split_step"])
def test_examples_of_public_names_run(name):
    module = importlib.import_module(f"fairseq_codistill.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
