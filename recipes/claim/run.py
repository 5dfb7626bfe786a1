"""Owns the campaign of the test of the claim: it runs what ``grid.py`` asks for, one at a time, and notes a row each.

``setsid nohup python recipes/claim/run.py --data DIR --runs DIR &`` from the root of a copy of the repository that
nobody edits. It may be killed at any time and started again: runs go on from their checkpoints, finished rows stay.
It yields to whatever else runs on the machine. It never changes a row that is there.
"""

import argparse
import contextlib
import ctypes
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
from settings import ORDERS, SETTINGS

ROOT = Path(__file__).parents[2]
ATTEMPTS = 3


class Campaign:
    """Runs of one folder.

    Args:
        data: holds ``<train_images>/{train,val,test}`` and ``multi30k``.
        runs: folder of the runs; ``runs.jsonl`` in it has the rows.
        order: of ``settings.ORDERS``.
        devices: options of ``codistill-vision`` for the device.
    """

    def __init__(self, data: Path, runs: Path, order: str, devices: list[str]):
        self._data, self._runs, self._order, self._devices = data, runs, order, devices
        self._child: subprocess.Popen[bytes] | None = None
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
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def go_on(self, most: int | None = None) -> None:
        """Run until nothing is pending, or ``most`` runs are done."""
        finished = 0
        while not self._stopped and (most is None or finished < most):
            rows = self.rows()
            run = next(pending(rows, self._order), None)
            if run is None:
                print(f"nothing is left to do: {len(rows)} runs", flush=True)
                return
            print(f"{now()} {len(rows)} done; now {run.name}", flush=True)
            self._finish(run)
            finished += 1

    def _finish(self, run: Run) -> None:
        started, folder, kind = time.monotonic(), self._runs / run.name, kind_of(run)
        for attempt in range(1, ATTEMPTS + 1):
            exit_code = self._train(run, folder)
            if self._stopped:
                return
            if kind.is_complete(run, folder, exit_code):
                break
            print(f"{now()} {run.name}: ended with exit code {exit_code}, attempt {attempt}", flush=True)
        else:
            sys.exit(f"{run.name} failed {ATTEMPTS} times; its logs are in {folder}")
        row: Row = {**{name: getattr(run, name) for name in Run.__dataclass_fields__}, "date": now()}
        row |= kind.row(run, self._data, folder)
        row["commit"] = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        row["wall_s"] = round(time.monotonic() - started)
        with (self._runs / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _train(self, run: Run, folder: Path) -> int:
        """Start the run, or go on with it, and wait; returns its exit code."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        command = kind_of(run).command(run, self._data, folder, self._devices)
        with (folder / "output.log").open("ab") as log:
            self._child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
            )
            if self._stopped:  # between the last look and the start
                self._child.terminate()
            return self._child.wait()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM)


def kind_of(run: Run) -> ModuleType:
    """The module that trains and evaluates such a run."""
    return {"images": images, "text": text}[SETTINGS[run.setting].kind]


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
        help="folder of 10000/, 40000/ (shrink_images.py) and multi30k/ (prepare.sh)",
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of checkpoints, logs and rows")
    parser.add_argument("--most", type=int, help="stop after that many runs")
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
        Campaign(args.data.resolve(), args.runs.resolve(), args.order, devices).go_on(args.most)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
