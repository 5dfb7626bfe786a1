"""Owns one running job as the launcher sees it: its guard, its group, its lines, and how it ended.

The job runs under a guard (:mod:`~fairseq_codistill.launch.guard`), which ends it should the launcher vanish. What to
do about a job that ended is not decided here.
"""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from fairseq_codistill.launch import guard
from fairseq_codistill.launch.lines import Lines, Splitter
from fairseq_codistill.launch.plan import TORCHRUN, Job

RANK = re.compile(rb" *(\d+): ")  # srun --label
UNKILLABLE_S = 10.0  # after SIGKILL; what is still there then hangs in the kernel, and waiting would hang us too


class Child:
    """One running job: its group, its reader, and whether it has been told to end.

    Args:
        job: what to start.
        output: where its lines go, labelled.
        log: of its model, where they go too; a label says the rank where there are several.
        ended: told when the leader of the job has ended.
        grace_s: of the guard, once the launcher is gone.

    Raises:
        OSError: not even the guard could be started.
    """

    def __init__(
        self, job: Job, output: Lines, log: Lines | None, ended: "queue.SimpleQueue[Child | int]", grace_s: float
    ):
        self.job = job
        self.returncode: int | None = None  # of the leader, negative for a signal
        self.start_error = ""  # why the command could not be executed
        self.told_to_end = False
        self.was_killed = False
        self.is_gone = False  # the leader has ended and so has everything it started
        self._said_failure = False
        self.kill_at: float | None = None
        self._asked_group = False
        self._found: int | None = None  # of the waiting thread; the main thread keeps it in returncode
        self._log_label = "" if job.rank is None else f"[{job.label}] "
        output_read, output_write = os.pipe()
        status_read, status_write = os.pipe()
        try:
            self._process = self._start(output_read, output_write, status_write, log, grace_s)
        except OSError:
            os.close(output_read)
            os.close(status_read)
            raise
        finally:
            os.close(output_write)
            os.close(status_write)
        self._reader = threading.Thread(target=self._read, args=(output_read, output, log), daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(status_read, ended), daemon=True).start()

    def _start(
        self, output_read: int, output_write: int, status_write: int, log: Lines | None, grace_s: float
    ) -> "subprocess.Popen[bytes]":
        descriptors = [status_write, output_read, *([] if log is None else [log.descriptor])]
        numbers = [str(status_write), str(output_read), "-1" if log is None else str(log.descriptor)]
        # -I -S: neither the environment nor what is installed can make the guard start late, or do something else.
        script = [sys.executable, "-I", "-S", guard.__file__, *numbers, self._log_label, str(grace_s)]
        script.append(str(int(self.job.end_signal)))
        inherited = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        return subprocess.Popen(
            [*script, *self.job.command],
            env={**inherited, "PYTHONUNBUFFERED": "1", **self.job.environment},
            stdin=subprocess.PIPE,
            stdout=output_write,
            stderr=output_write,  # one stream, or a traceback would not stand where it happened
            pass_fds=descriptors,
            start_new_session=True,
        )

    def _read(self, descriptor: int, output: Lines, log: Lines | None) -> None:
        splitter = Splitter(RANK if self.job.labels_ranks else None)
        with os.fdopen(descriptor, "rb", buffering=0) as stream:
            while text := stream.read(1 << 16):
                self._show(splitter.feed(text), output, log)
            self._show(splitter.close(), output, log)

    def _show(self, lines: Sequence[bytes], output: Lines, log: Lines | None) -> None:
        for line in lines:
            label, log_label = f"[{self.job.label}] ", self._log_label
            if self.job.failure and line.startswith(self.job.failure):
                self._said_failure = True
            if self.job.labels_ranks and (match := RANK.match(line)):
                label = log_label = f"[{self.job.label} rank {int(match[1])}] "
                line = line[match.end() :]
            output.write_line(label, line)
            if log is not None:
                log.write_line(log_label, line)

    def _wait(self, descriptor: int, ended: "queue.SimpleQueue[Child | int]") -> None:
        with os.fdopen(descriptor, "rb") as status:
            kind, _, text = status.readline().decode(errors="replace").rstrip("\n").partition(" ")
        if kind == "ended":
            self._found = int(text)
        elif kind == "error":
            self._found, self.start_error = 127, text
        else:  # the guard was killed before it could say anything
            self._found = self._process.wait()
        ended.put(self)

    @property
    def is_ending(self) -> bool:
        """Whether time moves something: it is to end, or its leader has and others of its group may not have."""
        return not self.is_gone and (self.kill_at is not None or self.returncode is not None)

    def note_end(self) -> None:
        """The leader has ended: keep its exit code. :meth:`check` sees to what it left behind."""
        if self._found == 0 and self.job.failure:
            self._reader.join(timeout=2.0)  # its last line may say otherwise
            self._found = 1 if self._said_failure else 0
        self.returncode = self._found

    def end(self, grace_s: float) -> None:
        """Ask the leader to end, so that it can save while what serves it still runs; kill all ``grace_s`` s later."""
        self.told_to_end = True
        if self.kill_at is None and not self.is_gone:
            self.kill_at = time.monotonic() + grace_s
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # the guard is gone, and the command has its signal
                os.write(self._process.stdin.fileno(), b"end\n")

    def kill(self) -> None:
        self.told_to_end = True
        if not self.is_gone:
            self.was_killed = True
            self.kill_at = time.monotonic() + UNKILLABLE_S
            self._signal(signal.SIGKILL)

    def check(self, grace_s: float) -> None:
        """Move on what time moves: a group that outlives its leader is ended, one that outlives its grace killed."""
        if self.is_gone:
            return
        if self.returncode is not None:
            self._process.poll()
            if not group_is_alive(self._process.pid):
                self.is_gone = True
                return
            if not self._asked_group:
                self._asked_group = True
                self.kill_at = self.kill_at or time.monotonic() + grace_s
                self._signal(signal.SIGTERM)
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            if self.was_killed:
                self.is_gone = True
            else:
                self.kill()

    def drain(self) -> None:
        """Wait for the last lines. A daemon that left the group may hold the pipe open: then not for long."""
        self._reader.join(timeout=2.0)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def group_is_alive(group: int) -> bool:
    """Whether a process of the group still runs. One that only waits for its parent to notice its end does not."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return guard.group_runs(group) is not False


def describe_exit(returncode: int | None) -> str:
    """``exit code 3``, or ``killed by SIGKILL``."""
    if returncode is not None and returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit code {returncode}"
