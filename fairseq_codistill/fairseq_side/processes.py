"""Owns the processes of a fairseq training: how loader workers and spawned ranks are started, and how all of them end.

fairseq starts workers that end at any signal, ranks whose parent dies of the signal that is meant for them, and reports
a wrong setting by a traceback. None of that is configurable, so three of its functions are wrapped here. Nothing here
knows what is trained, or saves anything.
"""

import contextlib
import functools
import multiprocessing.connection
import os
import signal
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fairseq_codistill.command_line import PREFIX, read_options
from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.coordinator import AlignmentError, NoPeersError
from fairseq_codistill.exchanger import close_all
from fairseq_codistill.whole_files import SaveError
from fairseq_codistill.workers import ignore_signals, signals_held

ranks: Any = torch.multiprocessing  # its own stubs do not list what it exports
SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED = tuple(128 + number for number in SIGNALS)  # exit codes of ranks that a signal ended, after they saved


def apply(distributed_main: Callable[..., None]) -> None:
    """Wrap fairseq's functions. Idempotent; called when fairseq imports the user-dir.

    Args:
        distributed_main: stands in for fairseq's and calls :func:`run_rank`. A spawned rank finds it by its module.
    """
    from fairseq.data import iterators
    from fairseq.distributed import utils

    if hasattr(utils, "_codistill_main"):
        return
    data = _overlaid(torch.utils.data, DataLoader=Loader)
    iterators.torch = _overlaid(torch, utils=_overlaid(torch.utils, data=data))
    utils._codistill_main = utils.distributed_main
    utils.distributed_main = distributed_main
    utils.torch = _overlaid(torch, multiprocessing=_overlaid(torch.multiprocessing, spawn=spawn))
    call_main = utils.call_main

    @functools.wraps(call_main)
    def call_main_in_short(*args: Any, **kwargs: Any) -> Any:
        with errors_as_lines():
            result = call_main(*args, **kwargs)
            close_all("finished")  # a peer that comes back later knows that it need not wait, and is no error
            return result

    utils.call_main = call_main_in_short


def _overlaid(module: Any, **names: Any) -> types.ModuleType:
    """``module`` with other values for some names, seen only by who is given the result."""
    overlay = types.ModuleType(module.__name__)
    overlay.__getattr__ = functools.partial(getattr, module)  # type: ignore[method-assign]
    vars(overlay).update(names)
    return overlay


class Loader(torch.utils.data.DataLoader):
    """torch's, whose workers leave signals to the training and end with it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.worker_init_fn = self.worker_init_fn or ignore_signals

    def __iter__(self) -> Any:
        with signals_held():
            return super().__iter__()


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Let what a user can mend end the process with one line and an exit code: 2 for a setting, 1 for other
    batches, for peers that are not there, or for a checkpoint that cannot be written."""
    try:
        yield
    except (ConfigError, AlignmentError, NoPeersError, SaveError) as error:
        print(f"fairseq-train: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def check_command_line(argv: Sequence[str]) -> None:
    """Refuse, in one line, an option that fairseq's parser would refuse under 200 lines of usage.

    Only while fairseq imports the user-dir at the beginning of a command: then the parser is still to come.

    Args:
        argv: of this process.

    Raises:
        SystemExit: with 2.
    """
    if any(word.startswith(PREFIX) for word in argv):
        with errors_as_lines():
            read_options(argv)


def run_rank(*args: Any) -> None:
    """What fairseq's ``distributed_main`` does: a rank of a model, in this process or in one spawned for it."""
    from fairseq.distributed import utils

    with errors_as_lines():
        utils._codistill_main(*args)
        close_all("finished")


def spawn(fn: Callable[..., None], args: tuple = (), nprocs: int = 1, **settings: Any) -> None:
    """Stands in for torch's: the parent of the ranks passes a signal on, waits until they saved, and ends as they did.

    Raises:
        SystemExit: with the exit code of the rank that was the first to end with one.
        torch.multiprocessing.ProcessRaisedException: a rank failed otherwise.
    """
    settings["join"] = False
    context = ranks.start_processes(fn, args, nprocs, **settings)

    def pass_on(number: int, _frame: Any) -> None:
        for process in context.processes:
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        _wait(context.processes)
        while not context.join():
            pass
    except ranks.ProcessExitedException as error:
        raise SystemExit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code) from None
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _wait(processes: Sequence[Any]) -> None:
    """Until all have ended well, or one has not. Then the others, who can only wait for it, are ended.

    torch would send them SIGTERM, which asks them to save first: they would wait for the rank that is gone.
    """
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            process = running.pop(sentinel)  # type: ignore[index]
            process.join()
            if process.exitcode in STOPPED:
                for other in running.values():
                    other.join(timeout=60.0)  # they met after the checkpoint was written
            if process.exitcode:
                for other in running.values():
                    if other.exitcode is None:
                        other.kill()
                return
