"""Owns one rank on a node of a Ray cluster: an actor that runs its process under the launcher's guard.

The driver asks it what the process wrote and how it ended, and tells it to end; what to do about that is decided there.
When the actor is gone, however that came, the guard ends the process. It knows no Ray.
"""

import contextlib
import dataclasses
import os
import queue
import random
import select
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fairseq_codistill.launch.child import Child
from fairseq_codistill.launch.lines import Lines
from fairseq_codistill.launch.plan import Job
from fairseq_codistill.launch.resources import AUTOMATIC_PORTS, is_free
from fairseq_codistill.launch.runtime import run_folder

KEYS = "{codistill-keys}"  # in a job: the folder of the run's keys, which is another one on every node
POLL_S = 0.05


def with_keys(job: Job, folder: str) -> Job:
    """The job as one sees it who has the keys of its run in this folder."""
    return dataclasses.replace(
        job,
        command=tuple(word.replace(KEYS, folder) for word in job.command),
        environment={name: value.replace(KEYS, folder) for name, value in job.environment.items()},
    )


class Report(NamedTuple):
    """What has become of a process since the last report.

    Attributes:
        text: that it wrote.
        returncode: how its leader ended; None while it runs.
        error: why it could not be started.
        is_gone: nothing of it runs any more, and all that it wrote was reported.
    """

    text: bytes
    returncode: int | None
    error: str
    is_gone: bool


class Rank:
    """One rank, and its process once it is started.

    Args:
        folder: to work in, that of the driver.
        environment: of the driver, for the process.
    """

    def __init__(self, folder: str, environment: Mapping[str, str]):
        self._stack = contextlib.ExitStack()
        self._child: Child | None = None
        self._ended: queue.SimpleQueue[Child | int] = queue.SimpleQueue()
        self._grace_s = 0.0
        self._environment = dict(environment)
        self._found_folder = os.path.isdir(folder)
        if self._found_folder:
            os.chdir(folder)
        self._folder = folder

    def pick_ports(self, count: int, taken: Sequence[int]) -> int:
        """First of so many free ports in a row, none of them in ``taken``.

        Raises:
            OSError: there are none.
        """
        for _ in range(200 if count < len(AUTOMATIC_PORTS) else 0):
            base = random.randrange(AUTOMATIC_PORTS.start, AUTOMATIC_PORTS.stop - count)
            if all(port not in taken and is_free(port) for port in range(base, base + count)):
                return base
        raise OSError(f"no {count} free ports in a row on this node")

    def start(self, job: Job, keys: Mapping[str, bytes], grace_s: float) -> None:
        """Start the process.

        Args:
            job: what to start; ``KEYS`` in it is filled in.
            keys: name -> content of the files of the key set that this model needs.
            grace_s: of the guard.

        Raises:
            OSError: the working folder is not on this node, or nothing can be started.
        """
        if not self._found_folder:
            raise OSError(f"{self._folder} is not on this node; start the launch from a folder that all nodes have")
        folder = os.path.join(self._stack.enter_context(run_folder(os.environ)), "keys")
        os.mkdir(folder, 0o700)
        for name, content in keys.items():
            descriptor = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
        filled = with_keys(job, folder)
        filled = dataclasses.replace(
            filled,
            rank=None,  # labels are the driver's
            environment={**self._environment, **filled.environment},
        )
        self._read_end, write_end = os.pipe()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.set_blocking(self._read_end, False)
        self._lines = Lines(write_end)
        self._grace_s = grace_s
        self._child = Child(filled, Lines(nowhere), self._lines, self._ended, grace_s)

    def read(self, timeout_s: float) -> Report:
        """What is new; waits for it at most ``timeout_s`` seconds."""
        child, deadline, text = self._child, time.monotonic() + timeout_s, b""
        assert child is not None
        while True:
            was_gone = child.is_gone
            if was_gone:
                child.drain()
            ready, _, _ = select.select([self._read_end], [], [], 0 if was_gone else POLL_S)
            if ready:
                text += os.read(self._read_end, 1 << 20)
            with contextlib.suppress(queue.Empty):
                self._ended.get_nowait()
                child.note_end()
            child.check(self._grace_s)
            is_over = was_gone and not ready
            if is_over or time.monotonic() >= deadline or (text and text.endswith(b"\n")):
                return Report(text, child.returncode, child.start_error, is_over)

    def end(self, grace_s: float) -> None:
        """Ask the process to end; kill it ``grace_s`` seconds later."""
        if self._child is not None:
            self._child.end(grace_s)

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def close(self) -> None:
        """Remove the keys."""
        self._stack.close()
