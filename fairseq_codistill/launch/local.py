"""Owns the processes of a launch: starting them, labelling their lines, and ending every one of them.

Each job leads a process group of its own, so that ending it ends what it started (data loader workers, fairseq's own
ranks). A model that fails never ends another model, unless asked to: the models are loosely coupled. Nothing here
knows what the commands do.
"""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from fairseq_codistill.launch.plan import Job

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.05  # how often the rest of a group is looked at, once its leader has ended
# Of two signals at once the system may hand both to another thread; then nothing wakes the main thread, which alone
# runs Python's handlers. So it never sleeps longer than this.
LONGEST_SLEEP_S = 0.5
UNKILLABLE_S = 10.0  # after SIGKILL; what is still there then hangs in the kernel, and waiting would hang us too


class LabelledOutput:
    """Writes whole lines of many threads to one file descriptor. When its reader is gone, lines are lost, no training.

    Unbuffered: what a buffer still holds for a reader that is gone fails once more at the end of the process.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._is_closed = False

    def write_line(self, label: str, line: bytes) -> None:
        rest = memoryview(b"[" + label.encode() + b"] " + line.rstrip(b"\r\n") + b"\n")
        with self._lock:
            try:
                while rest and not self._is_closed:
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                self._is_closed = True


class Child:
    """One running job: its group, its reader, and whether it has been told to end."""

    def __init__(self, job: Job, output: LabelledOutput, ended: "queue.SimpleQueue[Child | int]"):
        self.job = job
        self.returncode: int | None = None
        self.told_to_end = False
        self.is_gone = False  # the leader has ended and so has everything it started
        self.kill_at: float | None = None
        self._was_killed = False
        self._process = subprocess.Popen(
            job.command,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # one stream, or a traceback would not stand where it happened
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(ended,), daemon=True).start()

    def _read(self, output: LabelledOutput) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            output.write_line(self.job.label, line)

    def _wait(self, ended: "queue.SimpleQueue[Child | int]") -> None:
        self._process.wait()
        ended.put(self)

    @property
    def is_ending(self) -> bool:
        """Whether time moves something: it is to end, or its leader has and others of its group may not have."""
        return not self.is_gone and (self.kill_at is not None or self.returncode is not None)

    def note_end(self) -> None:
        """The leader has ended: keep its exit code. :meth:`check` sees to what it left behind."""
        self.returncode = self._process.returncode

    def end(self, grace_s: float) -> None:
        """Ask the whole group to end, and kill it ``grace_s`` seconds later."""
        self.told_to_end = True
        if self.kill_at is None and not self.is_gone:
            self.kill_at = time.monotonic() + grace_s
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self.told_to_end = True
        if not self.is_gone:
            self._was_killed = True
            self.kill_at = time.monotonic() + UNKILLABLE_S
            self._signal(signal.SIGKILL)

    def check(self, grace_s: float) -> None:
        """Move on what time moves: a group that outlives its leader is ended, one that outlives its grace killed."""
        if self.is_gone:
            return
        if self.returncode is not None:
            if not group_is_alive(self._process.pid):
                self.is_gone = True
                return
            if self.kill_at is None:
                self.kill_at = time.monotonic() + grace_s
                self._signal(signal.SIGTERM)
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            if self._was_killed:
                self.is_gone = True
            else:
                self.kill()

    def drain(self) -> None:
        """Wait for the last lines. A daemon that left the group may hold the pipe open: then not for long."""
        self._reader.join(timeout=2.0)

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
    if not os.path.isdir("/proc/self"):
        return True
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as stat:
            # pid (name) state parent group ...; the name may hold spaces and brackets
            state, _, process_group = stat.read().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False


class Supervisor:
    """Runs jobs until all have ended.

    Args:
        jobs: what to start.
        grace_s: seconds between the request to end and the kill.
        fail_fast: a failed model ends the others.
        max_restarts: how often a model that failed is started again, all its ranks together; it is a failure only
            after that.
    """

    def __init__(self, jobs: Sequence[Job], grace_s: float = 30.0, fail_fast: bool = False, max_restarts: int = 0):
        self._jobs = jobs
        self._grace_s = grace_s
        self._fail_fast = fail_fast
        self._restarts_left = {job.model: max_restarts for job in jobs}
        self._to_restart: set[int] = set()  # models that failed and whose other ranks are still ending
        self._output = LabelledOutput(1)  # standard output
        self._messages = LabelledOutput(2)  # standard error
        self._events: queue.SimpleQueue[Child | int] = queue.SimpleQueue()
        self._children: list[Child] = []
        self._failures: dict[int, list[str]] = {}  # model -> what happened to its ranks
        self._interrupted_by: int | None = None

    def run(self) -> int:
        """Start everything and wait.

        Returns:
            0 when every model ended well, 1 when one failed, 128 + the number of the signal that ended the launch.
        """
        with self._signals_as_events():
            try:
                for job in self._jobs:
                    self._children.append(Child(job, self._output, self._events))
            except OSError as error:
                self._failures.setdefault(job.model, []).append(f"cannot be started: {error}")
                self._end(self._children)
            try:
                self._supervise()
            finally:
                for child in self._children:
                    if not child.is_gone:
                        child.kill()
        for child in self._children:
            child.drain()
        for model, reasons in sorted(self._failures.items()):
            self._say(f"model {model} failed: {'; '.join(reasons)}")
        if self._interrupted_by is not None:
            return 128 + self._interrupted_by
        return 1 if self._failures else 0

    def _supervise(self) -> None:
        while self._to_restart or not all(child.is_gone for child in self._children):
            is_ending = any(child.is_ending for child in self._children)
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=POLL_S if is_ending else LONGEST_SLEEP_S)
                if isinstance(event, Child):
                    self._on_end(event)
                else:
                    self._on_signal(event)
            for child in self._children:
                child.check(self._grace_s)
            for model in sorted(self._to_restart):
                self._restart_once_gone(model)

    def _restart_once_gone(self, model: int) -> None:
        old = [child for child in self._children if child.job.model == model]
        if not all(child.is_gone for child in old):
            return
        self._to_restart.discard(model)
        for child in old:
            child.drain()
            self._children.remove(child)
        try:
            for child in old:
                self._children.append(Child(child.job, self._output, self._events))
        except OSError as error:
            self._failures.setdefault(model, []).append(f"cannot be started again: {error}")
            self._end([child for child in self._children if child.job.model == model])

    def _on_end(self, child: Child) -> None:
        child.note_end()
        if child.returncode == 0 or child.told_to_end:
            return
        model = child.job.model
        reason = describe_exit(child.returncode)
        if child.job.rank is not None:
            reason = f"rank {child.job.rank} {reason}"
        if model in self._to_restart:
            return
        if self._restarts_left[model] and self._interrupted_by is None:
            self._restarts_left[model] -= 1
            self._to_restart.add(model)
            self._end([other for other in self._children if other.job.model == model])
            self._say(f"model {model}: {reason}; it is started again ({self._restarts_left[model]} restarts left)")
            return
        first = model not in self._failures
        self._failures.setdefault(model, []).append(reason)
        self._end([other for other in self._children if other.job.model == model])
        others = [other for other in self._children if other.job.model != model and other.returncode is None]
        if self._fail_fast:
            self._end(others)
        if first:
            fate = (
                "the other models are ended (--fail-fast)" if self._fail_fast else "the other models go on without it"
            )
            self._say(f"model {model}: {reason}" + (f"; {fate}" if others else ""))

    def _on_signal(self, number: int) -> None:
        self._to_restart.clear()
        if self._interrupted_by is None:
            self._interrupted_by = number
            self._say(
                f"{signal.Signals(number).name}: ending all models, at most {self._grace_s:g} s; again to kill them"
            )
            self._end(self._children)
        else:
            for child in self._children:
                child.kill()

    def _end(self, children: Sequence[Child]) -> None:
        for child in children:
            child.end(self._grace_s)

    def _say(self, text: str) -> None:
        self._messages.write_line("launch", text.encode())

    @contextlib.contextmanager
    def _signals_as_events(self) -> Iterator[None]:
        """Signals become events of the loop; the handlers that were there come back afterwards."""

        def handler(number: int, _frame: FrameType | None) -> None:
            self._events.put(number)

        before = {number: signal.signal(number, handler) for number in SIGNALS}
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)


def describe_exit(returncode: int | None) -> str:
    """``exit code 3``, or ``killed by SIGKILL``."""
    if returncode is not None and returncode < 0:
        try:
            return f"killed by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"killed by signal {-returncode}"
    return f"exit code {returncode}"
