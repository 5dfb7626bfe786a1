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
