"""Fixtures shared by all tests."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launching import launch  # noqa: E402, F401 - a fixture of several files

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write what tests/golden records anew, in place of comparing"
    )


def pytest_configure(config):
    """Scripts of the recipes ask torch for a GPU, which takes seconds each time: they are told."""
    if "RECIPE_HAS_GPU" not in os.environ:
        import torch

        os.environ["RECIPE_HAS_GPU"] = "yes" if torch.cuda.is_available() else "no"


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """fairseq data folder of 200 toy sentence pairs."""
    from helpers import make_toy_data

    return make_toy_data(tmp_path_factory.mktemp("toy"))
