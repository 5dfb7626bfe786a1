"""Starts `python -m MODULE` or `python SCRIPT` as a fork of a server that has imported the libraries already.

Each is a process of its own, as real as one started by exec; only the seven seconds that torch and fairseq take to
import are spent once instead of for every process. Code of this project is never preloaded.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence

LIBRARIES = "fairseq_cli.train fairseq_cli.generate fairseq_cli.preprocess torch._dynamo torchvision timm".split()
HUGGING_FACE = "transformers.trainer_seq2seq transformers.models.llama.modeling_llama peft".split()
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def preload(libraries: Sequence[str]) -> None:
    """Have the server import these too, if it has not been started yet; otherwise each process does."""
    _context.set_forkserver_preload([*LIBRARIES, *libraries])


class Process:
    """What the tests use of subprocess.Popen, for ``command`` in ``env``; both outputs go to the end of ``output``.

    ``command`` is ``[sys.executable, "-m", module, ...]`` or ``[sys.executable, script, ...]``, see ``fits``.
    """

    @staticmethod
    def fits(command: Sequence[str]) -> bool:
        """Whether ``command`` can be started this way."""
        return command[0] == sys.executable and (command[1] == "-m" or command[1].endswith(".py"))

    def __init__(self, command: Sequence[str], env: Mapping[str, str], output: str) -> None:
        outside = dict(os.environ)
        os.environ.update(env)  # the server starts with the first process, and with what is set now
        try:
            self._process = _context.Process(target=_run, args=(list(command[1:]), dict(env), output))
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(outside)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code once it has ended; TimeoutError when it has not in ``timeout`` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"not done in {timeout} s")
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """A signal, if it still runs."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    returncode = property(poll)


def _run(command: list[str], env: dict[str, str], output: str) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # As in a process of its own: it was told to start others by the server, which takes seconds for each of them.
    multiprocessing.set_start_method("fork", force=True)
    code: object = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.modules.pop(command[1], None)  # runpy runs it anew
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, os.path.dirname(command[0]))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.last_value = error
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    # The end of an interpreter: multiprocessing leaves the second step out before Python 3.13.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
