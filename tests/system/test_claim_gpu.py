"""The test of the claim on one GPU, tried on the CPU: one command from images to tables, and a second one after it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "recipes/claim/gpu.sh"
# One tuning run, and final ones of one seed: two of one model alone, which begins where each of a pair does.
RUNS = {"plain": 3, "all_reduce": 2, "mse": 2, "kl": 2, "plain_2k": 2, "all_reduce_4": 2, "kl_x2": 2, "kl_4": 2}
# Two values of alpha each, then the final run of what is best, or two where the metrics choose otherwise.
REMEDIES = ("kl_weak", "kl_late", "kl_soft", "js", "reverse_kl")


@pytest.fixture
def cifar10(tmp_path):
    generator = np.random.default_rng(0)
    for split, num_images in (("train", 40), ("test", 4)):
        for label in range(10):
            folder = tmp_path / "cifar10" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(num_images):
                pixels = generator.integers(0, 128, (32, 32, 3)) + 12 * label
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    return tmp_path / "cifar10"


def start(*arguments, cwd):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], env={**os.environ, "SMOKE": "1"}, cwd=cwd,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.recipes
@pytest.mark.timeout(2400)
def test_every_arm_is_trained_and_evaluated_and_a_second_start_trains_nothing(cifar10, tmp_path):
    ended = start("--from", cifar10, "--work", tmp_path / "work", "--out", tmp_path / "out", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]
    found = {arm: sum(row["arm"] == arm for row in rows) for arm in (*RUNS, *REMEDIES)}
    assert {arm: found[arm] for arm in RUNS} == RUNS
    assert all(found[arm] in (3, 4) for arm in REMEDIES)
    assert len({row["updates"] for row in rows if row["arm"] != "plain_2k"}) == 1
    for row in rows:
        assert (row["test"] is None) == (row["stage"] == "tune")
        assert 0 < row["held_out"]["nll"] < 10
        assert row["skipped_exchanges"] == 0
    assert "| kl_4 | 0.1, wd5e-4, 1 | 1 |" in (tmp_path / "out/summary.md").read_text()

    again = start("--from", cifar10, "--work", tmp_path / "work", "--out", tmp_path / "out", cwd=tmp_path)
    assert again.returncode == 0
    assert f"nothing is left to do: {len(rows)} runs" in again.stdout


def test_what_is_missing_is_one_line(tmp_path):
    for arguments, expected in (([], "--from is missing"), (["--from", tmp_path / "nothing"], "nothing")):
        ended = start(*arguments, "--work", tmp_path / "work", cwd=tmp_path)
        assert ended.returncode == 1
        assert expected in ended.stderr
        assert "Traceback" not in ended.stderr
