"""Stopped and started again: exactly where it was if all stand there, where the others are if not."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import USER_DIR, codistill_command, environment, free_ports, json_logs, run_together, train_command

from fairseq_codistill.fairseq_side import compat

SECONDS = 240
FIGURES = ("train_loss", "loss", "nll_loss", "codistill_loss", "codistill_mse", "codistill_agreement", "gnorm", "lr")


def addresses():
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(2))


def parameters(folder):
    compat.apply()
    return torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=True)["model"]


def train(data, folder, num_updates, *extra):
    """Both models up to an update; their outputs."""
    where = addresses()
    commands = [
        codistill_command(
            data, folder / str(model), model, where, "--seed", str(model + 1), "--max-update", str(num_updates),
            "--update-freq", "2", "--dropout", "0.1", *extra,
        )
        for model in range(2)
    ]  # fmt: skip
    results = run_together(commands, SECONDS)
    for result in results:
        assert result.returncode == 0, result.output
    return [result.output for result in results]


def test_40_updates_are_20_and_20_more_bit_for_bit(toy_data, tmp_path):
    straight = train(toy_data, tmp_path / "straight", 40)
    first = train(toy_data, tmp_path / "stopped", 20)
    second = train(toy_data, tmp_path / "stopped", 40)
    for model in range(2):
        assert "skipped" not in second[model].replace("codistill_skipped", "")
        expected, before, after = (json_logs(part[model], "train_inner") for part in (straight, first, second))
        assert (len(before), len(after)) == (20, 20)
        for one, other in zip(expected, before + after, strict=True):
            assert one["codistill_peers"] == other["codistill_peers"] == 1
            for name in FIGURES:
                assert one.get(name) == other.get(name), (name, one["num_updates"])
        expected, found = (parameters(tmp_path / run / str(model)) for run in ("straight", "stopped"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_copies_of_the_peers_are_part_of_what_is_resumed(toy_data, tmp_path):
    """The last exchange before the stop is at 14, the next one after it at 28: in between the saved copies teach."""
    settings = ["--codistill-exchange", "checkpoints", "--codistill-interval", "14", "--codistill-replica-wait"]
    straight = train(toy_data, tmp_path / "straight", 32, *settings)
    train(toy_data, tmp_path / "stopped", 20, *settings)
    second = train(toy_data, tmp_path / "stopped", 32, *settings)
    for model in range(2):
        expected, after = (json_logs(part[model], "train_inner") for part in (straight, second))
        staleness = [log["codistill_staleness"] for log in expected]
        assert staleness == [update % 14 for update in range(32)]
        for one, other in zip(expected[20:], after, strict=True):
            assert one["codistill_peers"] == other["codistill_peers"] == 1
            assert one["codistill_staleness"] == other["codistill_staleness"]
            assert one["codistill_mse"] > 0
            for name in FIGURES:
                assert one.get(name) == other.get(name), (name, one["num_updates"])
        expected, found = (parameters(tmp_path / run / str(model)) for run in ("straight", "stopped"))
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    plain = train_command(
        toy_data, tmp_path / "stopped" / "0", "--max-update", "34", "--criterion", "label_smoothed_cross_entropy"
    )
    # plain fairseq takes no notice of the copies; torch's own check is off in it, since fairseq's files do not pass
    env = environment(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    [result] = run_together([plain], SECONDS, env)
    assert result.returncode == 0, result.output
    assert [log["num_updates"] for log in json_logs(result.output, "train_inner")] == [33, 34]


def test_models_stopped_at_different_positions_meet_at_the_furthest(toy_data, tmp_path):
    train(toy_data, tmp_path, 20)
    where = addresses()
    alone = codistill_command(
        toy_data, tmp_path / "1", 1, where, "--seed", "2", "--max-update", "26", "--update-freq", "2",
        "--codistill-start-timeout", "0.5", "--codistill-require-peers", "never",
    )  # fmt: skip
    [result] = run_together([alone], SECONDS)
    assert "training starts without it" in result.output
    behind, ahead = train(toy_data, tmp_path, 34)
    found = re.search(r"skipped (\d+) updates' worth of batches, from (.*?) to ", behind)
    assert found is not None, behind
    assert found.group(1) == "6"
    assert "skipped 6 updates" not in ahead
    # The first has 14 updates to make, the second 8: after those it has finished, and is not waited for.
    peers = [log["codistill_peers"] for log in json_logs(behind, "train_inner")]
    assert peers == [1] * 8 + [0] * 6
    assert [log["codistill_peers"] for log in json_logs(ahead, "train_inner")] == [1] * 8


def processes_with(text):
    """Numbers of the processes whose command line has ``text`` in it. Not every machine has pgrep."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if entry.name.isdecimal() and text in (entry / "cmdline").read_text().replace("\0", " "):
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.slow
def test_a_killed_rank_takes_its_model_to_a_restart_and_back_to_the_others(toy_data, tmp_path):
    command = train_command(
        toy_data, tmp_path / "{model}", "--user-dir", USER_DIR, "--task", "codistill_translation",
        "--criterion", "codistillation", "--seed", "{model+1}", "--max-epoch", "60", "--save-interval", "2",
        "--validate-interval", "20", "--max-tokens", "100",
    )  # fmt: skip
    options = ["--num-models", "2", "--devices-per-model", "2", "--max-restarts", "1", "--grace-s", "5"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "fairseq_codistill.launch.cli", *options, "--", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    lines, is_done = [], False
    assert launcher.stdout is not None
    try:
        for line in launcher.stdout:
            lines.append(line)
            if not is_done and line.startswith("[model 1") and '"epoch": 4' in line:
                os.kill(processes_with(f"--save-dir {tmp_path / '1'}")[-1], signal.SIGKILL)
                is_done = True
        assert launcher.wait() == 0, "".join(lines[-80:])
    finally:
        launcher.terminate()
        launcher.wait()
        launcher.stdout.close()
    output = "".join(lines)
    assert re.search(r"model 1: rank \d killed by SIGKILL; it is started again \(0 restarts left\)", output)
    skipped = re.findall(r"\[model 1 rank (\d)\].*skipped (\d+) updates.* from (.*)", output)
    assert sorted(rank for rank, _, _ in skipped) == ["0", "1"]
    assert len({(number, places) for _, number, places in skipped}) == 1
    assert "misaligned" not in output
    for model in range(2):
        mine = "".join(line for line in lines if line.startswith(f"[model {model} "))
        logs = json_logs(mine, "train_inner")
        assert logs[0]["codistill_peers"] == logs[-1]["codistill_peers"] == 1
        assert sum(log["codistill_peers"] < 1 for log in logs) < len(logs) / 2
