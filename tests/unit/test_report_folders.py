"""codistill-report where folders are linked, oddly named, or hold the logs of more than one training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import live_runs
import pytest

from fairseq_codistill.report import openmetrics, page, snapshots
from fairseq_codistill.report.runs import find_runs
from fairseq_codistill.report.state import DAY_S, model_state

NOW = 1.7e9


def fairseq_run(folder, nll=2.0, began=NOW, is_new=False, trained="1,000,000"):
    """Two models' logs, appended."""
    for model in (0, 1):
        path = folder / f"{model}/train.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = live_runs.settings(began, model, 2).replace("trained: 1,000,000", f"trained: {trained}")
        if is_new:
            found = "No existing checkpoint found checkpoints/checkpoint_last.pt"
            text += live_runs.line(began + 1, found, name="fairseq.trainer")
        text += live_runs.inner(began + 10, model, 100) + live_runs.valid(began + 20, model, 100)
        with path.open("a") as file:
            file.write(text.replace('"valid_nll_loss": "', f'"valid_nll_loss": "{nll:g}", "was": "'))


def vision_run(folder, top1, update=0, began=NOW):
    folder.mkdir(parents=True, exist_ok=True)
    start = {"kind": "start", "update": update, "time": began, "options": {}, "parameters": 10}
    valid = {"kind": "valid", "update": update + 100, "time": began + 10, "valid_top1": top1}
    with (folder / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in (start, valid))


def names(folder):
    return sorted(run.name for run in find_runs(folder))


def test_runs_behind_links_are_found_once_and_by_their_own_name(tmp_path):
    fairseq_run(tmp_path / "elsewhere/real")
    fairseq_run(tmp_path / "runs/z")
    (tmp_path / "runs/linked").symlink_to(tmp_path / "elsewhere/real")
    (tmp_path / "runs/a_latest").symlink_to("z")
    (tmp_path / "runs/z/0/loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs/nowhere").symlink_to("gone")
    (tmp_path / "runs/up").symlink_to("..")
    (tmp_path / "runs/z/0/test").mkdir()
    fairseq_run(tmp_path / "set/deep")
    (tmp_path / "runs/z/0/test/images").symlink_to(tmp_path / "set")
    assert names(tmp_path / "runs") == ["linked", "z"]


def test_a_second_training_in_a_folder_has_no_figures_of_the_first(tmp_path):
    fairseq_run(tmp_path / "text", nll=2.0)
    fairseq_run(tmp_path / "text", nll=5.0, began=NOW + 1000, is_new=True)
    vision_run(tmp_path / "images", 80.0)
    vision_run(tmp_path / "images", 40.0, began=NOW + 1000)
    runs = {run.name: run.models[0] for run in find_runs(tmp_path)}
    assert {name: model.best() for name, model in runs.items()} == {"images": 40.0, "text": 5.0}
    assert all(model.started >= NOW + 1000 for model in runs.values())


def test_one_that_its_launcher_starts_again_before_it_has_saved_is_the_same(tmp_path):
    """What it sent for the updates that it makes again counts again."""
    fairseq_run(tmp_path, nll=2.0, is_new=True)
    again = (
        "[launch] model 0: killed by SIGKILL; it is started again (0 restarts left)\n[launch] model 0: fairseq-train\n"
    )
    with (tmp_path / "0/train.log").open("a") as file:
        file.write(again)
    fairseq_run(tmp_path, nll=5.0, began=NOW + 1000, is_new=True)
    (tmp_path / "0/train.log").rename(tmp_path / "model-0.log")
    (tmp_path / "1/train.log").rename(tmp_path / "model-1.log")
    (run,) = find_runs(tmp_path)
    assert [model.best() for model in run.models] == [2.0, 5.0]  # of the other the launcher said nothing
    fairseq_run(tmp_path / "third", nll=7.0, began=NOW + 2000, is_new=True)
    with (tmp_path / "model-0.log").open("a") as file:  # a launch of its own, later
        file.write((tmp_path / "third/0/train.log").read_text())
    (run,) = [run for run in find_runs(tmp_path) if run.name != "third"]
    assert run.models[0].best() == 7.0


def test_a_second_training_has_neither_the_size_nor_the_warnings_of_the_first(tmp_path):
    for number, (trained, what) in enumerate((("1,000", "of the first"), ("9,000", "of the second"))):
        began = NOW + 1000 * number
        fairseq_run(tmp_path, began=began, is_new=True, trained=trained)
        with (tmp_path / "0/train.log").open("a") as file:
            file.write(live_runs.peer(began + 5, 0, "away", "present", what))
    (run,) = find_runs(tmp_path)
    assert [what for _, _, what in run.models[0].incidents if "second" in what]
    assert not [what for _, _, what in run.models[0].incidents if "first" in what]
    assert run.models[0].num_parameters == 9000


def test_one_that_goes_on_keeps_its_figures(tmp_path):
    fairseq_run(tmp_path / "text", nll=2.0, is_new=True)
    fairseq_run(tmp_path / "text", nll=5.0, began=NOW + 1000)
    vision_run(tmp_path / "images", 80.0)
    vision_run(tmp_path / "images", 40.0, update=100, began=NOW + 1000)
    best = {run.name: run.models[0].best() for run in find_runs(tmp_path)}
    assert best == {"images": 80.0, "text": 2.0}


def test_a_second_training_in_a_log_of_its_own_replaces_the_first(tmp_path):
    for number, (nll, is_new) in enumerate(((2.0, True), (5.0, True), (6.0, False))):
        fairseq_run(tmp_path / "part", nll, NOW + 1000 * number, is_new)
        for model in (0, 1):
            target = tmp_path / f"run/{model}/job-{number}.log"
            target.parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"part/{model}/train.log").rename(target)
    (run,) = find_runs(tmp_path / "run")
    assert [model.best() for model in run.models] == [5.0, 5.0]


def test_a_name_that_is_no_text_breaks_no_report(tmp_path, monkeypatch):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    fairseq_run(odd)
    fairseq_run(tmp_path / "sound")
    report = page.write_report(tmp_path, tmp_path / "out", now=NOW)
    text = report.files[0].read_text(encoding="utf-8")
    assert "caf�" in text
    assert "caf%E9/0/train.log" in text
    assert names(tmp_path) == ["caf�", "sound"]
    served = snapshots.read(tmp_path, 1.0, NOW)
    assert b"caf" in served.page
    assert "caf�" in served.metrics.decode()
    assert page.write_report(odd, odd / "out", now=NOW).summaries


@pytest.mark.parametrize("name", ["run#1", "what?", "a:b", "100%", "a b", "ü"])
def test_a_link_leads_to_the_log_whatever_its_folder_is_called(tmp_path, name):
    from html import unescape
    from urllib.parse import unquote, urljoin, urlsplit

    fairseq_run(tmp_path / name)
    out = tmp_path / name
    written = page.write_report(tmp_path, out, now=NOW).files[0].read_text(encoding="utf-8")
    link = unescape(written.split('<a href="')[1].split('"')[0])
    target = urlsplit(urljoin((out / "report.html").as_uri(), link))
    assert (target.scheme, target.query, target.fragment) == ("file", "", "")
    assert Path(unquote(target.path)) == out / "0/train.log"


def test_no_two_runs_have_one_name(tmp_path):
    fairseq_run(tmp_path / "twice")
    fairseq_run(tmp_path / "twice/twice")
    assert names(tmp_path / "twice") == [".", "twice"]
    content = snapshots.read(tmp_path / "twice", 1.0, NOW).content
    lines = [line.rpartition(" ")[0] for line in openmetrics.exposition(content.standings, NOW).splitlines()]
    samples = [line for line in lines if "{" in line]
    assert len(samples) == len(set(samples))


def test_one_odd_record_hides_no_run(tmp_path):
    vision_run(tmp_path / "sound", 80.0)
    odd = [
        {"kind": "start", "update": 0, "options": None, "parameters": None, "world_size": None},
        {"kind": "start", "update": 0, "options": 3},
        {"kind": "valid", "update": 1e999},
        {"kind": "skip", "update": 1, "skipped": None},
        [1],
        None,
    ]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in odd))
    assert "sound" in names(tmp_path)


def test_one_that_is_started_again_days_later_is_live_before_its_first_stamp(tmp_path):
    fairseq_run(tmp_path, began=NOW - 3 * DAY_S)
    for model in (0, 1):
        log = tmp_path / f"model-{model}.log"
        (tmp_path / f"{model}/train.log").rename(log)
        with log.open("a") as file:
            file.write(f"[launch] model {model} ended: exit code 0\n[launch] model {model}: fairseq-train x\n")
        os.utime(log, (NOW, NOW))
    (run,) = find_runs(tmp_path)
    assert {model_state(model, NOW + 60).word for model in run.models} == {"live"}
    assert {model_state(model, NOW + DAY_S).word for model in run.models} == {"silent"}


def test_a_run_with_fewer_models_in_the_folder_of_one_that_failed_is_not_failed_for_ever(tmp_path):
    """Three models fail at their start, then two are trained there."""
    for model in range(3):
        text = live_runs.settings(NOW - 900, model, 3) + live_runs.inner(NOW - 890, model, 1)
        text += "Traceback (most recent call last):\nRuntimeError: boom\n"
        if model < 2:
            text += live_runs.settings(NOW - 100, model, 2) + live_runs.valid(NOW - 50, model, 100)
            text += live_runs.line(NOW - 40, "done training in 60.0 seconds")
        (tmp_path / f"{model}").mkdir()
        (tmp_path / f"{model}/train.log").write_text(text)
    (run,) = find_runs(tmp_path)
    assert [(model.index, model_state(model, NOW).word) for model in run.models] == [(0, "finished"), (1, "finished")]


def test_a_reader_of_the_terminal_that_goes_away_is_no_error(tmp_path):
    live_runs.make_run(tmp_path)
    command = [sys.executable, "-m", "fairseq_codistill.report.status", str(tmp_path), "--watch", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) in (0, 1)
