"""codistill-launch with real fairseq models that load with workers, and are interrupted."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import USER_DIR, environment, json_logs, train_command
from launching import finish, lines_until

from fairseq_codistill.fairseq_side import compat


@pytest.fixture
def launch_fairseq(toy_data, tmp_path):
    started = []

    def start(*options, more=()):
        command = train_command(
            toy_data, tmp_path / "{model}", "--user-dir", USER_DIR, "--task", "codistill_translation", "--criterion",
            "codistillation", "--seed", "{model+1}", "--max-epoch", "1000", "--max-tokens", "50", "--num-workers", "2",
            "--no-epoch-checkpoints", *more,
        )  # fmt: skip
        launcher = subprocess.Popen(
            [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "2", *options, "--", *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        )  # fmt: skip
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        launcher.terminate()
        launcher.kill()  # the guards end the models
        launcher.wait()
        launcher.stdout.close()


def num_updates_saved(folder):
    compat.apply()
    checkpoint = torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=True)
    return checkpoint["optimizer_history"][-1]["num_updates"]


def num_updates_logged(folder, model):
    return int(json_logs((folder / f"model-{model}.log").read_text(), "train_inner")[-1]["num_updates"])


def test_an_interrupted_launch_saves_every_model_and_says_how_it_ended(launch_fairseq, tmp_path):
    launcher = launch_fairseq("--grace-s", "100")
    lines_until(launcher, '"num_updates": "8"')
    launcher.send_signal(signal.SIGINT)
    code, lines = finish(launcher)
    assert code == 128 + signal.SIGINT, "\n".join(lines[-40:])
    assert not any("may be lost" in line or "Traceback" in line for line in lines)
    for model in (0, 1):
        assert num_updates_saved(tmp_path / str(model)) == num_updates_logged(tmp_path, model) >= 7
        log = (tmp_path / f"model-{model}.log").read_text()
        assert log.rstrip().endswith(f"[launch] model {model} ended: exit code 143")


@pytest.mark.slow
def test_a_model_that_waits_for_a_peer_saves_too_when_it_is_asked_to_end(launch_fairseq, tmp_path):
    launcher = launch_fairseq("--grace-s", "12")
    lines_until(launcher, '"num_updates": "8"')
    os.kill(model_process(tmp_path / "1"), signal.SIGSTOP)
    last = -1
    while (found := num_updates_logged(tmp_path, 0)) != last:  # once it makes no progress, it waits
        last = found
        time.sleep(2)
    launcher.send_signal(signal.SIGTERM)
    code, rest = finish(launcher)
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after update" in (tmp_path / "model-0.log").read_text()
    assert num_updates_saved(tmp_path / "0") == num_updates_logged(tmp_path, 0) >= last
    assert [line for line in rest if "may be lost" in line] == [
        "[launch] model 1: killed by SIGKILL, so what it did since its last checkpoint may be lost"
    ]


def test_a_model_that_is_killed_keeps_nobody_waiting(launch_fairseq, tmp_path):
    launcher = launch_fairseq("--grace-s", "100", more=["--codistill-timeout", "100000"])
    lines_until(launcher, '"num_updates": "8"')
    os.kill(model_process(tmp_path / "1"), signal.SIGKILL)
    lines = lines_until(launcher, "[launch] model 1: killed by SIGKILL; the other models go on without it")
    at = num_updates_logged(tmp_path, 0)
    lines += lines_until(launcher, "[model 0]", f'"num_updates": "{at + 20}"')
    assert any("model 1 is" in line and "killed by SIGKILL" in line for line in lines if line.startswith("[model 0]"))
    launcher.send_signal(signal.SIGTERM)
    assert finish(launcher)[0] == 143


@pytest.mark.slow
def test_a_model_that_dies_at_its_start_keeps_nobody_waiting(launch_fairseq, tmp_path):
    more = ["--codistill-start-timeout", "100000", "--codistill-require-peers", "never", "--max-update", "6"]
    launcher = launch_fairseq("--model-args", "1", "--optimizer nobodys", more=more)
    code, lines = finish(launcher)
    assert code == 1
    assert "[launch] model 1 failed: exit code 2" in lines
    assert num_updates_saved(tmp_path / "0") == 6


def test_a_model_that_is_started_again_is_not_given_up(launch_fairseq, tmp_path):
    launcher = launch_fairseq("--max-restarts", "1", "--grace-s", "100", more=["--codistill-timeout", "100000"])
    lines_until(launcher, '"num_updates": "8"')
    os.kill(model_process(tmp_path / "1"), signal.SIGKILL)
    lines_until(launcher, "it is started again", "[model 0]", "model 1 is present (was")
    at = num_updates_logged(tmp_path, 0)
    lines_until(launcher, f'"num_updates": "{at + 5}"')
    launcher.send_signal(signal.SIGTERM)
    assert finish(launcher)[0] == 143


def model_process(folder):
    """The training that saves in a folder: the child of its guard. Their workers bear the same words."""
    words = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if entry.name.isdecimal():
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                words[entry.name] = ((entry / "cmdline").read_text().split("\0"), parent)
    guards = {pid for pid, (command, _) in words.items() if str(folder) in command and command[3].endswith("guard.py")}
    (leader,) = [pid for pid, (_, parent) in words.items() if parent in guards]
    return int(leader)
