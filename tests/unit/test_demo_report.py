"""What the demo and the recipes report from: logs by model as run_logged.py stores them, BLEU as score.py counts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def test_labelled_lines_go_to_the_log_of_their_model_and_the_exit_code_stays(tmp_path):
    script = "print('[model 1] one'); print('[model 0 rank 1] zero'); print('plain'); raise SystemExit(3)"
    command = [sys.executable, REPOSITORY / "recipes/tools/run_logged.py", "--log-dir", tmp_path, "--"]
    ended = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 3
    assert "training failed" in ended.stderr
    assert (tmp_path / "1/train.log").read_text() == "one\n"
    assert (tmp_path / "0/train.rank1.log").read_text() == "zero\n"
    assert (tmp_path / "0/train.log").read_text() == "plain\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_recipe_that_is_told_to_end_tells_its_training_and_leaves_nothing_behind(tmp_path, number):
    """A shell that dies of a signal would leave it running, and a second one would be started beside it."""
    training = tmp_path / "training.py"
    training.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('begun').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    script = f'set -eu; source {REPOSITORY}/recipes/common.sh; logged logs "$PYTHON" training.py; touch went-on'
    environment = {**os.environ, "PYTHON": sys.executable, "RECIPE_HAS_GPU": "no"}
    recipe = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists():
        assert recipe.poll() is None
        time.sleep(0.05)
    recipe.send_signal(number)
    code = recipe.wait(30)
    if number == signal.SIGTERM:
        assert code == 143
        assert (tmp_path / "saved").exists(), "it did not wait"
    until = time.monotonic() + 30
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < until, "the training was left alone"
        time.sleep(0.05)
    assert not (tmp_path / "went-on").exists()


def score(tmp_path, generated, reference):
    (tmp_path / "gen").write_text(generated)
    (tmp_path / "ref").write_text(reference)
    command = [sys.executable, REPOSITORY / "recipes/tools/score.py", "--generated", tmp_path / "gen"]
    command += ["--reference", tmp_path / "ref", "--json", tmp_path / "json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_translations_are_scored_in_the_order_of_the_corpus(tmp_path):
    generated = "S-1\tx\nD-1\t-0.1\tthe cat sat on the mat\nD-0\t-0.2\tone two three four five\n"
    ended = score(tmp_path, generated, "one two three four five\nthe cat sat on the mat\n")
    record = json.loads((tmp_path / "json").read_text())
    assert record["bleu"] == 100.0
    assert record["signature"] in ended.stdout
    assert "version:" in record["signature"]


def test_missing_translations_are_an_error_not_a_low_score(tmp_path):
    ended = score(tmp_path, "D-0\t-0.2\tone two\n", "one two\nthree four\n")
    assert ended.returncode != 0
    assert "1 sentences where the reference has 2" in ended.stderr


@pytest.mark.parametrize(
    ("lines", "is_over"),
    [
        ("x | INFO | vision.engine | going on from out/0/checkpoint_last.pt, update 40", True),
        ("x | INFO | fairseq.trainer | Loaded checkpoint 0/checkpoint_last.pt (epoch 3 @ 40 updates)", True),
        (
            "x | INFO | vision.engine | going on from a, update 40\nx | INFO | vision.log | train: epoch 2 update 50",
            False,
        ),
        ("x | INFO | vision.log | train: epoch 1 update 10", False),
    ],
)
def test_a_training_that_was_at_its_end_already_is_said_to_have_trained_nothing(tmp_path, lines, is_over):
    command = [sys.executable, REPOSITORY / "recipes/tools/run_logged.py", "--log-dir", tmp_path, "--"]
    ended = subprocess.run([*command, sys.executable, "-c", f"print({lines!r})"], capture_output=True, text=True)
    assert ended.returncode == 0
    assert ("nothing was trained" in ended.stdout) == is_over
    assert lines.splitlines()[0] in ended.stdout
