"""Signals to real fairseq runs: each saves after the update at hand and goes on from there, bit for bit."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import codistill_command, environment, free_ports, gloo_ranks, json_logs, spawning, start
from launching import wait_until_gone

from fairseq_codistill.fairseq_side import compat

SECONDS = 240
FIGURES = ("loss", "nll_loss", "gnorm", "lr", "num_updates", "codistill_peers")


class Run:
    """Processes of one model that train, with what they have written so far."""

    def __init__(self, commands, has_workers):
        self.files = [tempfile.NamedTemporaryFile() for _ in commands]  # noqa: SIM115 - read while they run
        # A process forked by a server would have the server fork its loader workers too.
        run = start_anew if has_workers else start
        self.processes = [run(command, file.name) for command, file in zip(commands, self.files, strict=True)]

    @property
    def output(self):
        return "\n".join(Path(file.name).read_text() for file in self.files)

    def wait_for(self, text):
        deadline = time.monotonic() + SECONDS
        while text not in self.output:
            assert any(process.poll() is None for process in self.processes), self.output[-5000:]
            assert time.monotonic() < deadline, self.output[-5000:]
            time.sleep(0.01)

    def finish(self):
        return [process.wait(SECONDS) for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


def start_anew(command, output):
    with open(output, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment())


@pytest.fixture
def train(toy_data):
    """Starts one model of two, whose peer never comes: what it trains does not depend on when it is stopped."""
    runs = []

    def start_run(folder, *extra, world_size=1, spawned=False):
        where = ",".join(f"127.0.0.1:{port}" for port in free_ports(2, world_size))
        command = codistill_command(
            toy_data, folder, 0, where, "--seed", "1", "--dropout", "0.1", "--codistill-start-timeout", "0.1",
            "--codistill-require-peers", "never", "--no-epoch-checkpoints", *extra,
        )  # fmt: skip
        commands = [command] if world_size == 1 else gloo_ranks(command, world_size, free_ports(1)[0])
        if spawned:
            commands = [spawning(command, free_ports(1)[0])]
        runs.append(Run(commands, spawned or "--num-workers" in extra))
        return runs[-1]

    yield start_run
    for run in runs:
        run.kill()


def children_of(pids):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) in pids and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def checkpoint(folder):
    compat.apply()
    return torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=True)


def check_that_it_goes_on(train, tmp_path, stopped_output, *extra, **settings):
    """Stopped, and 6 more updates: the same as never stopped; the last update before was logged and saved."""
    before = json_logs(stopped_output, "train_inner")
    num_updates = int(before[-1]["num_updates"])
    saved = checkpoint(tmp_path / "stopped")
    assert saved["optimizer_history"][-1]["num_updates"] == num_updates
    assert not list((tmp_path / "stopped").glob("*.tmp"))
    last = ["--max-update", str(num_updates + 6), "--disable-validation", *extra]
    resumed = train(tmp_path / "stopped", *last, **settings)
    straight = train(tmp_path / "straight", *last, **settings)
    assert set(resumed.finish() + straight.finish()) == {0}, resumed.output[-3000:] + "=====" + straight.output[-3000:]
    after = json_logs(resumed.output, "train_inner")
    expected = json_logs(straight.output, "train_inner")
    assert len(after) == 6
    for one, other in zip(expected[-6:], after, strict=True):
        assert [one[name] for name in FIGURES] == [other[name] for name in FIGURES]
    found, wanted = checkpoint(tmp_path / "stopped")["model"], checkpoint(tmp_path / "straight")["model"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_training_and_workers_alike_saves_what_was_trained(train, tmp_path, number):
    run = train(tmp_path / "stopped", "--num-workers", "2", "--max-tokens", "20", "--max-epoch", "1000")
    run.wait_for('"num_updates": "5"')
    leader = run.processes[0].pid
    workers = children_of([leader])
    assert len(workers) >= 2
    for pid in [*workers, leader, *workers]:
        os.kill(pid, number)
    assert run.finish() == [128 + number], run.output[-5000:]
    assert "stopped by " + signal.Signals(number).name in run.output
    assert "Traceback" not in run.output
    wait_until_gone(workers)
    check_that_it_goes_on(train, tmp_path, run.output, "--max-tokens", "20")


def test_ranks_of_a_model_stop_after_the_same_update(train, tmp_path):
    run = train(tmp_path / "stopped", "--max-epoch", "1000", world_size=2)
    run.wait_for('"num_updates": "5"')
    run.processes[1].send_signal(signal.SIGTERM)  # to one of them alone
    assert run.finish() == [143, 143], run.output[-5000:]
    check_that_it_goes_on(train, tmp_path, run.output, world_size=2)


def test_a_signal_during_a_validation_does_not_wait_for_its_end(train, tmp_path):
    run = train(
        tmp_path / "stopped", "--max-epoch", "1000", "--validate-interval-updates", "7", "--valid-subset",
        "valid,test,valid,test,valid,test,valid,test",
        "--batch-size-valid", "1",
    )  # fmt: skip
    run.wait_for('begin validation on "valid" subset')
    run.processes[0].send_signal(signal.SIGTERM)
    assert run.finish() == [143], run.output[-5000:]
    assert len(json_logs(run.output, "valid")) + len(json_logs(run.output, "test")) < 8
    check_that_it_goes_on(train, tmp_path, run.output)


def test_a_signal_before_the_first_update_ends_the_process_at_once(train, tmp_path):
    run = train(tmp_path, "--codistill-start-timeout", "100000")
    run.wait_for("begin dry-run validation")
    while not run.processes[0].poll():
        run.processes[0].send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert run.finish()[0] in (143, -signal.SIGTERM)
    assert not (tmp_path / "checkpoint_last.pt").exists()


def test_a_signal_at_any_moment_loses_no_update(train, tmp_path):
    """Also across epochs, validations and fairseq's own checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    half = folder / "checkpoint_1_2.pt.tmp"  # of a process that was killed while it saved
    half.write_bytes(b"half")
    last = 0
    for delay_s in (0.0, 0.05, 0.1):
        run = train(folder, "--max-epoch", "1000", "--save-interval-updates", "4", "--keep-interval-updates", "1")
        run.wait_for(f'"num_updates": "{last + 3}"')
        time.sleep(delay_s)
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.finish() == [143], run.output[-5000:]
        assert not half.exists()
        logged = [int(log["num_updates"]) for log in json_logs(run.output, "train_inner")]
        assert logged == list(range(last + 1, logged[-1] + 1))
        last = logged[-1]
        assert checkpoint(folder)["optimizer_history"][-1]["num_updates"] == last


@pytest.mark.slow
def test_the_parent_of_spawned_ranks_passes_a_signal_on_and_waits_until_they_saved(train, tmp_path):
    run = train(tmp_path / "stopped", "--max-epoch", "1000", world_size=2, spawned=True)
    run.wait_for('"num_updates": "5"')
    parent = run.processes[0].pid
    ranks = children_of([parent])
    for pid in [*ranks, parent]:  # as a scheduler does; the parent passes it on once more
        os.kill(pid, signal.SIGTERM)
    assert run.finish() == [143], run.output[-5000:]
    assert "Traceback" not in run.output
    wait_until_gone(ranks)
    check_that_it_goes_on(train, tmp_path, run.output, world_size=2)
