"""The recipes that distil into a small model, and those of models whose data never meet, under SMOKE=1."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import json_logs
from PIL import Image

pytestmark = [pytest.mark.recipes, pytest.mark.timeout(1200)]
RECIPES = Path(__file__).parents[2] / "recipes"


def run(script, *arguments, check=True):
    ended = subprocess.run(
        ["bash", str(RECIPES / script), *map(str, arguments)],
        env={**os.environ, "SMOKE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (ended.returncode == 0) == check, ended.stdout[-6000:]
    return ended.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    run("multi30k_en_de/prepare.sh", "--out", folder)
    return folder


def test_a_small_model_is_taught_and_a_second_call_trains_nothing_anew(data, tmp_path):
    arguments = ["multi30k_en_de/distil.sh", "--data", data, "--out", tmp_path, "--seeds", "1"]
    run(*arguments)
    for arm in ("teacher", "alone1", "taught1"):
        assert json.loads((tmp_path / arm / "0" / "bleu.json").read_text())["bleu"] >= 0
    assert json_logs((tmp_path / "taught1/0/train.log").read_text(), "train")[-1]["train_codistill_teacher_loss"] > 0
    assert list((tmp_path / "cache").glob("*.rows"))
    before = (tmp_path / "taught1/0/train.log").stat().st_mtime_ns
    run(*arguments)
    assert (tmp_path / "taught1/0/train.log").stat().st_mtime_ns == before
    said = run("multi30k_en_de/train.sh", "--arm", "taught", "--data", data, check=False)
    assert "--arm taught needs --teacher" in said


def test_translation_models_of_two_halves_run_all_arms(data, tmp_path):
    run("multi30k_en_de/own_data.sh", "--data", data, "--out", tmp_path, "--seeds", "1", "--interval", "4")
    for model in ("half0.seed1/0", "half1.seed1/0", "together.seed1/0"):
        assert (tmp_path / model / "bleu.json").exists()
    for arm in ("transfer", "checkpoints"):
        for model in "01":
            last = json_logs((tmp_path / f"{arm}.seed1" / model / "train.log").read_text(), "train")[-1]
            assert last["train_codistill_peers"] > 0
            assert (tmp_path / f"{arm}.seed1" / model / "bleu.json").exists()


def test_image_models_of_two_halves_run_all_arms(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 3)):
        for name in "abcdefghij":
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    run("cifar10/own_data.sh", "--data", tmp_path / "images", "--out", tmp_path / "out", "--seeds", "1", "--cpu",
        "--num-workers", "0", "--log-updates", "1")  # fmt: skip
    for arm, models in (("half0", "0"), ("half1", "0"), ("together", "0"), ("transfer", "01"), ("checkpoints", "01")):
        for model in models:
            log = (tmp_path / "out" / f"{arm}.seed1" / model / "log.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in log]
            assert records[-1]["reason"] == "finished"
            assert len(models) == 1 or any(record.get("codistill_peers") for record in records)
