"""Owns where this package is installed; loads nothing of weight, so that a shell can ask at no cost."""

import argparse
import os
from collections.abc import Sequence

from fairseq_codistill import __version__


def user_dir() -> str:
    """The folder for fairseq's ``--user-dir``, absolute, also when installed from a wheel."""
    return os.path.dirname(os.path.abspath(__file__))


def recipes_dir() -> str | None:
    """The folder of the recipes: inside the package when installed from a wheel, beside it in a clone."""
    home = user_dir()
    for folder in (os.path.join(home, "recipes"), os.path.join(os.path.dirname(home), "recipes")):
        if os.path.isfile(os.path.join(folder, "common.sh")):
            return folder
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Console script ``fairseq-codistill-path``: ``--user-dir "$(fairseq-codistill-path)"``."""
    parser = argparse.ArgumentParser(
        prog="fairseq-codistill-path", description='Print the folder for fairseq-train\'s --user-dir: "$(%(prog)s)".'
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.parse_args(argv)
    print(user_dir())


if __name__ == "__main__":
    main()
