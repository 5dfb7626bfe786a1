"""The recipes for IWSLT'14 and WMT'16 under SMOKE=1, and the SLURM file on a stand-in for SLURM with real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import free_ports, json_logs

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
    assert "all_reduce: 1 model(s) x 2 device(s) x update-freq 2 x 512 tokens = up to 2048 tokens" in said
    said = run("wmt16_en_de/train.sh", "--arm", "codistill", "--data", wmt_data, "--out", tmp_path / "codistill")
    assert "codistill: 2 model(s) x 1 device(s) x update-freq 2 x 512 tokens = up to 1024 tokens" in said
    for model in ("all_reduce/0", "codistill/0", "codistill/1"):
        assert last_record(tmp_path / model)["train_num_updates"] == 40
    run("wmt16_en_de/evaluate.sh", "--data", wmt_data, tmp_path / "codistill/1")
    scores = json.loads((tmp_path / "codistill/1/bleu_average.json").read_text())
    assert scores["bleu_tokenised_compounds_split"] >= 0
    assert not any("@@" in line for line in (tmp_path / "codistill/1/bleu.hyp").read_text().splitlines())


def test_devices_that_do_not_divide_the_batch_are_refused(wmt_data, tmp_path):
    said = run("wmt16_en_de/train.sh", "--arm", "plain", "--devices", "3", "--data", wmt_data, check=False)
    assert "--devices is 3, of one of 2 models; their product must divide 4" in said


SRUN = """#!{python}
import argparse, os, subprocess, sys
parser = argparse.ArgumentParser()
parser.add_argument("--exact", action="store_true")
for name in ("nodes", "ntasks", "ntasks-per-node", "nodelist", "open-mode", "output"):
    parser.add_argument("--" + name)
options, command = parser.parse_known_args()
tasks = []
for task in range(int(options.ntasks)):
    env = dict(os.environ, SLURM_PROCID=str(task), SLURM_LOCALID=str(task % int(options.ntasks_per_node)))
    log = open(options.output.replace("%t", str(task)), "ab")
    tasks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
assert len(options.nodelist.split(",")) == int(options.nodes)
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def test_the_slurm_file_spreads_the_models_over_the_nodes(wmt_data, tmp_path):
    """Two nodes (two addresses of this machine) of two tasks each, so two models of two ranks."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n")
    (tools / "srun").write_text(SRUN.format(python=sys.executable))
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(RECIPES.parent), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "2"}
    slurm |= {"PATH": f"{tools}:{os.environ['PATH']}", "BASE_PORT": str(free_ports(1, 5)[0] + 2)}
    where = ["--data", wmt_data, "--out", tmp_path / "out"]
    said = run("wmt16_en_de/slurm.sbatch", *where, "--max-update", "6", **slurm)
    assert "2 models of 2 devices on 127.0.0.1 127.0.0.2" in said
    for model in "01":
        logs = [(tmp_path / f"out/{model}/train.{task}.log").read_text() for task in (0, 1)]
        record = json_logs(logs[0], "train")[-1]
        assert record["train_num_updates"] == 6
        assert record["train_codistill_peers"] == 1
        assert "Traceback" not in logs[1]  # which has no more to say than warnings: it is not the first rank
    said = run("wmt16_en_de/slurm.sbatch", *where, "--models", "3", check=False, **slurm)
    assert "--models is 3, but the job has 2 node(s)" in said
