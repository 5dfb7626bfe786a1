"""Owns the campaign of the test of the claim: it runs what ``grid.py`` asks for, and notes a row each.

``setsid nohup python recipes/claim/run.py --data DIR --runs DIR --processes 2 &`` from the root of a copy of the
repository that nobody edits. It may be killed at any time and started again: runs go on from their checkpoints,
finished rows stay. It yields to whatever else runs on the machine. It never changes a row that is there.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType, ModuleType

import images
import text
import torch
from grid import Row, Run, pending
from settings import ARMS, ORDERS, SETTINGS

from fairseq_codistill.whole_files import SaveError, whole_file

ROOT = Path(__file__).parents[2]
ATTEMPTS = 3
POLL_S = 0.5


@dataclasses.dataclass
class Training:
    """A run that is going on.

    Attributes:
        run: that it is of.
        folder: of its checkpoints and logs.
        child: the process that trains or launches it.
        started: by the monotonic clock, seconds; so much earlier as it was trained before a stop.
        attempt: from 1 on.
    """

    run: Run
    folder: Path
    child: subprocess.Popen[bytes]
    started: float
    attempt: int = 1


class Campaign:
    """Runs of one folder.

    Args:
        data: holds ``<train_images>/{train,val,test}``, ``multi30k`` and ``multi30k_third``.
        runs: folder of the runs; ``runs.jsonl`` in it has the rows.
        order: of ``settings.ORDERS``.
        devices: options of ``codistill-vision`` for the device.
        processes: that train at a time. Runs go beside each other as far as they fit; one that needs more has all.
    """

    def __init__(self, data: Path, runs: Path, order: str, devices: list[str], processes: int = 1):
        self._data, self._runs, self._order, self._devices = data, runs, order, devices
        self._processes = processes
        self._going: list[Training] = []
        self._stopped = False
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)

    def rows(self) -> list[Row]:
        """What is finished; a line that a crash cut off is dropped."""
        path = self._runs / "runs.jsonl"
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            os.truncate(path, len(text[: text.rfind("\n") + 1].encode()))  # the rows before it stay where they are
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def go_on(self, most: int | None = None) -> None:
        """Run until nothing is pending, or ``most`` runs are done."""
        begun = 0
        try:
            while True:
                rows = self.rows()
                going = [training.run for training in self._going]
                waiting = [run for run in pending(rows, self._order) if run not in going]
                while waiting and self._fits(waiting[0]) and not self._stopped and (most is None or begun < most):
                    begun += 1
                    run = waiting.pop(0)
                    print(f"{now()} {len(rows)} done; now {run.name}", flush=True)
                    self._begin(run)
                if not self._going:
                    if not waiting:
                        print(f"nothing is left to do: {len(rows)} runs", flush=True)
                    return
                self._wait()
        finally:
            self._end_all()  # of a campaign that fails: what runs beside saves and ends
            for training in self._going:
                training.child.wait()
                _keep_time(training)

    def _fits(self, run: Run) -> bool:
        taken = sum(processes_of(training.run) for training in self._going)
        return not taken or taken + processes_of(run) <= self._processes

    def _begin(self, run: Run) -> None:
        folder = self._runs / run.name
        self._going.append(Training(run, folder, self._start(run, folder), time.monotonic() - _trained_s(folder)))
        self._end_if_stopped()

    def _wait(self) -> None:
        """Until a training has ended, however it did."""
        while not (ended := [training for training in self._going if training.child.poll() is not None]):
            time.sleep(POLL_S)
        for training in ended:
            run, exit_code = training.run, training.child.returncode
            state = kind_of(run).state(run, training.folder, exit_code)
            if state in ("complete", "diverged"):
                self._note(training, state == "diverged")
                self._going.remove(training)
            elif self._stopped:
                _keep_time(training)
                self._going.remove(training)
            else:
                # What is asked for once more, though it ended well, would end so for ever.
                asked = kind_of(run).command(run, self._data, training.folder, self._devices)
                if state == "failed" or asked == training.child.args:
                    print(
                        f"{now()} {run.name}: ended with exit code {exit_code}, attempt {training.attempt}", flush=True
                    )
                    if training.attempt == ATTEMPTS:
                        sys.exit(f"{run.name} failed {ATTEMPTS} times; its logs are in {training.folder}")
                    training.attempt += 1
                training.child = self._start(run, training.folder)
                self._end_if_stopped()

    def _note(self, training: Training, has_diverged: bool) -> None:
        run = training.run
        row: Row = {**{name: getattr(run, name) for name in Run.__dataclass_fields__}, "date": now()}
        try:
            row |= diverged_row(run) if has_diverged else kind_of(run).row(run, self._data, training.folder)
        except Exception:
            print(f"{now()} {run.name}: trained, but cannot be evaluated; it is in {training.folder}", flush=True)
            raise
        row["commit"] = commit_of(ROOT)
        row["wall_s"] = round(time.monotonic() - training.started)
        with (self._runs / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _start(self, run: Run, folder: Path) -> subprocess.Popen[bytes]:
        """Start the run, or go on with it from its checkpoints."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        command = kind_of(run).command(run, self._data, folder, self._devices)
        with (folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
            )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        self._end_all()

    def _end_if_stopped(self) -> None:
        """A signal may have come while a child was started, which it then did not find."""
        if self._stopped:
            self._end_all()

    def _end_all(self) -> None:
        for training in self._going:
            with contextlib.suppress(ProcessLookupError):
                training.child.send_signal(signal.SIGTERM)


def _keep_time(training: Training) -> None:
    """Of a run that stops before its end: for the row that it will have."""
    with contextlib.suppress(SaveError), whole_file(training.folder / "seconds") as file:  # a full disk ends no run
        file.write(f"{time.monotonic() - training.started:.1f}".encode())


def _trained_s(folder: Path) -> float:
    """Seconds before the last stop."""
    try:
        return float((folder / "seconds").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0.0


def processes_of(run: Run) -> int:
    """That train it, launcher apart."""
    return ARMS[run.arm].models * ARMS[run.arm].devices


def kind_of(run: Run) -> ModuleType:
    """The module that trains and evaluates such a run."""
    return {"images": images, "text": text}[SETTINGS[run.setting].kind]


def diverged_row(run: Run) -> Row:
    """Of a run that ended because something was not finite: no figures, which are worse than any."""
    setting = SETTINGS[run.setting]
    none = dict.fromkeys((*setting.metrics, *setting.shown))
    return {"diverged": True, "held_out": none, "test": None if run.stage == "tune" else none}


def commit_of(folder: Path) -> str:
    """Of the repository that a folder is the root of; empty where it is none, or git is not there."""
    if not (folder / ".git").exists():  # git would ask the folders above
        return ""
    try:
        ended = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return ended.stdout.strip()


def end_with_parent() -> None:
    """In a child: SIGTERM when the campaign dies, however it does; a training saves and ends then."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def yield_to_others() -> None:
    """Lowest priority, for the whole session as well where this process leads it: Linux groups by session."""
    os.nice(max(0, 19 - os.nice(0)))
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def now() -> str:
    """In UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description="Run what results/claim/PLAN.md has decided.")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of 2560/, 10000/, 40000/ (shrink_images.py), multi30k/ and multi30k_third/ (prepare.sh)",
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of checkpoints, logs and rows")
    parser.add_argument("--most", type=int, help="stop after that many runs")
    parser.add_argument(
        "--processes", type=int, default=1, help="that train at a time: runs go beside each other, as far as they fit"
    )
    parser.add_argument("--order", choices=tuple(ORDERS), default="claim", help="which settings, and in which order")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU although there is a GPU")
    args = parser.parse_args()
    use_cpu = args.cpu or not torch.cuda.is_available()
    devices = ["--cpu", "--num-workers", "0"] if use_cpu else ["--num-workers", "4"]
    args.runs.mkdir(parents=True, exist_ok=True)
    with (args.runs / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another campaign runs in {args.runs}")
        yield_to_others()
        Campaign(args.data.resolve(), args.runs.resolve(), args.order, devices, args.processes).go_on(args.most)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
