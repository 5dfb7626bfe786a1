"""The campaign of the test of the claim: which runs go beside each other, and what is left of one that ends badly."""

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/claim"))
import grid
import run as claim

# Begins and ends by the clock of the machine in a file, says when it is told to stop; fails as often as it is told.
PROGRAM = """
import signal, sys, time
from pathlib import Path
folder, failures = Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", file=log), sys.exit(1)))
log = (folder / "times").open("a", buffering=1)
(folder / "attempts").open("a").write("x")
print(time.time(), file=log)
time.sleep(float(sys.argv[3]))
if len((folder / "attempts").read_text()) <= failures:
    sys.exit(3)
print(time.time(), file=log)
(folder / "done").touch()
"""


class Kind:
    """How an arm is trained: by a program that only takes its time.

    Args:
        failures: arm -> attempts that fail.
        seconds: that every run takes.
    """

    def __init__(self, failures=None, seconds=0.8):
        self.failures, self.seconds = failures or {}, seconds

    def command(self, run, data, folder, devices):
        return [sys.executable, "-S", "-c", PROGRAM, str(folder), str(self.failures.get(run.arm, 0)), str(self.seconds)]

    def state(self, run, folder, exit_code):
        return "complete" if exit_code == 0 and (folder / "done").exists() else "failed"

    def row(self, run, data, folder):
        return {"held_out": {"top1": 1.0, "nll": 1.0}}


def run_of(arm, seed=1):
    return grid.Run("a", "final", arm, seed, 0, 0.1, "wd5e-4")


@pytest.fixture
def campaign(tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def make(runs, processes, kind):
        def pending(rows, order):
            done = [grid.run_of(row) for row in rows]
            return (run for run in runs if run not in done)

        monkeypatch.setattr(claim, "pending", pending)
        monkeypatch.setattr(claim, "kind_of", lambda run: kind)
        monkeypatch.setattr(claim, "POLL_S", 0.02)
        return claim.Campaign(tmp_path, tmp_path, "claim", [], processes)

    yield make
    for number, handler in before.items():
        signal.signal(number, handler)


def times_of(folder, runs):
    return [[float(line) for line in (folder / run.name / "times").read_text().split()] for run in runs]


def test_runs_go_beside_each_other_as_far_as_they_fit_and_in_their_order(campaign, tmp_path):
    runs = [run_of("plain", 1), run_of("plain", 2), run_of("plain", 3), run_of("kl"), run_of("all_reduce")]
    campaign(runs, 2, Kind()).go_on()
    first, second, third, pair, last = times_of(tmp_path, runs)
    assert second[0] < first[1]
    assert third[0] >= min(first[1], second[1])
    assert pair[0] >= max(first[1], second[1], third[1])
    assert last[0] >= pair[1]
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {grid.run_of(row) for row in rows} == set(runs)


def test_by_default_one_run_goes_at_a_time_whatever_it_needs(campaign, tmp_path):
    runs = [run_of("plain"), run_of("kl_4"), run_of("all_reduce")]
    campaign(runs, 1, Kind(seconds=0.2)).go_on()
    first, second, third = times_of(tmp_path, runs)
    assert first[1] <= second[0]
    assert second[1] <= third[0]


def test_a_run_that_fails_is_started_again_while_another_goes_on(campaign, tmp_path, capsys):
    campaign([run_of("plain"), run_of("all_reduce")], 2, Kind({"plain": 2}, 0.1)).go_on()
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().out.count("ended with exit code 3") == 2


def test_a_run_that_fails_for_good_ends_the_campaign_and_what_goes_beside_it_is_stopped(campaign, tmp_path):
    class Slow(Kind):
        def command(self, run, data, folder, devices):
            self.seconds = 60 if run.arm == "all_reduce" else 0.1
            return super().command(run, data, folder, devices)

    began = time.monotonic()
    with pytest.raises(SystemExit, match="plain.* failed 3 times"):
        campaign([run_of("plain"), run_of("all_reduce")], 2, Slow({"plain": 9})).go_on()
    assert time.monotonic() - began < 30
    assert "stopped" in (tmp_path / run_of("all_reduce").name / "times").read_text()
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_campaign_that_is_told_to_stop_stops_every_run_and_goes_on_with_them(campaign, tmp_path):
    runs = [run_of("plain"), run_of("all_reduce"), run_of("mse")]

    def stop_when_both_go():
        while not all((tmp_path / run.name / "times").exists() for run in runs[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_both_go)
    going = campaign(runs, 2, Kind(seconds=60))
    thread.start()
    going.go_on()
    thread.join()
    for run in runs[:2]:
        assert "stopped" in (tmp_path / run.name / "times").read_text()
    assert not (tmp_path / runs[2].name).exists()
    assert not (tmp_path / "runs.jsonl").exists()

    campaign(runs, 2, Kind(seconds=0.1)).go_on()
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3


def test_a_run_that_diverged_is_a_row_without_figures_and_the_campaign_goes_on(campaign, tmp_path, capsys):
    class Diverges(Kind):
        def state(self, run, folder, exit_code):
            return "diverged" if exit_code else super().state(run, folder, exit_code)

    runs = [run_of("plain"), run_of("all_reduce")]
    campaign(runs, 2, Diverges({"plain": 9}, 0.1)).go_on()
    rows = {row["arm"]: row for row in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())}
    assert rows["plain"]["held_out"] == rows["plain"]["test"] == {"top1": None, "nll": None, "ece": None}
    assert grid.goodness(rows["plain"], "nll", "test") == -float("inf")
    assert rows["all_reduce"]["held_out"]["top1"] == 1.0
    assert (tmp_path / runs[0].name / "attempts").read_text() == "x"


class GoesOn(Kind):
    """Its runs are to be started some times, as what is trained for as long as it gets better is."""

    def state(self, run, folder, exit_code):
        enough = len((folder / "attempts").read_text()) > 2 * claim.ATTEMPTS
        return "complete" if enough else "goes on"


def test_a_run_that_is_to_go_on_is_started_again_without_a_word(campaign, tmp_path, capsys):
    class Further(GoesOn):
        def command(self, run, data, folder, devices):
            attempts = folder / "attempts"
            goal = len(attempts.read_text()) if attempts.exists() else 0
            return [*super().command(run, data, folder, devices), str(goal)]

    campaign([run_of("plain")], 1, Further(seconds=0.01)).go_on()
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
    assert "exit code" not in capsys.readouterr().out


def test_a_run_that_is_to_go_on_but_does_not_ends_the_campaign(campaign, tmp_path, capsys):
    """Such as one whose log lacks its last epoch."""
    with pytest.raises(SystemExit, match=f"failed {claim.ATTEMPTS} times"):
        campaign([run_of("plain")], 1, GoesOn(seconds=0.01)).go_on()
    assert capsys.readouterr().out.count("exit code 0") == claim.ATTEMPTS


def test_a_run_that_cannot_be_evaluated_is_named(campaign, tmp_path, capsys):
    class Broken(Kind):
        def row(self, run, data, folder):
            raise RuntimeError("no checkpoint")

    with pytest.raises(RuntimeError, match="no checkpoint"):
        campaign([run_of("plain")], 1, Broken(seconds=0.01)).go_on()
    assert "trained, but cannot be evaluated" in capsys.readouterr().out
    assert not (tmp_path / "runs.jsonl").exists()


def test_half_a_row_goes_and_the_rows_before_it_are_not_written_again(campaign, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"a": "é"}\n{"b": 2}\n{"c"', encoding="utf-8")
    before = path.stat().st_ino
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limit[1]))  # nothing can be written behind five bytes
    try:
        assert campaign([], 1, Kind()).rows() == [{"a": "é"}, {"b": 2}]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text(encoding="utf-8") == '{"a": "é"}\n{"b": 2}\n'
    assert path.stat().st_ino == before


def test_seconds_that_a_full_disk_cut_off_count_as_none(tmp_path):
    (tmp_path / "seconds").write_text("")
    assert claim._trained_s(tmp_path) == 0
    training = claim.Training(run_of("plain"), tmp_path / "gone" / "file", None, time.monotonic() - 7)
    (tmp_path / "gone").write_text("a folder cannot be made here")
    claim._keep_time(training)
    training.folder = tmp_path
    claim._keep_time(training)
    assert claim._trained_s(tmp_path) == pytest.approx(7, abs=2)


def test_a_row_has_a_commit_only_where_the_folder_is_a_repository_and_git_is_there(monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    assert len(claim.commit_of(root)) == (40 if (root / ".git").exists() else 0)
    (tmp_path / "inside").mkdir()
    (tmp_path / ".git").mkdir()
    assert claim.commit_of(tmp_path / "inside") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert claim.commit_of(tmp_path) == ""
