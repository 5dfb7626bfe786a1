"""The recipes from end to end on embedded data (SMOKE=1): prepare, train every arm, evaluate."""

import gzip
import json
import os
import re
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from fairseq_codistill.fairseq_side import compat

RECIPE = Path(__file__).parents[2] / "recipes/multi30k_en_de"


def run(script, *arguments, smoke="1", check=True):
    """Run a script of the recipe; returns what it printed on both streams."""
    ended = subprocess.run(
        ["bash", str(RECIPE / script), *map(str, arguments)],
        env={**os.environ, "SMOKE": smoke},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (ended.returncode == 0) == check, ended.stdout[-4000:]
    return ended.stdout


def records(folder, kind):
    """The figures of one kind in a training log."""
    marker = f" | {kind} | "
    return [json.loads(line.split(marker)[1]) for line in (folder / "train.log").open() if marker in line]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "data"
    run("prepare.sh", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "plain"
    run("train.sh", "--arm", "plain", "--data", data, "--out", out)
    return out


@pytest.fixture(scope="module")
def codistilled(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("recipe") / "codistill"
    run("train.sh", "--arm", "codistill", "--data", data, "--out", out)
    return out


def settings(folder):
    """Every setting that a checkpoint names, in one flat dictionary."""
    compat.apply()

    def flatten(group, prefix=""):
        for name, value in (group if isinstance(group, dict) else vars(group)).items():
            if isinstance(value, (dict, Namespace)):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return dict(flatten(torch.load(folder / "checkpoint_last.pt", map_location="cpu", weights_only=True)["cfg"]))


def test_plain_and_codistilled_arms_differ_in_codistillation_only(plain, codistilled):
    """The first model of the codistilled arm is the plain one with peers: folders and schedules of ours apart. A
    codistilled checkpoint is one of fairseq alone, which names no --user-dir."""
    alone, first, second = (settings(folder) for folder in (plain / "0", codistilled / "0", codistilled / "1"))
    differing = {name for name in alone.keys() | first.keys() if alone.get(name) != first.get(name)}
    assert {name for name in differing if not name.startswith("model.label_smoothing_")} == {
        "checkpoint.save_dir",
        "common.user_dir",
        "model.save_dir",
        "model.user_dir",
    }
    differing = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert differing <= {
        f"{group}.{name}" for group in ("checkpoint", "common", "model", "task") for name in ("save_dir", "seed")
    }
    assert (first["common.seed"], second["common.seed"]) == (1, 2)
    assert alone["optimization.max_epoch"] == 2
    assert alone["model.dropout"] == first["model.dropout"] == 0.1
    updates = [records(folder, "train")[-1]["train_num_updates"] for folder in (plain / "0", codistilled / "0")]
    assert updates[0] == updates[1]


def test_the_codistilled_arm_exchanges_and_the_plain_arm_does_not(plain, codistilled):
    assert all("train_codistill_mbit" not in record for record in records(plain / "0", "train"))
    for model in ("0", "1"):
        for record in records(codistilled / model, "train"):
            assert float(record["train_codistill_peers"]) == 1
            assert float(record["train_codistill_mbit"]) > 0


@pytest.mark.slow
def test_the_plain_arm_goes_on_from_its_last_checkpoint(data, tmp_path):
    for epochs in (1, 2):
        run("train.sh", "--arm", "plain", "--data", data, "--out", tmp_path, "--max-epoch", epochs)
    epochs = [record["epoch"] for record in records(tmp_path / "0", "train")]
    assert epochs == [1, 2]


def test_every_line_of_a_training_is_kept_once(codistilled):
    assert {path.name for path in codistilled.rglob("*.log")} == {"train.log"}


@pytest.mark.slow
def test_models_are_evaluated_at_the_best_checkpoint_and_the_average(data, codistilled):
    folders = [codistilled / "1"]
    printed = run("evaluate.sh", "--data", data, *folders)
    assert printed.count("best checkpoint: BLEU") == len(folders)
    assert printed.count("average of the last 2 epochs: BLEU") == len(folders)
    for folder in folders:
        for name in ("bleu", "bleu_average"):
            assert json.loads((folder / f"{name}.json").read_text())["signature"].startswith("nrefs:1|")
            assert len((folder / f"{name}.hyp").read_text().splitlines()) == 25


@pytest.mark.slow
def test_the_all_reduce_arm_makes_the_updates_of_the_plain_arm_on_two_devices(data, plain, tmp_path):
    run("train.sh", "--arm", "all_reduce", "--data", data, "--out", tmp_path / "out")
    last, last_plain = (records(folder, "train")[-1] for folder in (tmp_path / "out/0", plain / "0"))
    # An odd number of batches is padded by one in every epoch.
    assert 0 <= int(last["train_num_updates"]) - int(last_plain["train_num_updates"]) <= int(last["epoch"])
    assert float(last["train_wpb"]) > 1.7 * float(last_plain["train_wpb"])
    assert not (tmp_path / "out/1").exists()


@pytest.mark.slow
def test_settings_at_the_end_win(data, tmp_path):
    run(
        "train.sh", "--arm", "plain", "--data", data, "--out", tmp_path / "out", "--max-epoch", "1", "--max-update", "3"
    )
    assert records(tmp_path / "out/0", "train")[-1]["train_num_updates"] == "3"


def test_a_dry_run_shows_commands_and_bits_without_data_or_devices(tmp_path):
    ended = subprocess.run(
        ["bash", str(RECIPE.parent / "wmt16_en_de/train.sh"), "--arm", "codistill", "--models", "4",
         "--codistill-divergence", "kl", "--codistill-codec", "tokens:16"],
        env={**os.environ, "DRY_RUN": "1"}, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert (
        "4 model(s) x 8 device(s) x update-freq 4 = 32 batches in an update of a model, each of up to 3584"
        in ended.stdout
    )
    assert ended.stdout.count("fairseq-train ") == 32
    # 3 peers x 14,336 tokens x 16 ids x 16 bits; 2 x 209,125,376 x 32 bits.
    assert re.search(r"predictions tokens:16 T=1 \(this run\) +11.010 Mbit", ended.stdout)
    assert re.search(r"all_reduce fp32 +13,384.024 Mbit +1,215.62", ended.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_local_folder_may_hold_plain_and_gzipped_files(data, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for ours, theirs in (("train", "train"), ("valid", "val"), ("test", "test_2016_flickr")):
        (source / f"{theirs}.en").write_bytes((data / f"raw/{ours}.en").read_bytes())
        (source / f"{theirs}.de.gz").write_bytes(gzip.compress((data / f"raw/{ours}.de").read_bytes()))
    run("prepare.sh", "--from", source, "--out", tmp_path / "out", "--vocab-size", "300", smoke="0")
    for name in ("raw/test.de", "bpe/train.en", "bin/dict.en.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (data / name).read_bytes()


def test_files_that_do_not_belong_together_are_refused(data, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train.en", "train.de", "val.en", "val.de", "test_2016_flickr.en", "test_2016_flickr.de"):
        (source / name).write_text("one\ntwo\n" if name != "val.de" else "one\n")
    printed = run("prepare.sh", "--from", source, "--out", tmp_path / "out", smoke="0", check=False)
    assert "valid: 2 lines of en and 1 of de" in printed


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("prepare.sh", ("--from", "/nonexistent", "--out", "{tmp}/x"), "holds neither train.en nor train.en.gz"),
        ("prepare.sh", ("--out",), "--out needs a value"),
        ("prepare.sh", ("--every", "0"), "--every is '0'"),
        ("prepare.sh", ("--bogus",), "unknown argument '--bogus'"),
        ("train.sh", ("--arm", "none", "--data", "{data}", "--out", "{tmp}/x"), "--arm is 'none'"),
        ("train.sh", ("--arm", "plain", "--data", "{tmp}"), "multi30k_en_de/prepare.sh --out"),
        ("evaluate.sh", ("--data", "{data}"), "no folder of checkpoints given"),
        ("evaluate.sh", ("--data", "{data}", "{tmp}"), "checkpoint_best.pt does not exist"),
    ],
)
def test_wrong_arguments_are_named(data, tmp_path, script, arguments, message):
    filled = [argument.format(tmp=tmp_path, data=data) for argument in arguments]
    assert message in run(script, *filled, smoke="0", check=False)
