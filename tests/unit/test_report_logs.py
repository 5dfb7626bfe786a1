"""codistill-report finds every model of every run, in whatever way its log lies there and was written.

``tests/data/logs`` holds excerpts of short real runs: of fairseq 0.12 with two models under codistill-launch in each
``--log-format``, on a terminal, with two ranks a model, with model 1 killed; of codistill-vision with two models.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from fairseq_codistill.report import runlog
from fairseq_codistill.report.model import Ending
from fairseq_codistill.report.reading import read_log
from fairseq_codistill.report.runs import find_runs
from fairseq_codistill.report.state import DAY_S, model_state, run_state

LOGS = Path(__file__).parents[1] / "data/logs"
STAMP = "2024-01-01 00:00:00 | INFO | "
BEST = [7.203, 7.288]  # validation NLL of the two models, the same in json and simple
LABEL = re.compile(r"^\[model (\d+)(?: rank (\d+))?\] ", re.MULTILINE)


def split(source, write):
    """The lines of each model and rank of a labelled log, without their labels: ``write(model, rank, text)``."""
    parts = {}
    for line in (LOGS / source).read_text().splitlines():
        if match := LABEL.match(line):
            key = int(match.group(1)), int(match.group(2) or 0)
            parts.setdefault(key, []).append(line[match.end() :])
    for (model, rank), lines in parts.items():
        write(model, rank, "\n".join(lines) + "\n")


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def only_run(folder):
    (run,) = find_runs(folder)
    return run


def test_json_lines_become_figures_without_the_prefix_of_their_kind():
    kind, record = runlog.parse_line(f'{STAMP}valid | {{"epoch": 3, "valid_nll_loss": "1.25", "valid_best": null}}\n')
    assert kind == "valid"
    assert record == {"epoch": 3.0, "nll_loss": 1.25}


def test_simple_lines_become_the_same_figures_as_json_lines():
    found = {name: read_log(LOGS / f"{name}.log")[1, 0] for name in ("json", "simple")}
    for kind in ("train", "valid"):
        of_json, of_simple = getattr(found["json"], kind), getattr(found["simple"], kind)
        assert len(of_json) == len(of_simple) > 1
        for one, other in zip(of_json, of_simple, strict=True):
            assert one["nll_loss"] == other["nll_loss"]
            assert one["num_updates"] == other["num_updates"]
    assert {"lr", "wps", "codistill_mbit", "time"} <= set(found["simple"].train[0])
    assert found["json"].sent_megabits()[1][-1] == found["simple"].sent_megabits()[1][-1]


@pytest.mark.parametrize(
    "line", ["", f"{STAMP}train | done", f'{STAMP}train | {{"epoch": 1', "valid | {}", f"{STAMP}epoch 001 | loss 3"]
)
def test_other_lines_are_no_figures(line):
    assert runlog.parse_line(line) is None


@pytest.mark.parametrize("source", ["json.log", "simple.log"])
@pytest.mark.parametrize("name", ["{}/train.log", "model-{}.log", "model{}/train.log", "model-{}/stdout.log"])
def test_a_folder_or_a_file_a_model_is_one_run(tmp_path, source, name):
    split(source, lambda model, rank, text: put(tmp_path / "run" / name.format(model), text))
    for folder in (tmp_path, tmp_path / "run"):
        run = only_run(folder)
        assert run.name == "run"
        assert [model.index for model in run.models] == [0, 1]
        assert [model.best() for model in run.models] == BEST
        assert [model.num_parameters for model in run.models] == [24640, 24640]
        assert run.models[1].settings["codistill_codec"] == "fp16"


def test_folders_with_names_are_told_apart_by_the_settings_in_their_logs(tmp_path):
    names = ["small", "large"]
    split("json.log", lambda model, rank, text: put(tmp_path / names[model] / "train.log", text))
    run = only_run(tmp_path)
    assert [model.label for model in run.models] == ["0 (small)", "1 (large)"]
    assert [model.best() for model in run.models] == BEST


def test_a_models_own_folder_is_a_run_of_one(tmp_path):
    split("json.log", lambda model, rank, text: put(tmp_path / str(model) / "train.log", text))
    run = only_run(tmp_path / "1")
    assert [model.best() for model in run.models] == BEST[1:]


@pytest.mark.parametrize("source", ["json.log", "simple.log"])
def test_a_folder_with_one_file_of_labelled_lines_is_a_run(tmp_path, source):
    shutil.copy(LOGS / source, tmp_path / "launch.out")
    assert [model.best() for model in only_run(tmp_path).models] == BEST


@pytest.mark.parametrize("source", ["json.log", "simple.log"])
def test_one_file_may_be_asked_for_whatever_its_name(tmp_path, source):
    shutil.copy(LOGS / source, tmp_path / "notes.txt")
    run = only_run(tmp_path / "notes.txt")
    assert run.name == "notes.txt"
    assert [model.best() for model in run.models] == BEST


def test_labels_may_stand_in_a_models_own_file(tmp_path):
    lines = (LOGS / "json.log").read_text().splitlines()
    for model in (0, 1):
        put(tmp_path / f"model-{model}.log", "\n".join(line for line in lines if line.startswith(f"[model {model}]")))
    assert [model.best() for model in only_run(tmp_path).models] == BEST


@pytest.mark.parametrize(
    "name", [None, "model-{}.rank{}.log", "{}/train.rank{}.log", "model{}/train.{}.log", "model_{}_rank_{}.log"]
)
def test_ranks_are_one_model(tmp_path, name):
    if name is None:
        shutil.copy(LOGS / "rank.log", tmp_path / "all.log")
    else:
        split("rank.log", lambda model, rank, text: put(tmp_path / name.format(model, rank), text))
    run = only_run(tmp_path)
    assert [model.best() for model in run.models] == [7.889, 7.985]
    assert {model.world_size for model in run.models} == {2}


def test_a_terminals_progress_bar_leaves_the_figures_of_epochs():
    (log,) = read_log(LOGS / "tty.log").values()
    assert [record["num_updates"] for record in log.train] == [31, 62]
    assert log.best() == 6.56
    assert log.ending == Ending("finished")


def test_several_labelled_files_in_a_folder_are_runs_of_their_own(tmp_path):
    for source in ("json.log", "simple.log", "rank.log"):
        shutil.copy(LOGS / source, tmp_path)
    assert [run.name for run in find_runs(tmp_path)] == ["json", "rank", "simple"]


def test_a_copy_of_the_same_lines_adds_no_model(tmp_path):
    split("json.log", lambda model, rank, text: put(tmp_path / f"model-{model}.log", text))
    split("json.log", lambda model, rank, text: put(tmp_path / str(model) / "train.log", text))
    shutil.copy(LOGS / "json.log", tmp_path / "tee.log")
    run = only_run(tmp_path)
    assert [model.best() for model in run.models] == BEST
    assert [len(model.incidents) for model in run.models] == [1, 1]
    assert len(run.models[0].files) == 3


def test_the_launchers_log_adds_to_that_of_vision_what_it_alone_says(tmp_path):
    for model in (0, 1):
        put(tmp_path / str(model) / "log.jsonl", (LOGS / f"vision-{model}.jsonl").read_text())
    split("vision.log", lambda model, rank, text: put(tmp_path / f"model-{model}.log", text))
    run = only_run(tmp_path)
    assert [round(model.best(), 2) for model in run.models] == [8.06, 12.5]
    assert [model.num_updates for model in run.models] == [12, 12]
    assert "model 1 is present" in run.models[0].incidents[0][2]
    assert all(model.ending == Ending("finished") for model in run.models)
    assert {"lr", "images_per_s", "time"} <= set(run.models[0].train[0])


def test_other_files_called_log_are_no_runs(tmp_path):
    split("json.log", lambda model, rank, text: put(tmp_path / f"model-{model}.log", text))
    put(tmp_path / "preprocess.log", f"{STAMP}fairseq_cli.preprocess | done\n")
    put(tmp_path / "7/other.log", "Traceback (most recent call last):\nValueError: 3\n")
    assert len(find_runs(tmp_path)) == 1


def test_what_lies_beside_a_models_log_without_figures_is_not_its_log(tmp_path):
    split("json.log", lambda model, rank, text: put(tmp_path / str(model) / "train.log", text))
    put(tmp_path / "0/bleu.gen.log", "Traceback (most recent call last):\nValueError: 3\n")
    assert [file.name for file in only_run(tmp_path).models[0].files] == ["train.log"]


def test_a_model_that_was_killed_failed_and_its_peer_finished():
    run = only_run(LOGS / "killed.log")
    survivor, killed = run.models
    assert survivor.ending == Ending("finished")
    assert killed.ending == Ending("failed", "killed by SIGKILL")
    assert [what for _, _, what in killed.incidents if "SIGKILL" in what] == [
        "killed by SIGKILL; the other models go on without it"
    ]
    assert any("model 1 is away (was present)" in what for _, _, what in survivor.incidents)
    state = run_state(run.models, time.time())
    assert state.word == "failed"
    assert "model 1 has failed: killed by SIGKILL" in state.why


def cut(tmp_path, text, age=0.0, now=None):
    """A log that ends after its first validation, with ``text`` behind it; it grew ``age`` seconds ago."""
    now = time.time() if now is None else now
    lines = (LOGS / "simple.log").read_text().splitlines()
    mine = [LABEL.sub("", line) for line in lines if line.startswith("[model 0]")]
    stop = next(i for i, line in enumerate(mine) if "| valid |" in line) + 1
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now - age))
    mine = [re.sub(r"^\d{4}-\S+ \S+", stamp, line) for line in mine[:stop]]
    log = tmp_path / "model-0.log"
    put(log, "\n".join(mine) + "\n" + text)
    os.utime(log, (now - age, now - age))
    return only_run(tmp_path).models[0]


TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    raise E\nmine.OddError: 3 of 4\n'
STOPPED_BY = (
    f"{STAMP.replace('INFO', 'WARNING')}x.stopping | codistillation: stopped by SIGTERM after update 7; saved x\n"
)
CLOSED = f"{STAMP}x | codistillation: 9 updates, 4 exchanges, distilled on 4 of 4 batches due; met models [1]\n"
CLOSED += f"{STAMP}x | codistillation: closed (its process ended); traffic: {{}}\n"
STARTED = "[launch] model 0 rank 0: A=1 python x.py\n"
FAILED = "[launch] model 0: rank 1 exit code 3; the other models go on without it\n"
NOW = 1.7e9


@pytest.mark.parametrize(
    ("text", "age", "word", "why"),
    [
        ("", 60, "live", ""),
        ("", 3600, "silent", "its log breaks off at"),
        (TRACEBACK, 60, "failed", "mine.OddError: 3 of 4"),
        (TRACEBACK, 3600, "failed", "mine.OddError: 3 of 4"),
        (TRACEBACK + CLOSED, 60, "failed", "mine.OddError: 3 of 4"),
        (TRACEBACK + f"{STAMP}fairseq.trainer | begin training epoch 2\n", 60, "live", ""),
        ("Traceback (most recent call last):\nKeyboardInterrupt\n", 60, "stopped", "KeyboardInterrupt"),
        ("fairseq-train: error: argument --lr: invalid\n", 60, "failed", "argument --lr: invalid"),
        (f"{STAMP}fairseq_cli.train | done training in 0.9 seconds\n", 3600, "finished", ""),
        ("[launch] model 0: rank 1 exit code 3; the other models go on without it\n", 60, "failed", "exit code 3"),
        ("[launch] model 0: exit code 3; it is started again (2 restarts left)\n", 60, "live", ""),
        ("[launch] model 0 ended: exit code 143\n", 60, "stopped", "SIGTERM"),
        ("[launch] model 0 rank 1 ended: exit code 130\n", 60, "stopped", "SIGINT"),
        ("[launch] model 0: exit code 143; the other models go on without it\n", 60, "stopped", "SIGTERM"),
        ("[launch] model 0 failed: exit code 143\n", 60, "stopped", "SIGTERM"),
        ("[launch] model 0: exit code 143; it is started again (2 restarts left)\n", 60, "live", ""),
        ("[launch] model 0 ended: exit code 0\n", 60, "live", ""),
        ("[launch] model 0 ended: killed by SIGKILL\n", 60, "failed", "killed by SIGKILL"),
        ("[launch] model 0 rank 1 ended: exit code 1\n", 60, "failed", "exit code 1"),
        (
            "[launch] model 0 ended: exit code 143\n[launch] model 0 rank 1: exit code 1, so what it did since its "
            "last checkpoint may be lost\n[launch] model 0: [Errno 28] No space left: its log in --log-dir ends here\n",
            60,
            "stopped",
            "SIGTERM",
        ),
        (f"{FAILED}[launch] model 0 rank 0 ended: exit code 143\n", 60, "failed", "exit code 3"),
        (f"[launch] model 0 ended: exit code 143\n{STARTED}", 60, "live", ""),
        (
            "[launch] model 0: exit code 3; it is started again (1 restarts left)\n"
            f"[launch] model 0 rank 1 ended: exit code 143\n{STARTED}",
            60,
            "live",
            "",
        ),
        (STOPPED_BY, 60, "stopped", "SIGTERM"),
        (f"{STOPPED_BY}srun: error: node1: task 0: Exited with exit code 143\n", 60, "stopped", "SIGTERM"),
        (f"{STAMP}x | done training in 0.9 seconds\nwandb: error: upload failed\n", 3600, "finished", ""),
    ],
)
def test_a_training_is_live_until_its_log_says_otherwise_or_falls_silent(tmp_path, text, age, word, why):
    state = model_state(cut(tmp_path, text, age, NOW), NOW)
    assert state.word == word
    assert why in state.why


def test_a_failure_is_one_incident_however_often_the_launcher_says_it(tmp_path):
    said = "[launch] model 0: killed by SIGKILL; the other models go on without it\n"
    text = f"[launch] model 0 ended: killed by SIGKILL\n{said}[launch] model 0 failed: killed by SIGKILL\n"
    log = cut(tmp_path, text, 60, NOW)
    assert [what for _, _, what in log.incidents if "SIGKILL" in what] == [said[18:-1]]
    assert model_state(log, NOW).why == "killed by SIGKILL"


@pytest.mark.parametrize("end", ["exit code 143", "exit code 1", "killed by SIGKILL"])
def test_a_run_that_was_started_again_is_live_whatever_its_launcher_said_of_the_last_time(tmp_path, end):
    """One device a model: no line of the model has a label, and only the launcher says which it is."""
    cut(tmp_path, "", 60, NOW)
    log = tmp_path / "model-0.log"
    figures = log.read_text()
    start = "[launch] model 0: codistill-vision --seed 1\n"
    put(log, f"{start}{figures}[launch] model 0 ended: {end}\n{start}{figures}")
    os.utime(log, (NOW - 60, NOW - 60))
    (model,) = only_run(tmp_path).models
    assert model_state(model, NOW).word == "live"
    assert len(model.valid) == 2


def test_a_word_of_the_launcher_does_not_hide_what_a_model_says_of_its_peers(tmp_path):
    """The figures of vision are in another file, so that the launcher's has incidents alone."""
    put(tmp_path / "0/log.jsonl", (LOGS / "vision-0.jsonl").read_text())
    away = f"{STAMP.replace('INFO', 'WARNING')}x | codistillation: model 1 is away (was present): nothing came\n"
    put(tmp_path / "model-0.log", f"{away}[launch] model 0: exit code 3; it is started again (1 restarts left)\n")
    said = [what for _, _, what in only_run(tmp_path).models[0].incidents]
    assert any(what.startswith("model 1 is away") for what in said)
    assert any("it is started again" in what for what in said)


def test_what_a_job_of_slurm_wrote_each_time_it_was_submitted_is_no_run_of_its_own(tmp_path):
    cut(tmp_path, "", 60, NOW)
    figures = (tmp_path / "model-0.log").read_text()
    labelled = "".join(f"[model 0] {line}\n" for line in figures.splitlines())
    put(tmp_path / "slurm-101.log", f"{labelled}[launch] model 0 ended: exit code 143\n")
    os.utime(tmp_path / "slurm-101.log", (NOW - 3600, NOW - 3600))
    put(tmp_path / "slurm-102.log", labelled)
    (model,) = only_run(tmp_path).models
    assert model_state(model, NOW).word == "live"
    assert len(model.files) == 3
    os.utime(tmp_path / "slurm-101.log", (NOW, NOW))  # the last that was written: then it ended so
    assert model_state(only_run(tmp_path).models[0], NOW).word == "stopped"


def test_what_another_rank_failed_of_counts_though_the_first_one_spoke_last(tmp_path):
    cut(tmp_path, "", 60, NOW)
    text = (tmp_path / "model-0.log").read_text()
    (tmp_path / "model-0.log").rename(tmp_path / "model-0.rank0.log")
    put(tmp_path / "model-0.rank1.log", text + TRACEBACK)
    os.utime(tmp_path / "model-0.rank1.log", (NOW - 3600, NOW - 3600))
    assert model_state(only_run(tmp_path).models[0], NOW).why == "rank 1: mine.OddError: 3 of 4"


def test_a_slow_training_is_not_taken_for_a_silent_one(tmp_path):
    log = cut(tmp_path, "", 3600, NOW)
    for number, record in enumerate(log.train):
        record["time"] = NOW - 3600 - 1800 * (len(log.train) - number)
    assert model_state(log, NOW).word == "live"


def test_a_log_that_was_copied_today_is_not_taken_for_a_live_training(tmp_path):
    log = cut(tmp_path, "", 2 * DAY_S, NOW)
    os.utime(tmp_path / "model-0.log", (NOW, NOW))
    assert model_state(log, NOW).word == "silent"


def test_a_vision_training_that_was_told_to_stop_says_by_which_signal(tmp_path):
    text = (LOGS / "vision-0.jsonl").read_text().replace('"reason": "finished"', '"reason": "SIGTERM"')
    put(tmp_path / "0/log.jsonl", text)
    state = model_state(only_run(tmp_path).models[0], NOW)
    assert (state.word, state.why) == ("stopped", "SIGTERM")


def test_a_vision_training_that_failed_says_why(tmp_path):
    reason = "failed: the loss was not finite in 3 updates in a row"
    put(tmp_path / "0/log.jsonl", (LOGS / "vision-0.jsonl").read_text().replace('"finished"', f'"{reason}"'))
    state = model_state(only_run(tmp_path).models[0], NOW)
    assert (state.word, state.why) == ("failed", "the loss was not finite in 3 updates in a row")


def test_lines_that_only_look_like_ours_are_left_out(tmp_path):
    split("json.log", lambda model, rank, text: put(tmp_path / f"model-{model}.log", text))
    put(tmp_path / "other.log", "0000-00-00 00:00:00 | x\n2026-01-01 00:00:60 | y\n")
    assert len(find_runs(tmp_path)) == 1
    first, *rest = (LOGS / "vision-0.jsonl").read_text().splitlines()
    odd = ['{"kind": "train", "update": null}', '{"kind": "train", "update": 3, "time": "now"}']
    put(tmp_path / "vision/0/log.jsonl", "\n".join([first, *odd, *rest]) + "\n")
    assert len(find_runs(tmp_path / "vision")) == 1


def test_updates_that_were_skipped_sent_nothing(tmp_path):
    records = [
        {"kind": "train", "update": 100, "codistill_mbit": 2.0},
        {"kind": "skip", "update": 1100, "skipped": 990},
    ]
    records += [{"kind": "train", "update": 1200, "codistill_mbit": 2.0}]
    first = (LOGS / "vision-0.jsonl").read_text().splitlines()[0]
    put(tmp_path / "0/log.jsonl", "\n".join([first, *map(json.dumps, records)]) + "\n")
    assert only_run(tmp_path).models[0].sent_megabits() == ([0, 100, 1200], [0, 200, 200 + 2 * 110])


def test_what_is_sent_again_after_a_restart_counts_again():
    log = read_log(LOGS / "json.log")[0, 0]
    log.epochs = []
    log.train = [{"num_updates": n, "codistill_mbit": 1.0} for n in (10.0, 20.0, 15.0, 20.0)]
    assert log.sent_megabits()[1] == [0, 10, 20, 20, 25]


def test_the_last_updates_of_an_epoch_are_counted_from_the_mean_over_it():
    log = read_log(LOGS / "json.log")[0, 0]
    log.train = [{"num_updates": 20.0, "codistill_mbit": 1.0}, {"num_updates": 40.0, "codistill_mbit": 3.0}]
    log.epochs = [(1, {"num_updates": 25.0, "codistill_mbit": 2.0}), (2, {"num_updates": 45.0, "codistill_mbit": 4.0})]
    updates, sent = log.sent_megabits()
    assert updates == [0, 20, 25, 40, 45]
    assert sent == [0, 20, 25 * 2, 50 + 15 * 3, 50 + 20 * 4]


@pytest.mark.parametrize("layout", ["{}/train.log", "model-{}.log"])
def test_scores_beside_the_logs_or_the_checkpoints_are_found(tmp_path, layout):
    split("json.log", lambda model, rank, text: put(tmp_path / layout.format(model), text))
    for model, bleu in ((0, 61.5), (1, 60.0)):
        put(tmp_path / str(model) / "bleu.json", json.dumps({"bleu": bleu, "signature": "nrefs:1"}))
    put(tmp_path / "1/bleu_average.json", json.dumps({"bleu": 62.25, "signature": "nrefs:1"}))
    put(tmp_path / "1/bleu_odd.json", "{")
    first, second = only_run(tmp_path).models
    assert [(score.name, score.bleu) for score in first.scores] == [("bleu", 61.5)]
    assert [(score.name, score.bleu) for score in second.scores] == [("bleu", 60.0), ("bleu_average", 62.25)]
