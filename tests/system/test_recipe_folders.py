"""Which folder a script of the recipes trains in, and what of it, from earlier, it takes for its own.

Nothing is trained: a stand-in for ``codistill-launch`` prints what it was asked to start.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipe_lengths import start, tools

__all__ = ["tools"]  # a fixture


def test_seeds_of_other_settings_are_not_taken_into_the_mean_of_an_arm(tools, tmp_path):
    """The arm of seed 1 was trained at another learning rate than seed 2 is to be."""
    folder = tmp_path / "imagenet/all_reduce/1"
    folder.mkdir(parents=True)
    (folder / "finished.txt").write_text("E/n, SCALE=full SMOKE=0, data images: --arm all_reduce\n")
    arguments = ("paper/fig07.sh", "--data", "images/", "--out", tmp_path, "--lr", "0.4")
    refusal = f"{folder} was trained with other settings"
    refused = start(tools, *arguments, check=False, SEEDS="2", DRY_RUN="0")
    assert refusal in refused
    assert "training:" not in refused
    planned = start(tools, *arguments, SEEDS="2")
    assert refusal in planned
    assert "imagenet/all_reduce/2/{model" in planned


def test_a_folder_of_any_name_is_no_pattern_and_no_place_for_a_seed(tools, tmp_path):
    out = tmp_path / "SEED[1] b=2"
    folder = out / "imagenet/all_reduce/1"
    (folder / "0").mkdir(parents=True)
    (folder / "0/checkpoint_last.pt").touch()
    (folder / "settings.txt").write_text("others\n")
    assert f"{folder} was trained with other settings" in start(
        tools, "paper/fig07.sh", "--data", "x", "--out", out, SEEDS="1"
    )
    printed = start(tools, "paper/fig06.sh", "--data", "x", "--out", out, SEEDS="3")
    assert f"{out}/cifar10/all_channels/3/0/checkpoint_last.pt" in printed.replace("'", "")


def test_one_seed_is_asked_for_as_in_any_other_script(tools, tmp_path):
    printed = start(tools, "paper/fig07.sh", "--out", tmp_path, SEEDS="", SEED="2")
    assert "all_reduce/2/{model" in printed
    assert "all_reduce/1/{model" not in printed
    assert "all_reduce/3/{model" not in printed


def test_a_small_model_that_was_taught_otherwise_is_not_taken_for_this_one(tools, tmp_path):
    folder = tmp_path / "alone1"
    (folder / "0").mkdir(parents=True)
    (folder / "0/bleu.json").write_text("{}")
    arguments = ("multi30k_en_de/distil.sh", "--data", "pairs", "--out", tmp_path, "--teacher", "t.pt", "--seeds", "1")
    planned = start(tools, *arguments)
    assert f"{folder} was trained with other settings: 'settings that an earlier version did not keep'" in planned
    assert not (folder / "done").exists()
    (folder / "finished.txt").write_text("SCALE=small SMOKE=0, data pairs: --arm plain\n")
    assert f"{folder} is finished already" in start(tools, *arguments)
    assert f"{folder} was trained with other settings" in start(tools, *arguments, "--dropout", "0.5")


@pytest.mark.parametrize(
    "script", ["multi30k_en_de/own_data.sh", "multi30k_en_de/distil.sh", "cifar10/own_data.sh", "paper/fig07.sh"]
)
@pytest.mark.parametrize("seeds", ["1,2", "0", "one"])
def test_seeds_that_are_none_are_refused_before_anything_is_trained(tools, tmp_path, script, seeds):
    given = ("--seeds", seeds) if script != "paper/fig07.sh" else ()
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "images/test").mkdir()
    arguments = (script, "--data", tmp_path / "images", "--out", tmp_path / "out", *given)
    refused = start(tools, *arguments, check=False, **({} if given else {"SEEDS": seeds}))
    assert f"is '{seeds}'; it must be whole numbers from 1 on with spaces between" in refused
    assert "LAUNCHED" not in refused
    assert "training:" not in refused


def test_what_was_trained_is_not_gone_on_with_on_data_that_were_prepared_anew(tools, tmp_path):
    data, out = tmp_path / "data/bin", tmp_path / "out"
    data.mkdir(parents=True)
    for language in ("en", "de"):
        (data / f"dict.{language}.txt").write_text("one 3\ntwo 2\n")
        (data / f"train.en-de.{language}.idx").write_bytes(b"lengths")
    arguments = ("multi30k_en_de/train.sh", "--arm", "codistill", "--data", tmp_path / "data", "--out", out)
    refusal = "was prepared anew since"
    log = out / "0/train.log"
    start(tools, *arguments, DRY_RUN="0")
    assert log.read_text().count("LAUNCHED") == 1
    (data / "dict.de.txt").write_text("two 3\none 2\n")
    assert refusal not in start(tools, *arguments, DRY_RUN="0")  # nothing has been trained
    (out / "0/checkpoint_last.pt").touch()
    assert refusal not in start(tools, *arguments, DRY_RUN="0")
    (data / "train.en-de.de.idx").write_bytes(b"others")
    refused = start(tools, *arguments, check=False, DRY_RUN="0")
    assert refusal in refused
    assert log.read_text().count("LAUNCHED") == 3
    assert refusal not in start(tools, *arguments)  # a plan
    for language in ("en", "de"):
        (data / f"train.en-de.{language}.idx").unlink()  # as with --dataset-impl raw
    assert refusal in start(tools, *arguments, check=False, DRY_RUN="0")
    start(tools, *arguments[:-1], tmp_path / "raw", DRY_RUN="0")
    assert "LAUNCHED" in (tmp_path / "raw/0/train.log").read_text()
    start(tools, *arguments[:1], "--arm", "mistyped", *arguments[3:-1], tmp_path / "none", check=False, DRY_RUN="0")
    assert not (tmp_path / "none").exists()


def test_a_decimal_comma_is_no_part_of_a_number(tools, tmp_path):
    """mawk prints numbers as the locale has them."""
    (tools / "awk").write_text(
        f'#!/bin/sh\nPATH={os.environ["PATH"]} awk "$@" | if [ "$LC_ALL" = C ]; then cat; else tr . ,; fi\n'
    )
    (tools / "awk").chmod(0o755)
    for script in (("cifar10/train.sh", "--arm", "codistill"), ("paper/fig17.sh", "--data", "x")):
        printed = start(tools, *script, "--out", tmp_path, SEEDS="1", SCALE="small", LC_ALL="", LANG="de_DE.UTF-8")
        assert '"--stretch", "0.5"' in printed
        assert "0,5" not in printed


def test_the_files_of_a_preparation_are_not_emptied_by_the_next(tmp_path):
    raw = tmp_path / "out/raw"
    raw.mkdir(parents=True)
    for name in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de"):
            (raw / f"{name}.{language}").write_text("a\nb\n")
    recipe = Path(__file__).parents[2] / "recipes/multi30k_en_de/prepare.sh"
    subprocess.run(["bash", recipe, "--from", raw, "--out", tmp_path / "out"], capture_output=True, timeout=100)
    assert (raw / "train.en").read_text() == "a\nb\n"


def test_the_demonstration_has_no_dry_run_and_loses_nothing_by_one(tmp_path):
    (tmp_path / "demo").mkdir()
    for name in (".demo", "kept"):
        (tmp_path / "demo" / name).touch()
    recipe = Path(__file__).parents[2] / "recipes/demo/run.sh"
    environment = {**os.environ, "DRY_RUN": "1", "DEMO_OUT": str(tmp_path / "demo"), "PYTHON": sys.executable}
    done = subprocess.run(["bash", recipe], env=environment, capture_output=True, text=True, timeout=100)
    assert "the demonstration has no dry run" in done.stderr
    assert (tmp_path / "demo/kept").exists()


def test_modules_are_those_that_are_installed_whatever_folder_this_is(tmp_path):
    (tmp_path / "fairseq_codistill").mkdir()
    (tmp_path / "fairseq_codistill/__init__.py").write_text("raise RuntimeError('not installed')")
    common = Path(__file__).parents[2] / "recipes/common.sh"
    script = f"source {common}; run_module fairseq_codistill.paths; run_module fairseq_codistill.report.page --version"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stdout
    assert "codistill-report " in done.stdout


def prepared(folder):
    (folder / "bin").mkdir(parents=True)
    for language in ("en", "de"):
        (folder / f"bin/dict.{language}.txt").write_text("one 3\ntwo 2\n")
        (folder / f"bin/train.en-de.{language}.idx").write_bytes(b"lengths")
    return folder


def test_models_of_another_arm_or_number_do_not_go_on_in_a_folder_that_was_trained(tools, tmp_path):
    out = tmp_path / "out"
    arguments = ("multi30k_en_de/train.sh", "--data", prepared(tmp_path / "data"), "--out", out, "--arm")
    start(tools, *arguments, "codistill", DRY_RUN="0")
    start(tools, *arguments, "codistill", "--models", "3", DRY_RUN="0")  # nothing has been trained
    (out / "0/checkpoint_last.pt").touch()
    start(tools, *arguments, "codistill", "--models", "3", DRY_RUN="0")
    for other in (("codistill", "--models", "2"), ("all_reduce", "--models", "3"), ("plain",)):
        refused = start(tools, *arguments, *other, check=False, DRY_RUN="0")
        assert "holds codistill of 3 models, not " in refused
        assert "training:" not in refused
    assert "codistill of 3 models" in (out / "models.txt").read_text()


def test_data_are_compared_whatever_their_folder_is_called(tools, tmp_path):
    data, out = prepared(tmp_path / "d[1]"), tmp_path / "out"
    arguments = ("multi30k_en_de/train.sh", "--arm", "codistill", "--data", data, "--out", out)
    start(tools, *arguments, DRY_RUN="0")
    (out / "0/checkpoint_last.pt").touch()
    (data / "bin/dict.de.txt").write_text("two 3\none 2\n")
    assert "was prepared anew since" in start(tools, *arguments, check=False, DRY_RUN="0")
    scores = ("multi30k_en_de/evaluate.sh", "--data", data, out / "0/")
    assert f"is not what {out}/0 was made of" in start(tools, *scores, check=False, DRY_RUN="0")


def test_what_fairseq_takes_for_two_paths_is_refused(tools, tmp_path):
    data = prepared(tmp_path / "data")
    for more in (
        ("--data", data, "--out", tmp_path / "10:30"),
        ("--data", tmp_path / "a:b"),
        ("--data", tmp_path / "a,b"),
    ):
        refused = start(tools, "multi30k_en_de/train.sh", "--arm", "plain", *more, check=False, DRY_RUN="0")
        assert "has a ':' or ','" in refused
    own = ("own_corpus/train.sh", "--from", tmp_path, "--source", "en", "--target", "de", "--out", tmp_path / "10:30")
    assert "has a ':' or ','" in start(tools, *own, check=False, DRY_RUN="0")
    assert not (tmp_path / "10:30").exists()
