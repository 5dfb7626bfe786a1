"""The scripts of the paper's figures and tables, every arm of each, on embedded data (SMOKE=1)."""

import json
import os
import subprocess
from pathlib import Path

import pytest

PAPER = Path(__file__).parents[2] / "recipes/paper"
SCRIPTS = sorted(path.name for path in PAPER.glob("*.sh") if path.name != "paper.sh")
pytestmark = pytest.mark.recipes


def run(script, *arguments, check=True, **environment):
    """Run a script; returns what it printed on both streams."""
    ended = subprocess.run(
        ["bash", str(PAPER / script), *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (ended.returncode == 0) == check, ended.stdout[-4000:]
    return ended.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Arms that several figures share are trained once."""
    return tmp_path_factory.mktemp("paper")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_arm_is_trained_and_drawn(out, script):
    run(script, "--out", out, SMOKE="1")
    figure = out / script.removesuffix(".sh")
    arms = json.loads(figure.with_suffix(".json").read_text())
    assert len(arms) >= 2
    assert all(arm["seeds"] == ["1"] for arm in arms)
    assert figure.with_suffix(".png").stat().st_size > 5000
    assert figure.with_suffix(".svg").exists()


@pytest.mark.parametrize("script", ["fig02.sh", "fig06.sh", "fig14.sh", "tab02.sh"])
def test_a_dry_run_at_full_scale_shows_commands_and_bits_without_data_or_devices(tmp_path, script):
    printed = run(script, "--out", tmp_path / "out", DRY_RUN="1", SEEDS="1")
    assert "# model 0" in printed
    assert "per update" in printed
    assert "unknown" not in printed
    assert not (tmp_path / "out").exists()


def test_an_arm_that_is_done_is_not_run_again_and_other_settings_are_refused(tmp_path):
    run("fig07.sh", "--out", tmp_path, SMOKE="1")
    printed = run("fig07.sh", "--out", tmp_path, SMOKE="1")
    assert printed.count("is finished already") == 3
    assert "training:" not in printed
    refused = run("fig07.sh", "--out", tmp_path, "--codistill-weight", "2", SMOKE="1", check=False)
    assert "was trained with other settings" in refused
    assert str(tmp_path / "imagenet/all_reduce/1") in refused


def test_settings_at_the_end_reach_every_training(tmp_path):
    run("fig07.sh", "--out", tmp_path, "--lr", "0.01", SMOKE="1")
    for arm in ("all_reduce", "constant_decay_1e-4"):
        [start] = [
            json.loads(line)
            for line in (tmp_path / "imagenet" / arm / "1/0/log.jsonl").open()
            if '"kind": "start"' in line
        ]
        assert start["options"]["lr"] == 0.01
