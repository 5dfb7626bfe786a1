"""Owns a launch while it runs: what happens when a job ends, and that every one of them ends in the end.

Each job leads a process group of its own (:mod:`~fairseq_codistill.launch.child`), so that ending it ends what it
started (data loader workers, fairseq's own ranks). A model that fails never ends another model, unless asked to: the
models are loosely coupled. Nothing here knows what the commands do.
"""

import contextlib
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from fairseq_codistill.coordinator.peers import GIVEN_UP, IN_ORDER
from fairseq_codistill.launch.child import Child, describe_exit
from fairseq_codistill.launch.deaths import Deaths
from fairseq_codistill.launch.lines import Lines
from fairseq_codistill.launch.plan import Job
from fairseq_codistill.workers import SAME_REQUEST_S

Start = Callable[[Job, Lines, Lines | None, "queue.SimpleQueue[Child | int]", float], Child]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE_S = 1.0  # with whoever reads the messages of the launcher, which has more to do than to tell
POLL_S = 0.05  # how often the rest of a group is looked at, once its leader has ended
# Of two signals at once the system may hand both to another thread; then nothing wakes the main thread, which alone
# runs Python's handlers. So it never sleeps longer than this.
LONGEST_SLEEP_S = 0.5
# How a job ends that has done what it does when asked to; Ctrl-C asks the whole group.
SAVED = (0, *(code for number in (signal.SIGTERM, signal.SIGINT) for code in (128 + number, -number)))


class Supervisor:
    """Runs jobs until all have ended.

    Args:
        jobs: what to start.
        grace_s: seconds between the request to end and the kill.
        fail_fast: a failed model ends the others.
        max_restarts: how often a model that failed is started again, all its ranks together; it is a failure only
            after that.
        logs: descriptors of the models' logs, by model; none for a model that has none.
        deaths: told of a model that died or finished while others go on, and again of one that has finished when
            another is started again.
        start: makes a running job of one that is planned, with the arguments of :class:`Child`; on this machine by
            default.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        grace_s: float = 30.0,
        fail_fast: bool = False,
        max_restarts: int = 0,
        logs: Mapping[int, int] | None = None,
        deaths: Deaths | None = None,
        start: Start = Child,
    ):
        self._start_job = start
        self._jobs = jobs
        self._deaths = deaths
        self._grace_s = grace_s
        self._fail_fast = fail_fast
        self._restarts_left = {job.model: max_restarts for job in jobs}
        self._to_restart: set[int] = set()  # models that failed and whose other ranks are still ending
        self._output = Lines(1)  # standard output
        self._messages = Lines(2, patience_s=PATIENCE_S)  # standard error
        self._logs = {model: self._log_of(model, number) for model, number in (logs or {}).items()}
        self._events: queue.SimpleQueue[Child | int] = queue.SimpleQueue()
        self._children: list[Child] = []
        self._failures: dict[int, list[str]] = {}  # model -> what happened to its ranks
        self._interrupted_by: int | None = None
        self._interrupted_at = 0.0
        self._were_restarted: set[int] = set()
        self._finished: set[int] = set()

    def run(self) -> int:
        """Start everything and wait.

        Returns:
            0 when every model ended well, 1 when one failed, 128 + the number of the signal that ended the launch.
        """
        with self._signals_as_events():
            try:
                for job in self._jobs:
                    self._say_in_log(job.model, f"{job.label}: {job.shell()}")
                for job in self._jobs:
                    self._children.append(self._start(job))
            except OSError as error:
                self._failures.setdefault(job.model, []).append(f"cannot be started: {error}")
                self._end(self._children)
            try:
                self._supervise()
            finally:
                for child in self._children:
                    if not child.is_gone:
                        child.kill()
        if self._deaths is not None:
            self._deaths.close()
        for child in self._children:
            child.drain()
        for model, reasons in sorted(self._failures.items()):
            self._say(f"model {model} failed: {'; '.join(reasons)}", model)
        if self._interrupted_by is not None:
            return 128 + self._interrupted_by
        return 1 if self._failures else 0

    def _start(self, job: Job) -> Child:
        return self._start_job(job, self._output, self._logs.get(job.model), self._events, self._grace_s)

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
        self._were_restarted.add(model)
        for child in old:
            child.drain()
            self._children.remove(child)
        try:
            for child in old:
                self._say_in_log(model, f"{child.job.label}: {child.job.shell()}")
                self._children.append(self._start(child.job))
        except OSError as error:
            self._failures.setdefault(model, []).append(f"cannot be started again: {error}")
            self._end([child for child in self._children if child.job.model == model])
            return
        for other in sorted(self._finished):
            self._announce(other, IN_ORDER)
        for other, reasons in sorted(self._failures.items()):  # of which the process before it was told
            self._announce(other, GIVEN_UP + reasons[0])

    def _on_end(self, child: Child) -> None:
        child.note_end()
        model = child.job.model
        reason = describe_exit(child.returncode)
        if child.start_error and model in self._were_restarted:
            reason = f"cannot be started: {child.start_error}"  # as any other failure: it has been seen to run
        elif child.start_error:
            self._failures.setdefault(model, []).append(f"cannot be started: {child.start_error}")
            self._end(self._children)
            return
        self._say_in_log(model, f"{child.job.label} ended: {reason}")
        if child.returncode == 0 or child.told_to_end:
            if self._interrupted_by is not None and child.returncode not in SAVED:
                self._say(f"{child.job.label}: {reason}, so what it did since its last checkpoint may be lost")
            elif not child.told_to_end:
                self._note_finish(model)
            return
        if child.job.rank is not None:
            reason = f"rank {child.job.rank} {reason}"
        if model in self._to_restart:
            return
        if self._restarts_left[model] and self._interrupted_by is None:
            self._restarts_left[model] -= 1
            self._to_restart.add(model)
            self._end([other for other in self._children if other.job.model == model])
            self._say(
                f"model {model}: {reason}; it is started again ({self._restarts_left[model]} restarts left)", model
            )
            return
        first = model not in self._failures
        self._failures.setdefault(model, []).append(reason)
        self._end([other for other in self._children if other.job.model == model])
        others = [other for other in self._children if other.job.model != model and other.returncode is None]
        if self._fail_fast:
            self._to_restart.clear()
            self._end(others)
        if first:
            fate = (
                "the other models are ended (--fail-fast)" if self._fail_fast else "the other models go on without it"
            )
            self._say(f"model {model}: {reason}" + (f"; {fate}" if others else ""), model)
            if others and not self._fail_fast:
                self._announce(model, reason)

    def _note_finish(self, model: int) -> None:
        """A rank of it ended well: after the last one, who still waits for the model at its start is told."""
        if any(child.returncode != 0 for child in self._children if child.job.model == model):
            return
        self._finished.add(model)
        if any(child.returncode is None for child in self._children):
            self._announce(model, IN_ORDER)

    def _announce(self, model: int, reason: str) -> None:
        if self._deaths is not None and self._interrupted_by is None:
            self._deaths.announce(model, reason)

    def _on_signal(self, number: int) -> None:
        self._to_restart.clear()
        if self._interrupted_by is None:
            self._interrupted_by, self._interrupted_at = number, time.monotonic()
            self._end(self._children)
            self._say(
                f"{signal.Signals(number).name}: ending all models, at most {self._grace_s:g} s; again to kill them"
            )
        elif not self._is_same_request(number):
            for child in self._children:
                child.kill()

    def _is_same_request(self, number: int) -> bool:
        """A scheduler and a parent may both pass on the first; a login session ends with SIGTERM and SIGHUP."""
        is_repeated = number == self._interrupted_by or signal.SIGHUP in (number, self._interrupted_by)
        return is_repeated and time.monotonic() - self._interrupted_at <= SAME_REQUEST_S

    def _end(self, children: Sequence[Child]) -> None:
        for child in children:
            child.end(self._grace_s)

    def _say(self, text: str, model: int | None = None) -> None:
        self._messages.write_line("[launch] ", os.fsencode(text))
        if model is not None:
            self._say_in_log(model, text)

    def _say_in_log(self, model: int, text: str) -> None:
        if model in self._logs:
            self._logs[model].write_line("[launch] ", os.fsencode(text))

    def _log_of(self, model: int, descriptor: int) -> Lines:
        return Lines(
            descriptor, lambda error: self._say(f"model {model}: {error}: its log in --log-dir ends here, training not")
        )

    @contextlib.contextmanager
    def _signals_as_events(self) -> Iterator[None]:
        """Signals become events of the loop; the handlers that were there come back afterwards.

        What is ignored stays so: SIGHUP under ``nohup``.
        """

        def handler(number: int, _frame: FrameType | None) -> None:
            self._events.put(number)

        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in heard}
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)
