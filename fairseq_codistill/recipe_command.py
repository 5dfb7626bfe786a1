"""Owns ``codistill-recipe``: the recipes of an installed package, run where one stands.

It decides nothing of what they do. What a recipe makes lies in the current folder, as in a clone; the Python is the one
that this command is installed for.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fairseq_codistill import __version__
from fairseq_codistill.paths import recipes_dir


def scripts(folder: Path) -> list[str]:
    """What can be run: ``own_corpus/train.sh`` and so on; not what scripts only read."""
    found = (path for path in folder.glob("*/*.sh") if path.name not in ("settings.sh", "arms.sh", "paper.sh"))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Console script ``codistill-recipe``: becomes the script, or prints what there is."""
    parser = argparse.ArgumentParser(
        prog="codistill-recipe",
        usage="%(prog)s [--list | --path] [RECIPE/SCRIPT [ARGUMENTS]]",
        description="Run a recipe of the installed package in the current folder: codistill-recipe own_corpus/train.sh "
        "--source en --target fr --from DIR. What a script takes says its --help.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--list", action="store_true", help="print every script")
    parser.add_argument("--path", action="store_true", help="print the folder of the recipes")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    found = recipes_dir()
    if found is None:
        parser.error("the recipes are not installed with this package; install its wheel, or clone the repository")
    folder = Path(found)
    names = scripts(folder)
    if options.list or options.path:
        print(folder if options.path else "\n".join(names))
        sys.exit(0)
    if not options.command:
        parser.error("no recipe; --list prints them")
    name, *arguments = options.command
    if name not in names:
        parser.error(f"{name} is no recipe; it must be one of {', '.join(names)}")
    bash = shutil.which("bash")
    if bash is None:
        parser.error("the recipes need bash, which is not on PATH")
    environment = {**os.environ, "PYTHON": os.environ.get("PYTHON") or sys.executable}
    os.execve(bash, [bash, str(folder / name), *arguments], environment)


if __name__ == "__main__":
    main()
