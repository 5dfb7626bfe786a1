"""The vision recipes and presets from end to end on embedded data (SMOKE=1)."""

import os
import subprocess
from pathlib import Path

import pytest
from vision_helpers import records

RECIPES = Path(__file__).parents[2] / "recipes"


def run(recipe, *arguments, smoke="1", check=True):
    """Run a recipe; returns what it printed on both streams."""
    ended = subprocess.run(
        ["bash", str(RECIPES / recipe / "train.sh"), *map(str, arguments)],
        env={**os.environ, "SMOKE": smoke},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (ended.returncode == 0) == check, ended.stdout[-4000:]
    return ended.stdout


def options(folder):
    return records(folder, "start")[0]["options"]


@pytest.mark.recipes
@pytest.mark.parametrize(
    ("preset", "schedule", "weight_decay"),
    [
        ("resnet50_goyal", "step", [5e-4, 1e-5, 0]),
        ("resnext101_goyal", "cosine", [5e-4, 1e-5, 0]),
        ("resnet50_goyal", "shifted", [5e-4, 1e-5, 0]),
        ("resnet50_goyal", "a4", [1e-4, 1e-5, 0]),
    ],
)
def test_imagenet_is_codistilled_with_the_schedules_of_the_paper(tmp_path, preset, schedule, weight_decay):
    run("imagenet", "--arm", "codistill", "--preset", preset, "--schedule", schedule, "--out", tmp_path)
    for model in ("0", "1"):
        assert [record["codistill_peers"] for record in records(tmp_path / model, "train")] == [1, 1, 1]
        assert options(tmp_path / model)["weight_decay"] == weight_decay
        assert records(tmp_path / model, "end")[0]["reason"] == "finished"
        assert (tmp_path / model / "checkpoint_last.pt").exists()


@pytest.mark.recipes
def test_the_arms_on_imagenet_differ_in_their_settings_alone(tmp_path):
    for arm in ("plain", "all_reduce"):
        run("imagenet", "--arm", arm, "--out", tmp_path / arm, "--schedule", "step", "--model", "resnet18")
    plain, all_reduce = (options(tmp_path / arm / "0") for arm in ("plain", "all_reduce"))
    differing = {name for name in plain if plain[name] != all_reduce[name]}
    schedules = {"epochs", "warmup_epochs", "lr_milestones"}  # of 45 and of 90 epochs
    assert differing == {"save_dir", "codistill_addresses"} | schedules  # the ports are picked by chance
    assert [records(tmp_path / arm / "0", "start")[0]["world_size"] for arm in ("plain", "all_reduce")] == [1, 2]
    assert len(records(tmp_path / "plain/0", "train")) == len(records(tmp_path / "all_reduce/0", "train"))


@pytest.mark.recipes
def test_the_multi_view_arms_on_cifar_share_one_first_group(tmp_path):
    preset = ("--preset", "wrn28_10_cifar")
    run("cifar10", "--arm", "plain", *preset, "--out", tmp_path / "plain", "--max-updates", "2")
    source = tmp_path / "plain/0/checkpoint_last.pt"
    more = ("--max-updates", "2")
    run(
        "cifar10", "--arm", "multiview", *preset, "--first-group", "frozen", "--from", source, "--out",
        tmp_path / "frozen", *more,
    )  # fmt: skip
    import torch

    pretrained = torch.load(source, weights_only=True)["model"]
    first = [name for name in pretrained if name.startswith(("stem.", "group1."))]
    assert len(first) > 20
    for model in ("0", "1"):
        assert options(tmp_path / "frozen" / model)["view"] == model
        trained = torch.load(tmp_path / "frozen" / model / "checkpoint_last.pt", weights_only=True)["model"]
        assert all(torch.equal(trained[name], pretrained[name]) for name in first)
        assert trained["group2.0.conv1.weight"].shape[1] == 20
        assert records(tmp_path / "frozen" / model, "train")[-1]["codistill_peers"] == 1


def test_a_small_model_on_cifar_is_codistilled(tmp_path):
    run("cifar10", "--arm", "codistill", "--out", tmp_path)
    for model in "01":
        assert [record["codistill_peers"] for record in records(tmp_path / model, "train")] == [1, 1, 1]
    assert records(tmp_path / "1", "valid")[0]["valid_images"] == 360


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("imagenet", ("--arm", "codistill"), "--data is ''"),
        ("imagenet", ("--arm", "none", "--data", "{tmp}"), "--arm is 'none'"),
        ("imagenet", ("--schedule", "linear", "--data", "{tmp}"), "--schedule is 'linear'"),
        ("cifar10", ("--arm", "plain", "--data", "{tmp}/none"), "train/ and test/"),
        ("cifar10", ("--arm", "multiview", "--first-group", "frozen", "--data", "{tmp}"), "--from is ''"),
        ("cifar10", ("--arm",), "--arm needs a value"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, recipe, arguments, message):
    (tmp_path / "train").mkdir()
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    assert message in run(recipe, *filled, smoke="0", check=False)
