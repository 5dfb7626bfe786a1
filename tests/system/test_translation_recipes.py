"""The recipes for IWSLT'14 and WMT'16 under SMOKE=1."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers import json_logs

pytestmark = [pytest.mark.recipes, pytest.mark.timeout(1200)]
RECIPES = Path(__file__).parents[2] / "recipes"


def run(script, *arguments, check=True, **env):
    ended = subprocess.run(
        ["bash", str(RECIPES / script), *map(str, arguments)],
        env={**os.environ, "SMOKE": "1", **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (ended.returncode == 0) == check, ended.stdout[-6000:]
    return ended.stdout


def last_record(folder, kind="train"):
    return json_logs((folder / "train.log").read_text(), kind)[-1]


def test_iwslt_is_codistilled_three_ways_and_evaluated(tmp_path):
    run("iwslt14_de_en/prepare.sh", "--out", tmp_path / "data")
    run("iwslt14_de_en/train.sh", "--arm", "codistill", "--models", "3", "--data", tmp_path / "data",
        "--out", tmp_path / "out")  # fmt: skip
    for model in "012":
        record = last_record(tmp_path / "out" / model)
        assert record["train_num_updates"] == 40
        assert record["train_codistill_peers"] == 2
    run("iwslt14_de_en/evaluate.sh", "--data", tmp_path / "data", tmp_path / "out/2")
    scores = json.loads((tmp_path / "out/2/bleu.json").read_text())
    assert scores["signature"].startswith("nrefs:1|case:mixed")
    assert scores["bleu_tokenised"] >= 0


@pytest.fixture(scope="module")
def wmt_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wmt") / "data"
    run("wmt16_en_de/prepare.sh", "--out", folder, "--subwords", "moses")
    return folder


def test_the_arms_on_wmt_say_what_an_update_is_and_make_the_same_number(wmt_data, tmp_path):
    said = run("wmt16_en_de/train.sh", "--arm", "all_reduce", "--data", wmt_data, "--out", tmp_path / "all_reduce")
    assert (
        "all_reduce: 1 model(s) x 2 device(s) x update-freq 2 = 4 batches in an update of a model, each of up to 512"
        in said
    )
    said = run("wmt16_en_de/train.sh", "--arm", "codistill", "--data", wmt_data, "--out", tmp_path / "codistill")
    assert (
        "codistill: 2 model(s) x 1 device(s) x update-freq 2 = 2 batches in an update of a model, each of up to 512"
        in said
    )
    for model in ("all_reduce/0", "codistill/0", "codistill/1"):
        assert last_record(tmp_path / model)["train_num_updates"] == 40
    run("wmt16_en_de/evaluate.sh", "--data", wmt_data, tmp_path / "codistill/1")
    scores = json.loads((tmp_path / "codistill/1/bleu_average.json").read_text())
    assert scores["bleu_tokenised_compounds_split"] >= 0
    assert not any("@@" in line for line in (tmp_path / "codistill/1/bleu.hyp").read_text().splitlines())


def test_devices_that_do_not_divide_the_batch_are_refused(wmt_data, tmp_path):
    said = run("wmt16_en_de/train.sh", "--arm", "plain", "--devices", "3", "--data", wmt_data, check=False)
    assert "--devices is 3, of one of 2 models; their product must divide 4" in said
