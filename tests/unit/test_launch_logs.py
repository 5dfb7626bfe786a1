"""Where the launcher keeps what the models write."""

import os

import pytest

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.logs import default_log_dir, model_logs


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["runs/0", "runs/1"], "runs"),
        (["runs/a/ckpt", "runs/b/ckpt"], "runs"),
        (["small", "large"], "."),
        (["runs/only"], "runs"),
        (["/one/0", "/two/1"], None),
        (["runs/0", None], None),
    ],
)
def test_logs_lie_beside_the_checkpoints(folders, expected):
    commands = [["train", *([] if folder is None else ["--save-dir", folder])] for folder in folders]
    assert default_log_dir(commands) == expected


def test_a_run_that_saves_nothing_keeps_no_logs():
    assert default_log_dir([["train", "--save-dir", "runs/0", "--no-save"]]) is None


def test_logs_are_appended_and_a_folder_that_cannot_be_written_is_named(tmp_path):
    for text in (b"first\n", b"second\n"):
        with model_logs(str(tmp_path / "new"), 2) as logs:
            os.write(logs[1], text)
    assert (tmp_path / "new" / "model-1.log").read_text() == "first\nsecond\n"
    with model_logs(None, 2) as logs:
        assert logs == {}
    with pytest.raises(ConfigError, match="--log-dir"), model_logs(str(tmp_path / "new" / "model-1.log"), 2):
        pass


def test_the_report_reads_logs_of_several_ranks_and_takes_a_good_end_for_one(tmp_path):
    from fairseq_codistill.report.runs import find_runs

    line = '2026-01-31 12:00:0{0} | INFO | train_inner | {{"epoch": 1, "loss": "9", "num_updates": "{0}"}}'
    end = "2026-01-31 12:00:09 | INFO | fairseq_cli.train | done training in 2.6 seconds"
    for model in range(2):
        said = [f"[model {model} rank 0] {line.format(update)}" for update in (1, 2)]
        lines = [f"[launch] model {model} rank 0: fairseq-train data", *said, f"[model {model} rank 0] {end}"]
        lines += [f"[launch] model {model} rank {rank} ended: exit code 0" for rank in range(2)]
        (tmp_path / f"model-{model}.log").write_text("\n".join(lines) + "\n")
    (run,) = find_runs(tmp_path)
    assert [(model.index, model.num_updates) for model in run.models] == [(0, 2), (1, 2)]
    assert [model.ending.state for model in run.models] == ["finished", "finished"]
