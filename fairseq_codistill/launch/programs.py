"""Owns what the launcher knows of the programs it starts: which take our options, and what ``--dry-run`` can ask them.

``fairseq-train`` is known here. Any other program says what it will do through an entry point of the group
``fairseq_codistill.plans``, whose name is the program's (``codistill-vision``) or that of the module which
``python -m`` runs: a function from the program's arguments to a :class:`ProgramPlan`. The launcher imports no program.
"""

import dataclasses
import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence

GROUP = "fairseq_codistill.plans"
NUM_WORDS = 4  # so many first words belong to what starts the program
STARTERS = ("torch.distributed.", "accelerate.")  # modules that run a program


@dataclasses.dataclass(frozen=True)
class Assumed:
    """A number of the formulas and where it comes from; ``value`` None: unknown, and ``source`` says what to give."""

    value: int | None
    source: str
    powersgd_value: int | None = None  # numbers that PowerSGD averages in place of all parameters


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """What a program says of itself before it runs.

    Attributes:
        classes: of its predictions.
        rows: of its predictions on one device in one update.
        parameter_shapes: shapes of what one model trains; a function, since a model has to be built for it.
        model: name of the model.
        codec: ``--codistill-codec``.
        interval: ``--codistill-interval``.
        exchange: ``--codistill-exchange``.
        has_batch_norm: whether the model has batch normalisation; a function, as for the shapes.
    """

    classes: Assumed
    rows: Assumed
    parameter_shapes: Callable[[], list[tuple[int, ...]]]
    model: str
    codec: str
    interval: int
    exchange: str
    has_batch_norm: Callable[[], bool] = lambda: False


def fairseq_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows ``fairseq-train`` (or ``python -m fairseq_cli.train``); None for any other program."""
    return _arguments_of(command, {"fairseq-train", "fairseq_cli.train"})


def takes_options(command: Sequence[str]) -> bool:
    """Whether the program has our ``--codistill-*`` options; any other finds its place in the environment."""
    return fairseq_arguments(command) is not None or _entry_of(command) is not None


def is_run_itself(command: Sequence[str]) -> bool:
    """Whether a program that says what it will do is run by this machine, not by what may have another one inside.

    >>> is_run_itself(["apptainer", "exec", "image.sif", "codistill-vision"])
    False
    """
    first = os.path.basename(command[0]) if command else ""
    asks = {"-h", "--help", "--version"}.intersection(command)
    return not asks and (first.startswith("python") or first in _entries()) and _entry_of(command) is not None


def program_plan(command: Sequence[str]) -> ProgramPlan | None:
    """What the program of a command says of itself; None where it says nothing.

    Raises:
        ConfigError: the program cannot read its options.
    """
    found = _entry_of(command)
    if found is None:
        return None
    entry, arguments = found
    plan: ProgramPlan = entry.load()(arguments)
    return plan


def _entry_of(command: Sequence[str]) -> tuple[importlib.metadata.EntryPoint, list[str]] | None:
    for name, entry in _entries().items():
        arguments = _arguments_of(command, {name})
        if arguments is not None:
            return entry, arguments
    return None


@functools.cache
def _entries() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def _arguments_of(command: Sequence[str], names: set[str]) -> list[str] | None:
    """What follows the program, however much stands before it that starts it (a container, ``numactl``).

    A script may be named by its path, from any folder (``vision/train.py``). What follows another script or module is
    its own, and so is what an option is set to.
    """
    runs_python = False
    for position, argument in enumerate(command):
        before = command[position - 1] if position else ""
        is_module, is_script = before == "-m", argument.endswith(".py")
        if _is_named(argument, names, is_module or is_script) and not _may_be_a_value(before, position):
            return list(command[position + 1 :])
        if is_script and (runs_python or not position):
            return None
        if is_module and runs_python and not argument.startswith(STARTERS):
            return None
        runs_python = runs_python or os.path.basename(argument).startswith("python")
    return None


def _is_named(argument: str, names: set[str], may_be_module: bool) -> bool:
    """Whether a word is one of the programs: its name, a path of its script, or its module."""
    path = argument.replace(os.sep, "/")
    as_module = path.removesuffix(".py").replace("/", ".")
    if as_module.endswith("vision.train") and _is_of_somebody_else(as_module, path):
        return False
    if os.path.basename(path) in names:
        return "/" not in path or "/bin/" in path or os.access(argument, os.X_OK)
    return may_be_module and any(as_module == name or as_module.endswith("." + name) for name in names if "." in name)


def _is_of_somebody_else(module: str, path: str) -> bool:
    """Whether what is called as ``vision/train.py`` lies in a folder without the file that says what ours will do."""
    folder = os.path.dirname(path) if path.endswith(".py") else module.rpartition(".")[0].replace(".", os.sep)
    return os.path.isdir(folder) and not os.path.exists(os.path.join(folder, "plan.py"))


def _may_be_a_value(before: str, position: int) -> bool:
    """Of an option further back; those of what starts a program are often flags alone (``--multi_gpu``)."""
    return before.startswith("--") and "=" not in before and position >= NUM_WORDS
