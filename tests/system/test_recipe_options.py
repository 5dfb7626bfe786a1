"""What the scripts of the recipes make of their options, of PYTHON, and of extras that are not installed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TRANSLATION = ("multi30k_en_de", "iwslt14_de_en", "wmt16_en_de")


def run(script, *arguments, check=True, **env):
    """Run a script of the recipes as a dry run, unless told otherwise; returns what it printed on both streams."""
    ended = subprocess.run(
        ["bash", str(RECIPES / script), *map(str, arguments)],
        env={**os.environ, "DRY_RUN": "commands", "RECIPE_HAS_GPU": "no", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (ended.returncode == 0) == check, ended.stdout[-4000:]
    return ended.stdout


def trained_with(printed):
    """The words of the one command that a dry run shows."""
    (line,) = [line for line in printed.splitlines() if line.startswith("fairseq-train ")]
    return shlex.split(line)


@pytest.mark.parametrize("recipe", TRANSLATION)
def test_options_of_a_recipe_are_honoured_after_settings_of_the_training(recipe, tmp_path):
    words = trained_with(
        run(f"{recipe}/train.sh", "--lr", "1", "--arm", "plain", "--devices", "1", "--fp16", "--out", tmp_path / "x")
    )
    assert words[-3:] == ["--lr", "1", "--fp16"]
    assert words[words.index("--save-dir") + 1] == str(tmp_path / "x/0")
    assert words[words.index("--distributed-world-size") + 1] == "1"  # or fairseq would take all GPUs of the host
    assert not {"--arm", "--devices", "--out"} & set(words)


@pytest.mark.parametrize("arm", ["plain", "codistill"])
def test_the_languages_are_named_and_a_teacher_is_not_left_out_in_silence(arm, tmp_path):
    arguments = ("multi30k_en_de/train.sh", "--arm", arm, "--out", tmp_path)
    printed = run(*arguments)
    assert "--source-lang en --target-lang de" in printed
    refused = run(*arguments, "--teacher", "t.pt", check=False)
    assert f"--teacher is 't.pt', and --arm '{arm}' has no teacher; give --arm taught" in refused


def test_an_update_is_measured_by_the_last_ones_and_not_by_the_mean_of_an_epoch(tmp_path):
    lines = [f'INFO | train_inner | {{"ups": "{ups}"}}' for ups in (10, 20, 40)]
    lines.append('INFO | train | {"train_ups": "15"}')
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    asked = "source recipes/common.sh; source recipes/translation.sh; SOURCE=en TARGET=de; "
    asked += f"fairseq-train() {{ cat {tmp_path}/lines; }}; measured_step_s data $0"
    env = {**os.environ, "PYTHON": sys.executable, "RECIPE_HAS_GPU": "no"}
    command = ["bash", "-c", asked, str(tmp_path / "log.txt")]
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.stdout.strip() == "0.025", ended.stderr


def test_the_help_of_the_demo_runs_nothing(tmp_path):
    (tmp_path / ".demo").touch()
    assert "DEMO_PAIRS" in run("demo/run.sh", "--help", DEMO_OUT=str(tmp_path))
    assert (tmp_path / ".demo").exists()


def test_options_of_an_image_recipe_are_honoured_after_settings_of_the_training(tmp_path):
    printed = run(
        *(
            "imagenet/train.sh",
            "--lr",
            "1",
            "--schedule",
            "cosine",
            "--arm",
            "plain",
            "--devices",
            "1",
            "--model",
            "resnet18",
        ),
        *("--out", tmp_path / "x", "--", "--stretch", "2"),
    )
    (line,) = [line for line in printed.splitlines() if "codistill-vision " in line or "vision.train " in line]
    assert " --lr 1 --model resnet18 --stretch 2" in line
    assert f"--save-dir {tmp_path}/x/0 " in line
    assert " cosine " in line


def test_models_share_the_gpus_of_a_machine_where_it_is_asked_for():
    one_gpu = {"RECIPE_HAS_GPU": "yes", "CUDA_VISIBLE_DEVICES": "0"}
    arguments = ("cifar10/train.sh", "--arm", "codistill", "--data", "DIR")
    shared = run(*arguments, **one_gpu, SHARE_DEVICES="1")
    assert shared.count("CUDA_VISIBLE_DEVICES=0 ") == 2
    assert "cannot run here" not in shared
    elsewhere = run(*arguments, **one_gpu)  # a plan may be made on another machine
    assert (
        "# cannot run here: --num-models 2 with --devices-per-model 1 needs 2 devices, and 1 are visible" in elsewhere
    )
    assert "CUDA_VISIBLE_DEVICES=1 " in elsewhere


@pytest.mark.slow
def test_an_arm_of_another_scale_is_not_taken_for_this_one_begun_or_finished(tmp_path):
    folder = tmp_path / "imagenet/all_reduce/1"
    (folder / "0").mkdir(parents=True)
    (folder / "0/checkpoint_last.pt").touch()
    settings = "E/n, SCALE={} SMOKE=0, data images: --arm all_reduce\n"
    refusal = f"{folder} was trained with other settings: 'E/n, SCALE=small"
    arguments = ("paper/fig07.sh", "--data", "images/", "--out", tmp_path)
    (folder / "settings.txt").write_text(settings.format("small"))
    planned = run(*arguments, SEEDS="1", SCALE="full")  # which only says so
    assert refusal in planned
    assert "# model 0" in planned
    (folder / "settings.txt").rename(folder / "finished.txt")
    refused = run(*arguments, check=False, SEEDS="1", SCALE="full", DRY_RUN="0")
    assert refusal in refused
    assert "training:" not in refused
    (folder / "finished.txt").write_text(settings.format("full"))
    assert "is finished already" in run(*arguments, SEEDS="1", SCALE="full")


def test_a_smoke_test_on_one_gpu_runs_where_two_ranks_of_a_model_fit(tmp_path):
    """Ranks of one model cannot share a GPU."""
    one_gpu = "import sys, types as t\ncuda = t.SimpleNamespace(device_count=lambda: 1)\n"
    one_gpu += "sys.modules['torch'] = t.SimpleNamespace(cuda=cuda)\n"
    (tmp_path / "sitecustomize.py").write_text(one_gpu)
    asked = "source recipes/common.sh; has_gpu && echo gpu || echo cpu"
    for smoke, expected in (("1", "cpu"), ("0", "gpu")):
        env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "SMOKE": smoke}
        env.pop("RECIPE_HAS_GPU", None)
        ended = subprocess.run(["bash", "-c", asked], cwd=ROOT, env=env, capture_output=True, text=True)
        assert ended.stdout.strip() == expected, ended.stderr


def test_an_arm_that_has_not_trained_yet_takes_other_settings(tmp_path):
    for data in ("mistyped", "missing"):
        ended = run("paper/fig07.sh", "--data", data, "--out", tmp_path, check=False, SEEDS="1", DRY_RUN="0")
        assert f"--data is '{data}'; it must hold train/ and val/" in ended
        assert "was trained with other settings" not in ended


def test_what_follows_two_dashes_goes_to_the_training_whatever_its_name():
    words = trained_with(run("multi30k_en_de/train.sh", "--arm", "plain", "--", "--out", "theirs", "--help"))
    assert words[-3:] == ["--out", "theirs", "--help"]


@pytest.mark.slow
def test_a_script_of_the_paper_takes_its_options_anywhere_too(tmp_path):
    printed = run("paper/tab02.sh", "--clip-norm", "0.5", "--out", tmp_path / "x", SEEDS="1")
    assert "--clip-norm 0.5" in printed
    assert f"--save-dir {tmp_path}/x/" in printed
    assert " --out " not in printed


def test_a_python_that_is_not_there_is_named():
    printed = run("multi30k_en_de/train.sh", "--arm", "plain", check=False, PYTHON="/nope")
    assert printed == "train.sh: PYTHON is '/nope'; there is no such program\n"


@pytest.fixture
def without(tmp_path):
    """Gives the environment of a Python that lacks some modules."""

    def make(*modules):
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n")
        return {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}

    return make


@pytest.mark.parametrize(
    ("script", "arguments", "settings", "module"),
    [
        ("multi30k_en_de/prepare.sh", ("--out", "{tmp}/x"), {"SMOKE": "1"}, "num2words"),
        ("iwslt14_de_en/prepare.sh", ("--out", "{tmp}/x"), {"SMOKE": "1"}, "num2words"),
        ("demo/run.sh", (), {"DEMO_OUT": "{tmp}/x"}, "num2words"),
        ("demo/run.sh", (), {"DEMO_OUT": "{tmp}/x"}, "matplotlib"),
        ("paper/fig01.sh", ("--out", "{tmp}/x"), {"SMOKE": "1"}, "matplotlib"),
    ],
)
def test_an_extra_that_is_missing_is_one_line_before_anything_runs(
    without, tmp_path, script, arguments, settings, module
):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    settings = {name: value.format(tmp=tmp_path) for name, value in settings.items()}
    printed = run(script, *arguments, check=False, DRY_RUN="0", **settings, **without(module))
    (line,) = [line for line in printed.splitlines() if line and not line.startswith("== ")]
    assert re.fullmatch(
        rf"\w+\.sh: not installed for .*python.*: {module}; run: .* -m pip install 'fairseq-codistill\[demo\]'", line
    )


MOSES = "{root}/recipes/tools/moses.py --raw {tmp} --out {tmp} --languages de en --vocab-size 9"


@pytest.mark.parametrize(
    ("command", "module"),
    [("-m fairseq_codistill.demo.corpus --out {tmp}/corpus", "num2words"), (MOSES, "subword_nmt")],
)
def test_a_tool_whose_extra_is_missing_ends_with_one_line(without, tmp_path, command, module):
    words = command.format(tmp=tmp_path, root=ROOT).split()
    ended = subprocess.run(
        [sys.executable, *words], env={**os.environ, **without(module)}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "pip install" in ended.stderr
