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
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from evaluate import figures, load_folder, log_mean_probability, predict
from grid import SETTINGS, Row, Run, pending

ROOT = Path(__file__).parents[2]
ATTEMPTS = 3
GRACE_S = 60.0  # for a process to save, once it is to end
PARTS = {"held_out": "val", "test": "test"}  # name in the rows -> folder


class Campaign:
    """Runs of one folder.

    Args:
        data: holds ``<train_images>/{train,val,test}``.
        runs: folder of the runs; ``runs.jsonl`` in it has the rows.
    """

    def __init__(self, data: Path, runs: Path):
        self._data, self._runs = data, runs
        self._children: list[subprocess.Popen[bytes]] = []
        self._stopped = False
        self._images: dict[Path, Any] = {}
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
            run = next(pending(rows), None)
            if run is None:
                print(f"nothing is left to do: {len(rows)} runs", flush=True)
                return
            print(f"{now()} {len(rows)} done; now {run.name}", flush=True)
            self._finish(run)
            finished += 1

    def _finish(self, run: Run) -> None:
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            ends = self._train(run)
            if self._stopped:
                return
            if set(ends) == {"finished"}:
                break
            print(f"{now()} {run.name}: ended by {ends}, attempt {attempt}", flush=True)
        else:
            sys.exit(f"{run.name} failed {ATTEMPTS} times; its logs are in {self._runs / run.name}")
        row = self._row(run)
        row["wall_s"] = round(time.monotonic() - started)
        with (self._runs / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _train(self, run: Run) -> list[str]:
        """Start the run's processes and wait for them; returns why each model ended."""
        folder = self._runs / run.name
        addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(run.num_models))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        self._children = []
        for model in range(run.num_models):
            (folder / str(model)).mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "vision.train", *run.options(str(self._data))]
            command += ["--seed", str(run.first_seed() + model), "--save-dir", str(folder / str(model))]
            if run.num_models > 1:
                command += ["--codistill-model-index", str(model), "--codistill-addresses", addresses]
            with (folder / str(model) / "train.log").open("ab") as log:
                self._children.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent
                    )
                )
        self._wait()
        return [last(read_log(folder / str(model) / "log.jsonl"), "end", "reason") for model in range(run.num_models)]

    def _wait(self) -> None:
        """Until all processes have ended. One that fails ends the other: it would train on alone."""
        while any(child.poll() is None for child in self._children):
            time.sleep(0.5)
            if any(child.poll() for child in self._children):
                for child in self._children:
                    child.terminate()
                deadline = time.monotonic() + GRACE_S
                for child in self._children:
                    try:
                        child.wait(max(0.0, deadline - time.monotonic()))
                    except subprocess.TimeoutExpired:
                        child.kill()

    def _row(self, run: Run) -> Row:
        folder = self._runs / run.name
        row: Row = {**{name: getattr(run, name) for name in Run.__dataclass_fields__}, "date": now()}
        records = [read_log(folder / str(model) / "log.jsonl") for model in range(run.num_models)]
        for name in ("nll_loss", "distance", "codistill_agreement", "codistill_mbit", "codistill_mse"):
            row["train_" + name] = mean([last(log, "train", name) for log in records])
        row["updates"] = records[0][-1]["update"]
        row["skipped_updates"] = sum(r["skipped"] for log in records for r in log if r["kind"] == "skip")
        row["skipped_exchanges"] = sum(r.get("codistill_skipped", 0) for log in records for r in log)
        row["versions"] = last(records[0], "start", "versions")
        row["commit"] = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        for part, name in PARTS.items():
            row[part] = None
            if part == "test" and run.stage == "tune":
                continue  # settings are chosen without a look at the test images
            pixels, targets = self._load(self._data / str(SETTINGS[run.setting].train_images) / name)
            logits = [predict(folder / str(i) / "checkpoint_last.pt", pixels) for i in range(run.num_models)]
            torch.save(torch.stack(logits).half(), folder / f"{part}.logits.pt")
            models = [figures(one, targets) for one in logits]
            row[part] = {key: mean([model[key] for model in models]) for key in models[0]}
            row[part + "_models"] = models
            if len(logits) > 1:
                row[part + "_together"] = figures(log_mean_probability(logits), targets)
        return row

    def _load(self, folder: Path) -> Any:
        if folder not in self._images:
            self._images[folder] = load_folder(folder)
        return self._images[folder]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)


def end_with_parent() -> None:
    """In a child: SIGTERM when the campaign dies, however it does; a training saves and ends then."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def yield_to_others() -> None:
    """Lowest priority, for the whole session as well where this process leads it: Linux groups by session."""
    os.nice(max(0, 19 - os.nice(0)))
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text("19")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a training; none where it never began."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last(log: list[dict[str, Any]], kind: str, name: str) -> Any:
    """The last value of a figure, None where there is none."""
    return next((record[name] for record in reversed(log) if record["kind"] == kind and name in record), None)


def mean(values: list[Any]) -> float | None:
    """None where a value is missing."""
    return None if any(value is None for value in values) else sum(values) / len(values)


def now() -> str:
    """In UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description="Run what results/claim/PLAN.md has decided.")
    parser.add_argument("--data", type=Path, required=True, help="folder of 10000/ and 40000/, of shrink_images.py")
    parser.add_argument("--runs", type=Path, required=True, help="folder of checkpoints, logs and rows")
    parser.add_argument("--most", type=int, help="stop after that many runs")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    with (args.runs / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another campaign runs in {args.runs}")
        yield_to_others()
        Campaign(args.data.resolve(), args.runs.resolve()).go_on(args.most)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
