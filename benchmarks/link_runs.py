"""Owns one run of slow_links.py: the processes of a method on the hosts of a link, watched while the rate changes.

Updates are timed by when their lines come into the log, and the interface's counters are read at that moment.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from link_methods import Job, Method
from links import Loopback, Sent

POLL_S = 0.01
SHORTEST_S = 1.0  # of a measurement; fast updates are timed in larger numbers
SETTLE_S = 1.0  # after a change of the rate: what was on its way at the old one


class RunFailed(RuntimeError):
    """A process ended by itself or told nothing in time; the message holds the end of its output."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A line of a log: an update is done.

    Attributes:
        time_s: when it was seen, monotonic.
        mbit: of this update, as the program counts it; 0 where nothing was exchanged.
        wait_ms: for the peer.
        sent: what each host had sent by then, or None.
    """

    time_s: float
    mbit: float
    wait_ms: float
    sent: list[Sent] | None


@dataclasses.dataclass
class Cell:
    """What was measured of one method at one rate.

    Attributes:
        rate_mbit_s: of the link, None where it is unlimited.
        updates: timed; a fraction where they were told from bytes.
        updates_per_s: mean over the hosts.
        by: ``updates`` where whole updates were timed; ``bytes`` where none ended in time: bytes sent in that time
            over bytes of an update.
        counted_mbit: sent by a device for an update, as the program counts it, or by the formula of all_reduce.
        interface_mbit: the same by the interface's counters, with the headers of packets, or None.
        payload_mbit: the same without those headers, or None.
        wait_ms: of an update, for the peer.
    """

    rate_mbit_s: float | None
    updates: float
    updates_per_s: float
    by: str
    counted_mbit: float
    interface_mbit: float | None
    payload_mbit: float | None
    wait_ms: float


class Watched:
    """A process and what it has told so far.

    Args:
        job: what to run.
        prefix: of the command, to run it on its host.
        output: where both its outputs go.
    """

    def __init__(self, job: Job, prefix: tuple[str, ...], output: Path):
        self.events: list[Event] = []
        self.num_parameters = 0
        self._output = output
        self._source = job.log or output
        self._offset, self._rest = 0, b""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [*prefix, *job.command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, **job.environment},
                start_new_session=True,
            )

    def read(self, sent: list[Sent] | None) -> None:
        """Take in the lines that have come."""
        try:
            with self._source.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            record = self._record(line.decode(errors="replace"))
            if record is not None:
                mbit, wait = (float(record.get(f"codistill_{name}", 0)) for name in ("mbit", "wait_ms"))
                self.events.append(Event(time.monotonic(), mbit, wait, sent))

    def _record(self, line: str) -> dict | None:
        if self._source is not self._output:
            record = json.loads(line)
            self.num_parameters = record.get("parameters", self.num_parameters)
            return record if record["kind"] == "train" else None
        if found := re.search(r"num\. trained: ([\d,]+)", line):
            self.num_parameters = self.num_parameters or int(found[1].replace(",", ""))
        found = re.search(r"\| train_inner \| (\{.*\})", line)
        return json.loads(found[1]) if found else None

    def fail_if_ended(self) -> None:
        """Raises:
        RunFailed: it has ended.
        """
        if self.process.poll() is not None:
            raise RunFailed(f"a process ended with {self.process.returncode}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its output."""
        return self._output.read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """End it, with whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Run:
    """The processes of one method, one a host; a context manager that leaves none of them behind.

    Args:
        jobs: one a host.
        link: between the hosts.
        folder: of the outputs.
    """

    def __init__(self, jobs: list[Job], link: Loopback, folder: Path):
        self._link = link
        self._watched: list[Watched] = []
        try:
            for number, (job, host) in enumerate(zip(jobs, link.hosts, strict=True)):
                self._watched.append(Watched(job, host.prefix, folder / f"output{number}.txt"))
        except BaseException:
            self.close()
            raise
        # The first rank of a model speaks for all its ranks.
        self._timed = [watched for watched, job in zip(self._watched, jobs, strict=True) if job.speaks]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what still runs."""
        for watched in self._watched:
            watched.kill()

    @property
    def num_parameters(self) -> int:
        """Trained parameters of the model, as the program says."""
        return self._watched[0].num_parameters

    def start(self, num_updates: int, timeout_s: float) -> None:
        """Wait for the first updates, at least two.

        Raises:
            RunFailed: they do not come.
        """
        deadline = time.monotonic() + timeout_s
        while any(len(watched.events) < max(num_updates, 2) for watched in self._timed):
            self._look(counting=False)  # a process enters its namespace only after it was started
            if time.monotonic() > deadline:
                tails = "\n".join(watched.tail() for watched in self._watched)
                raise RunFailed(f"not {num_updates} updates within {timeout_s:.0f} s:\n{tails}")

    def measure(
        self, method: Method, rate: float | None, warm_up: int, updates: int, limit_s: float, update_mbit: float | None
    ) -> Cell:
        """Set the rate, then time updates.

        Args:
            method: that runs.
            rate: Mbit/s, None is unlimited.
            warm_up: updates before the first timed one.
            updates: to time; rounded up to whole periods.
            limit_s: seconds that the timed updates, and once more the warm-up, may take; then fewer are timed.
            update_mbit: what an update sends, from the formula or from a faster link, if that is known.
        """
        self._link.set_rate(rate)
        period = method.period
        updates = -(-updates // period) * period
        sent_then = self._look()  # what came while the rate was being set is no part of the measurement
        began = settled = time.monotonic()
        firsts = [len(watched.events) + warm_up for watched in self._timed]
        while True:
            sent = self._look()
            now = time.monotonic()
            if settled == began and now >= began + SETTLE_S:
                settled, sent_then = now, sent
            have = [len(watched.events) - first - 1 for watched, first in zip(self._timed, firsts, strict=True)]
            warm_since = max(
                watched.events[first].time_s if len(watched.events) > first else now
                for watched, first in zip(self._timed, firsts, strict=True)
            )
            if min(have) >= updates and now - warm_since >= SHORTEST_S:
                updates = min(have) // period * period
                break
            if now - warm_since >= limit_s or (min(have) < 0 and now - began >= limit_s + SETTLE_S):
                # Checkpoints travel beside the training, so a part of their period tells the speed as well.
                whole = 1 if method.is_beside else period
                updates = max(min(have), 0) // whole * whole
                break
        if updates:
            return self._by_updates(rate, firsts, updates, period, update_mbit)
        if sent is None or sent_then is None or not update_mbit:
            raise RunFailed(f"no update in {limit_s:.0f} s, and no counters to tell a part of one from")
        grown = [after.since(before).num_bytes for before, after in zip(sent_then, sent, strict=True)]
        mbit = sum(grown) / len(grown) * 8e-6
        done, seconds = mbit / update_mbit, time.monotonic() - settled
        return Cell(rate, done, done / seconds, "bytes", update_mbit, None, None, 0.0)

    def _by_updates(
        self, rate: float | None, firsts: list[int], updates: int, period: int, update_mbit: float | None
    ) -> Cell:
        windows = [w.events[first : first + updates + 1] for w, first in zip(self._timed, firsts, strict=True)]
        speeds = [updates / (window[-1].time_s - window[0].time_s) for window in windows]
        is_whole = updates % period == 0
        grown = []
        for host in range(len(self._watched)):
            # Models that do not wait for each other are at other updates at one moment: each has its own window.
            window = windows[min(host, len(windows) - 1)]
            if is_whole and window[0].sent is not None and window[-1].sent is not None:
                grown.append(window[-1].sent[host].since(window[0].sent[host]))
        interface, payload = (
            sum(sizes) / len(sizes) / updates * 8e-6 if sizes else None
            for sizes in ([sent.num_bytes for sent in grown], [sent.payload_bytes for sent in grown])
        )
        counted = sum(event.mbit for event in windows[0][1:]) / updates if is_whole else 0.0
        wait = sum(event.wait_ms for event in windows[0][1:]) / updates
        speed = sum(speeds) / len(speeds)
        return Cell(rate, updates, speed, "updates", counted or update_mbit or 0.0, interface, payload, wait)

    def _look(self, counting: bool = True) -> list[Sent] | None:
        """Take in what is new, after a moment; with ``counting`` also what the interfaces have sent."""
        time.sleep(POLL_S)
        for watched in self._watched:
            watched.fail_if_ended()
        sent = None
        try:
            if counting:
                sent = self._link.sent([watched.process.pid for watched in self._watched])
        except OSError as error:
            raise RunFailed(f"{error}\n" + "\n".join(watched.tail() for watched in self._watched)) from error
        for watched in self._timed:
            watched.read(sent)
        return sent
