"""Fixtures shared by all tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launching import launch  # noqa: E402, F401 - a fixture of several files


def pytest_addoption(parser):
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write what tests/golden records anew, in place of comparing"
    )


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """fairseq data folder of 200 toy sentence pairs."""
    from helpers import make_toy_data

    return make_toy_data(tmp_path_factory.mktemp("toy"))
