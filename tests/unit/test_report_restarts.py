"""What codistill-report says of trainings that crash, go on in another log, or go back to an earlier checkpoint."""

import json
import os

import live_runs
import pytest

from fairseq_codistill.report import runs
from fairseq_codistill.report.model import NLL, ModelLog
from fairseq_codistill.report.runs import find_runs
from fairseq_codistill.report.state import model_state
from fairseq_codistill.report.summary import summarise

NOW = 1.7e9
HOUR = 3600.0


def put(path, *parts, written=NOW):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(parts))
    os.utime(path, (written, written))


def only_model(folder):
    (run,) = find_runs(folder)
    (model,) = run.models
    return model


def figures(began, first, last, step_s=1.0):
    """A start, and records of training every 10 updates; the first is ``10 * step_s`` seconds after the start."""
    updates = range(first, last + 1, 10)
    lines = [live_runs.inner(began + step_s * (10 + update - first), 0, update) for update in updates]
    return live_runs.settings(began, 0, 2) + "".join(lines)


def crash(at):
    """What a process writes that dies of an exception."""
    name = "fairseq_codistill.coordinator.coordinator"
    summary = "codistillation: 900 updates, 450 exchanges, distilled on 450 of 450 batches due; met models [1]"
    text = "Traceback (most recent call last):\n  x\nRuntimeError: CUDA out of memory\n"
    text += live_runs.line(at, f"{summary}; lost 0, found 0", name=name)
    return text + live_runs.line(at, "codistillation: closed (its process ended); traffic: {}", name=name)


def stop(at):
    """What a process writes that is asked to end."""
    return live_runs.line(at, "codistillation: stopped by SIGTERM after update 900; saved x", "WARNING", "x.stopping")


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[launch] model 0 ended: exit code 1\n[launch] model 0 failed: exit code 1\n",
        "[launch] model 0 rank 0 ended: exit code 1\n[launch] model 0: rank 0 exit code 1; the other models go on\n",
    ],
    ids=["alone", "launcher", "launcher-rank"],
)
def test_a_crash_is_told_by_its_error_whatever_is_written_behind_it(tmp_path, said):
    put(tmp_path / "model-0.log", figures(NOW - 1000, 10, 900), crash(NOW - 60), said)
    state = model_state(only_model(tmp_path), NOW)
    assert (state.word, state.why) == ("failed", "RuntimeError: CUDA out of memory")


def test_what_another_rank_died_of_is_not_replaced_by_what_the_first_one_says_of_it(tmp_path):
    said = "[launch] model 0: rank 1 exit code 3; the other models go on without it\n"
    put(tmp_path / "model-0.log", figures(NOW - 1000, 10, 900), crash(NOW - 60), said)
    assert model_state(only_model(tmp_path), NOW).why == "rank 1 exit code 3"


@pytest.mark.parametrize("end", [stop, crash])
@pytest.mark.parametrize("waited", [HOUR, 48 * HOUR])
def test_a_requeued_training_is_live_while_its_last_submission_runs(tmp_path, end, waited):
    began = NOW - waited - 2 * HOUR
    put(tmp_path / "0/slurm-1.out", figures(began, 10, 900), end(began + 1000), written=began + 1000)
    put(tmp_path / "0/slurm-2.out", figures(NOW - 100, 910, 1000), written=NOW - 1)
    assert model_state(only_model(tmp_path), NOW).word == "live"


def test_of_several_submissions_the_last_one_tells_how_training_ended(tmp_path):
    for number, (ago, end) in enumerate([(9, stop), (6, stop), (3, crash)], start=1):
        at = NOW - ago * HOUR
        put(tmp_path / f"0/slurm-{number}.out", figures(at, 10, 1000 - 100 * number), end(at + 1000), written=at + 1000)
    assert model_state(only_model(tmp_path), NOW).word == "failed"
    at = NOW - HOUR
    done = live_runs.line(at + 200, "done training in 199.0 seconds", name="fairseq_cli.train")
    put(tmp_path / "0/slurm-4.out", figures(at, 910, 1000), done, written=at + 200)
    assert model_state(only_model(tmp_path), NOW).word == "finished"


def test_the_figures_of_every_submission_are_one_training_and_a_copy_of_one_adds_nothing(tmp_path):
    one_log = []
    for number, (first, last, end) in enumerate([(10, 300, stop), (310, 900, stop), (810, 1000, None)], start=1):
        began = NOW - (4 - number) * HOUR
        text = figures(began, first, last) + live_runs.valid(began + 900, 0, last) + (end(began + 1000) if end else "")
        one_log.append(text)
        put(tmp_path / f"many/0/slurm-{number}.out", text)
    put(tmp_path / "many/0/train.rank1.log", live_runs.line(NOW - 2 * HOUR, "codistillation: a word", "WARNING"))
    put(tmp_path / "one/0/train.log", *one_log)
    put(tmp_path / "one/0/copy-of-a-part.log", one_log[1], written=NOW - HOUR)
    many, one = (only_model(tmp_path / name) for name in ("many", "one"))
    assert len(many.files) == 4
    assert many.num_updates == 1000
    assert len(many.train) == 30 + 60 + 20
    # From where the third one went on, 810 at the latest, no record tells.
    assert many.sent_megabits()[1][-1] == pytest.approx(12.4 * (900 + 190))
    assert set(many.starts) == set(one.starts)
    for name in ("train", "valid", "settings", "num_parameters", "started", "last_seen", "ending"):
        assert getattr(many, name) == getattr(one, name), name
    assert [what for _, _, what in many.incidents if "a word" in what] == ["rank 1: a word"]


def test_the_epochs_of_every_submission_follow_those_before(tmp_path):
    texts = []
    for number, first in enumerate((1, 4)):
        began = NOW - (2 - number) * HOUR
        text = live_runs.settings(began, 0, 2)
        for epoch in range(first, first + 3):
            text += "".join(live_runs.inner(began + 100 * epoch + n, 0, 100 * (epoch - 1) + 30 * n) for n in (1, 2, 3))
            mean = {"train_codistill_mbit": "13", "train_num_updates": str(100 * epoch), "epoch": epoch}
            text += live_runs.line(began + 100 * epoch + 50, json.dumps(mean), name="train")
        texts.append(text)
        put(tmp_path / f"many/0/slurm-{number}.out", text)
    put(tmp_path / "one/0/train.log", *texts)
    many, one = (only_model(tmp_path / name) for name in ("many", "one"))
    assert many.epochs == one.epochs
    assert many.sent_megabits() == one.sent_megabits()
    assert many.sent_megabits()[1][-1] == pytest.approx(7800)


def test_a_requeued_training_of_several_ranks_is_live(tmp_path):
    for rank, name in enumerate(("slurm-{}.out", "slurm-{}.rank1.out")):
        ended, began = NOW - 2 * HOUR, NOW - 100
        joined = live_runs.line(began, f"initialized host a as rank {rank}", name="fairseq.distributed.utils")
        first = figures(ended - 1000, 10, 900) if rank == 0 else ""
        put(tmp_path / "0" / name.format(1), first, stop(ended), written=ended)
        put(tmp_path / "0" / name.format(2), joined, figures(began, 910, 950) if rank == 0 else "", written=NOW - 1)
    assert model_state(only_model(tmp_path), NOW).word == "live"


def test_a_log_of_labelled_lines_is_one_run_whatever_the_number_of_its_folder(tmp_path):
    plain = figures(NOW - 1000, 10, 900).splitlines(True)
    lines = [f"[model {model}] {line}" for model in (0, 1) for line in plain]
    for seed in (1, 2):
        put(tmp_path / f"seeds/{seed}/train.log", *lines)
    runs = find_runs(tmp_path)
    assert [(run.name, [model.index for model in run.models]) for run in runs] == [
        ("seeds/1", [0, 1]),
        ("seeds/2", [0, 1]),
    ]


def test_what_was_sent_never_decreases_though_records_are_rounded():
    log = ModelLog(0, NLL)
    log.train = [{"num_updates": 25.0 * n, "codistill_mbit": 0.013} for n in range(1, 33)]
    log.epochs = [(16, {"num_updates": 400.0, "codistill_mbit": 0.012})]
    sent = log.sent_megabits()[1]
    assert sent == sorted(sent)
    assert sent[16:18] == pytest.approx([5.2, 5.2])
    assert sent[-1] == pytest.approx(4.8 + 5.2)  # from the mean of the epoch on


def test_updates_are_those_of_the_checkpoint_that_training_went_back_to(tmp_path):
    before = figures(NOW - 5000, 10, 990) + live_runs.valid(NOW - 4200, 0, 800)
    put(tmp_path / "model-0.log", before, crash(NOW - 3900), figures(NOW - 100, 510, 530))
    (run,) = find_runs(tmp_path)
    assert run.models[0].num_updates == 530
    (summary,) = summarise(run, NOW)
    assert summary.sent_megabits_per_update == pytest.approx(12.4)  # of all that were made, some of them twice
    put(tmp_path / "model-0.log", before, crash(NOW - 3900), figures(NOW - 100, 510, 530), live_runs.valid(NOW, 0, 535))
    assert only_model(tmp_path).num_updates == 535


def test_updates_of_records_without_a_time_are_the_highest_of_the_last_ones():
    log = ModelLog(0, NLL)
    assert log.num_updates == 0
    log.train = [{"num_updates": 990.0}, {"num_updates": 530.0}]
    assert log.num_updates == 530
    log.valid = [{"num_updates": 540.0}]
    assert log.num_updates == 540


@pytest.mark.parametrize("end", [stop, lambda at: ""], ids=["stopped", "killed"])
def test_a_wait_to_be_started_again_does_not_keep_a_dead_run_alive(tmp_path, end):
    again = NOW - 3 * HOUR
    ended = again - 13 * HOUR
    text = figures(ended - 1000, 10, 900), end(ended), figures(again, 910, 1000)
    put(tmp_path / "model-0.log", *text, written=again + 100)
    assert model_state(only_model(tmp_path), NOW).word == "silent"


def test_a_wait_to_be_started_again_does_not_keep_a_dead_run_of_vision_alive(tmp_path):
    again = NOW - 3 * HOUR
    records = []
    for began, first in ((again - 13 * HOUR, 0), (again, 100)):
        records.append({"kind": "start", "time": began, "update": first})
        records += [{"kind": "train", "time": began + n, "update": first + n, "nll_loss": 1} for n in (10, 20, 30)]
    put(tmp_path / "0/log.jsonl", "".join(json.dumps(record) + "\n" for record in records), written=again + 30)
    assert model_state(only_model(tmp_path), NOW).word == "silent"


def test_a_slow_training_that_was_started_again_is_live(tmp_path):
    slow = figures(NOW - 40 * HOUR, 10, 60, step_s=180.0), figures(NOW - 4 * HOUR, 70, 130, step_s=180.0)
    put(tmp_path / "model-0.log", *slow, written=NOW - HOUR)
    assert model_state(only_model(tmp_path), NOW).word == "live"


def test_what_an_update_sends_is_its_mean_over_those_that_a_restart_made_again_too():
    model = ModelLog(0, NLL)
    first = [{"num_updates": float(update), "codistill_mbit": 2.0} for update in range(10, 1000, 10)]
    again = [{"num_updates": float(update), "codistill_mbit": 2.0} for update in range(510, 1010, 10)]
    model.train = [*first, *again]
    assert model.sent_megabits()[1][-1] > 2.0 * 1400
    assert model.sent_megabits_per_update == pytest.approx(2.0)


def test_a_traceback_ends_a_model_whatever_zone_its_stamps_are_read_in(tmp_path, monkeypatch):
    """Records have seconds since 1970, lines the time of some clock: which came first, nobody can say."""
    record = {"time": NOW, "update": 0, "options": {}, "parameters": 1, "world_size": 1, "classes": 10}
    put(tmp_path / "0/log.jsonl", json.dumps({"kind": "start"} | record) + "\n", written=NOW)
    put(tmp_path / "0/train.log", crash(NOW - 3600), written=NOW)
    assert only_model(tmp_path).ending.state == "failed"


def test_the_number_of_a_job_is_no_rank_however_the_log_is_named(tmp_path):
    """``--output %x.%j.out``."""
    began = NOW - 2 * HOUR
    put(tmp_path / "0/train.1001.out", figures(began, 10, 900), stop(began + 1000), written=began + 1000)
    done = live_runs.line(NOW - 50, "done training in 50.0 seconds", name="fairseq_cli.train")
    put(tmp_path / "0/train.1002.out", figures(NOW - 200, 910, 950), done)
    model = only_model(tmp_path)
    assert model_state(model, NOW).word == "finished"
    assert model.train[-1]["num_updates"] == 950
    assert len(model.train) == 95
    # A task that is not the first writes no figures.
    put(tmp_path / "0/train.1.log", live_runs.line(NOW - 60, "codistillation: a word", "WARNING"))
    assert any(what.startswith("rank 1: a word") for _, _, what in only_model(tmp_path).incidents)


def test_a_number_behind_a_dot_tells_runs_of_one_folder_apart(tmp_path):
    for number, text in enumerate([figures(NOW - 500, 10, 100), figures(NOW - 300, 10, 200)]):
        put(tmp_path / f"alpha0.{number}.log", text)
    assert [len(run.models[0].train) for run in find_runs(tmp_path)] == [10, 20]


def test_what_ended_stays_so_whatever_a_launcher_says_of_another_model(tmp_path):
    done = live_runs.line(NOW - 50, "done training in 50.0 seconds", name="fairseq_cli.train")
    put(tmp_path / "job.out", figures(NOW - 200, 10, 100), done, "[launch] job 12: two models\n")
    assert model_state(only_model(tmp_path), NOW).word == "finished"


def test_a_validation_now_and_then_keeps_no_dead_training_alive(tmp_path):
    began = NOW - 4 * HOUR
    lines = figures(began, 10, 700, step_s=10.0)  # two hours
    lines += "".join(live_runs.valid(began + share * HOUR, 0, 350 * share) for share in (1, 2))
    put(tmp_path / "model-0.log", lines, written=NOW - 2 * HOUR)
    assert model_state(only_model(tmp_path), NOW).word == "silent"


@pytest.mark.parametrize("asked", ["folder", "file"])
def test_a_log_that_cannot_be_read_hides_no_run_but_itself(tmp_path, monkeypatch, asked):
    put(tmp_path / "model-0.log", figures(NOW - 100, 10, 100))
    other = tmp_path / "other/nohup.out"
    put(other, "mine")
    read_log = runs.read_log

    def refuse(path):
        if path == other:
            raise PermissionError(13, "Permission denied", str(path))
        return read_log(path)

    monkeypatch.setattr(runs, "read_log", refuse)
    if asked == "folder":
        assert len(only_model(tmp_path).train) == 10
    else:
        with pytest.raises(PermissionError):
            find_runs(other)
