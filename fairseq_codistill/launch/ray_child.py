"""Owns a rank on a Ray cluster as the supervisor sees it: its lines, how it ended, and that it is told to end.

What runs it is an actor of :class:`~fairseq_codistill.launch.ray_rank.Rank`; a thread here asks it, and finds out when
its node is lost. Ray is handed in, not imported.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fairseq_codistill.launch.child import UNKILLABLE_S, Child
from fairseq_codistill.launch.lines import Lines, Splitter
from fairseq_codistill.launch.plan import Job
from fairseq_codistill.launch.ray_rank import Report

READ_S = 1.0
LOST = 1  # exit code of a rank whose node is gone


class RankOnRay(Child):
    """A rank as the supervisor sees it: its actor, its lines, and whether it has been told to end.

    Args:
        ray: the module.
        actor_of: gives the actor for a job, when it has a place, and the job as it is there; asks meanwhile whether to
            give up.
        keys: name -> content of the files of the key set that its model needs.
        job: what to start.
        output: where its lines go, labelled.
        log: of its model.
        ended: told when its process has ended, or its node was lost.
        grace_s: of the guard, once the actor is gone.
    """

    def __init__(
        self,
        ray: Any,
        actor_of: Callable[[Job, Callable[[], bool]], tuple[Any, Job]],
        keys: Mapping[str, bytes],
        job: Job,
        output: Lines,
        log: Lines | None,
        ended: "queue.SimpleQueue[Child | int]",
        grace_s: float,
    ):
        self.job = job
        self.returncode = None
        self.start_error = ""
        self.told_to_end = self.was_killed = self.is_gone = False
        self.kill_at = None
        self._found: int | None = None
        self._ray, self._actor_of, self._keys = ray, actor_of, keys
        self._output, self._log, self._ended_queue = output, log, ended
        self._label, self._log_label = f"[{job.label}] ", "" if job.rank is None else f"[{job.label}] "
        self._guard_grace_s = grace_s
        self._actor: Any = None
        self._splitter = Splitter()
        self._is_over = False
        self._order: tuple[str, tuple[float, ...]] | None = None  # given before there was an actor
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            ray, (actor, job) = self._ray, self._actor_of(self.job, lambda: self.told_to_end)
            self._actor = actor
            ray.get(actor.start.remote(job, self._keys, self._guard_grace_s))
            if self._order is not None:
                getattr(actor, self._order[0]).remote(*self._order[1])
            while not self._take(Report(*ray.get(actor.read.remote(READ_S)))):
                pass
        except Exception as error:  # of Ray, or of the start on the node, which Ray hands on
            if self._found is None:
                if not self.told_to_end:
                    self._write(f"[launch] it cannot go on: {_first_line(error)}".encode())
                self._end_with(LOST)
        finally:
            self._is_over = True
            if self._actor is not None:
                with contextlib.suppress(Exception):
                    self._ray.get(self._actor.close.remote(), timeout=5)
                    self._ray.kill(self._actor)

    def _take(self, report: Report) -> bool:
        for line in [*self._splitter.feed(report.text), *(self._splitter.close() if report.is_gone else ())]:
            self._write(line)
        if report.returncode is not None and self._found is None:
            self.start_error = report.error
            self._end_with(report.returncode)
        return report.is_gone

    def _write(self, line: bytes) -> None:
        self._output.write_line(self._label, line)
        if self._log is not None:
            self._log.write_line(self._log_label, line)

    def _end_with(self, code: int) -> None:
        self._found = code
        self._ended_queue.put(self)

    def end(self, grace_s: float) -> None:
        self.told_to_end = True
        if self.kill_at is None and not self.is_gone:
            self.kill_at = time.monotonic() + grace_s + UNKILLABLE_S  # the actor kills after the grace
            self._tell("end", grace_s)

    def kill(self) -> None:
        self.told_to_end = True
        if not self.is_gone:
            self.was_killed = True
            self.kill_at = time.monotonic() + UNKILLABLE_S
            self._tell("kill")

    def check(self, grace_s: float) -> None:
        if self.is_gone:
            return
        if self._is_over and self.returncode is not None:
            self.is_gone = True
        elif self.kill_at is not None and time.monotonic() >= self.kill_at:
            if self.was_killed:
                self.is_gone = True  # its node does not answer
                self.returncode = LOST if self.returncode is None else self.returncode
            else:
                self.kill()

    def drain(self) -> None:
        self._thread.join(timeout=2.0)

    def _tell(self, order: str, *arguments: float) -> None:
        self._order = (order, arguments)
        if self._actor is not None:
            with contextlib.suppress(Exception):
                getattr(self._actor, order).remote(*arguments)


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"
