"""Two hundred random interruptions: launches of translation and vision, with and without loader workers, get SIGINT,
SIGTERM or SIGKILL at random times, to the launcher, one model, one of its workers, or all processes at once::

    INTERRUPTIONS_OUT=out python -m pytest -m soak tests/soak/test_interruptions.py

After a signal that can be caught nothing since the last update is lost, after SIGKILL nothing but the time since the
last save; the next launch goes on from there. Nothing is left running, no key, no half file. ``INTERRUPTIONS`` (200),
``INTERRUPTIONS_SEED`` and ``INTERRUPTIONS_OUT`` (a folder for ``report.json``) change it. Half an hour on two cores.
"""

import collections
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import USER_DIR, environment, json_logs, train_command

from fairseq_codistill.fairseq_side import compat

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

ROUNDS = int(os.environ.get("INTERRUPTIONS", "200"))
SEED = int(os.environ.get("INTERRUPTIONS_SEED", "1"))
TARGETS = ("launcher", "model", "worker", "everything")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
SAVE_UPDATES = 10
DEADLINE_S = 120.0


class Run:
    """One series of launches in one folder, each going on from the last."""

    def __init__(self, folder: Path, kind: str, workers: int, data: Path, runtime: Path):
        self.folder, self.kind, self.workers, self.runtime = folder, kind, workers, runtime
        folder.mkdir()
        save_dir = folder / "{model}"
        if kind == "translation":
            self.command = train_command(
                data, save_dir, "--user-dir", USER_DIR, "--task", "codistill_translation", "--criterion",
                "codistillation", "--seed", "{model+1}", "--max-epoch", "100000", "--max-tokens", "60",
                "--num-workers", str(workers), "--save-interval-updates", str(SAVE_UPDATES),
                "--keep-interval-updates", "1", "--disable-validation",
            )  # fmt: skip
        else:
            self.command = [
                sys.executable, "-m", "fairseq_codistill.vision.train", "--cpu", "--model", "wrn10_1", "--seed",
                "{model+1}", "--save-dir", str(save_dir), "--num-workers", str(workers), "--log-updates", "1",
                "--save-updates", str(SAVE_UPDATES), "--epochs", "100000", "--no-progress-bar", "--batch-size", "16",
            ]  # fmt: skip

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "2", "--grace-s", "60"]
        command += ["--log-dir", str(self.folder / "logs"), "--", *self.command]
        settings = environment(XDG_RUNTIME_DIR=str(self.runtime), INTERRUPTED_RUN=str(self.folder))
        with (self.folder / "launch.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=settings, start_new_session=True)

    def processes(self) -> dict[int, tuple[int, list[str]]]:
        """Everything that still runs of this series: pid -> (parent, command line)."""
        mark = f"INTERRUPTED_RUN={self.folder}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if mark in (entry / "environ").read_bytes().split(b"\0") and fields[0] not in "ZX":
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found[int(entry.name)] = (int(fields[1]), words)
        return found

    def tree(self, model: int) -> tuple[int | None, list[int]]:
        """The training process of a model, the child of its guard, and its loader workers."""
        found = self.processes()
        mine = {pid for pid, (_, words) in found.items() if str(self.folder / str(model)) in words}
        guards = {pid for pid in mine if any(word.endswith("guard.py") for word in found[pid][1])}
        leader = next((pid for pid in sorted(mine) if found[pid][0] in guards and pid not in guards), None)
        return leader, [pid for pid, (parent, _) in found.items() if parent == leader and leader is not None]

    def log(self, model: int) -> bytes:
        name = f"logs/model-{model}.log" if self.kind == "translation" else f"{model}/log.jsonl"
        path = self.folder / name
        return path.read_bytes() if path.exists() else b""

    def updates(self, model: int, since: int = 0) -> list[int]:
        """Numbers of the updates that were logged after so many bytes of the log; skipped ones are not."""
        text = self.log(model)[since:].decode(errors="replace")
        if self.kind == "translation":
            return [int(log["num_updates"]) for log in json_logs(text, "train_inner")]
        records = map(json.loads, text.split("\n")[:-1])
        return [int(record["update"]) for record in records if record["kind"] == "train"]

    def logged(self, model: int, since: int = 0) -> int:
        """The last of them, 0 without one."""
        return max(self.updates(model, since), default=0)

    def saved(self, model: int) -> int:
        """Number of updates in the last checkpoint, which loads whole; 0 without one."""
        path = self.folder / str(model) / "checkpoint_last.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state["optimizer_history"][-1]["num_updates"] if self.kind == "translation" else state["elapsed"]

    def half_files(self) -> dict[str, int]:
        """Files under a temporary name, and empty ones, with the time of their last change."""
        files = [path for model in (0, 1) for path in (self.folder / str(model)).glob("*") if path.is_file()]
        half = [path for path in files if path.name.endswith(".tmp") or path.stat().st_size == 0]
        return {str(path.relative_to(self.folder)): path.stat().st_mtime_ns for path in half}


def interrupt(run: Run, generator: random.Random) -> dict:
    """One launch, one interruption; raises AssertionError where something was lost."""
    target = generator.choice([name for name in TARGETS if name != "worker" or run.workers])
    number, model = generator.choice(SIGNALS), generator.randrange(2)
    before, since = [run.saved(j) for j in range(2)], [len(run.log(j)) for j in range(2)]
    half_before = run.half_files()  # of models that were killed: the next ones remove them once they load a checkpoint
    launcher = run.start()
    told = time.monotonic()
    goal = [generator.randint(1, 25) for _ in range(2)]
    early = generator.random() < 0.1  # sometimes before anything was trained
    wait_s = generator.uniform(0.0, 6.0)
    while time.monotonic() - told < (wait_s if early else DEADLINE_S):
        assert launcher.poll() is None, "the launch ended by itself"
        if not early and all(run.logged(j, since[j]) >= before[j] + goal[j] for j in range(2)):
            break
        time.sleep(0.02)
    else:
        assert early, f"no progress from {before}"
    first = [run.logged(j, since[j]) for j in range(2)]
    leader, workers = run.tree(model)
    victims = {
        "launcher": [launcher.pid],
        "model": [leader] if leader else [launcher.pid],
        "worker": generator.sample(workers, min(1, len(workers))) or [launcher.pid],
        "everything": list(run.processes()),
    }[target]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if target in ("model", "worker"):
        time.sleep(generator.uniform(0, 2))  # the others go on; then the launch is asked to end
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher.pid, signal.SIGTERM)
    code = launcher.wait(DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while left := run.processes():
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)
    killed = (
        {
            # who got no chance to save: of the launcher's own death the guards tell the models
            "launcher": [],
            "model": [model] if leader else [],
            "worker": [model] if workers else [],  # a loader whose worker is killed fails its model
            "everything": [0, 1],
        }[target]
        if number == signal.SIGKILL
        else []
    )
    saved = [run.saved(j) for j in range(2)]
    logged = [run.logged(j, since[j]) for j in range(2)]
    lost = [sum(update > saved[j] for update in run.updates(j, since[j])) for j in range(2)]
    report = {
        "kind": run.kind, "workers": run.workers, "target": target, "signal": signal.Signals(number).name,
        "model": model, "early": early, "exit": code, "before": before, "first": first, "logged": logged,
        "saved": saved, "lost": lost, "half_before": half_before, "half": run.half_files(),
    }  # fmt: skip
    told_of = json.dumps(report)
    for j in range(2):
        assert saved[j] >= before[j], told_of
        assert lost[j] <= (SAVE_UPDATES if j in killed else 0), told_of
    if not killed:
        assert set(report["half"].items()) <= set(half_before.items()), told_of
        assert early or not report["half"], told_of
    return report


def keep(reports: list[dict], started: float, **more) -> None:
    """What is known so far, in ``INTERRUPTIONS_OUT``: the soak may be cut short."""
    if not (out := os.environ.get("INTERRUPTIONS_OUT")):
        return
    kept = list(reports)
    counts = collections.Counter(f"{report.get('target')} {report.get('signal')}" for report in kept)
    summary = {
        "rounds": len(kept), "wanted": ROUNDS, "seed": SEED, "seconds": round(time.time() - started),
        "failures": [report for report in kept if "failed" in report], "counts": dict(sorted(counts.items())), **more,
        "reports": kept,
    }  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / f"report.json.{threading.get_ident()}").write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(Path(out) / f"report.json.{threading.get_ident()}", Path(out) / "report.json")


def test_nothing_is_lost_left_running_or_left_behind(toy_data, tmp_path):
    compat.apply()  # once: series run in threads
    # A shell lets what it starts with & ignore Ctrl-C until it has handlers of its own, and so would the launches here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    runs = [
        Run(tmp_path / f"{kind}{workers}", kind, workers, toy_data, runtime)
        for kind in ("translation", "vision")
        for workers in (0, 2)
    ]
    reports: list[dict] = []
    started = time.time()

    def series(indices: tuple[int, ...]) -> None:
        """Series that take turns, so that a soak which is cut short has seen both kinds."""
        generators = {index: random.Random(f"{SEED} {index}") for index in indices}
        for index in indices * (ROUNDS // len(runs)):
            try:
                reports.append(interrupt(runs[index], generators[index]))
            except Exception as error:  # a checkpoint that cannot be read, too
                failed = f"{type(error).__name__}: {error}"
                reports.append({"kind": runs[index].kind, "workers": runs[index].workers, "failed": failed})
                for pid in runs[index].processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            keep(reports, started)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # as many as there are cores
        list(pool.map(series, [(0, 3), (1, 2)]))
    # What dead launchers and models left is removed by the next ones.
    half = {}
    for run in runs:
        before, since = [run.saved(j) for j in range(2)], [len(run.log(j)) for j in range(2)]
        last = run.start()
        deadline = time.monotonic() + DEADLINE_S
        while any(run.logged(j, since[j]) <= before[j] for j in range(2)) and time.monotonic() < deadline:
            time.sleep(0.1)
        last.send_signal(signal.SIGTERM)
        last.wait(DEADLINE_S)
        half |= {f"{run.folder.name}/{name}": changed for name, changed in run.half_files().items()}
    keys = [str(path) for path in runtime.rglob("*") if path.is_file() and path.name not in ("lock",)]
    failures = [report for report in reports if "failed" in report]
    keep(reports, started, updates=[[run.saved(j) for j in range(2)] for run in runs], keys_left=keys, half=half)
    assert keys == []
    assert half == {}
    assert failures == []
    assert len(reports) == ROUNDS // len(runs) * len(runs)
