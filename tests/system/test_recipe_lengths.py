"""How long every arm of every figure trains, where its rates drop, what its weight decay is: from the printed commands.

A stand-in for ``codistill-launch`` prints what it was asked to start, so that all scripts are read in seconds.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_codistill.vision.config import VisionConfig
from fairseq_codistill.vision.options import parse_options

from fairseq_codistill.sampling import Timetable

RECIPES = Path(__file__).parents[2] / "recipes"
IMAGES = {"full": 1_281_167, "small": 10_000}
ALL_REDUCE_EPOCHS, EPOCHS = 90, 45
UPDATES = {"full": 225_180, "small": 7_020}  # 45 epochs of batches of 256, of 64
TUNED, GOYAL = [18, 38, 44], [15, 30, 40]
FALLING = [5e-4, 1e-5, 0]
PROGRAMS = ("codistill-vision", "fairseq_codistill.vision.train")

LAUNCHER = """#!{python}
import json, sys
print("LAUNCHED", json.dumps(sys.argv[1:]))
"""


@dataclasses.dataclass
class Training:
    """One training as its command has it; of several models, the first."""

    command: list[str]
    scale: str

    def __post_init__(self):
        split = self.command.index("--")
        launcher, words = self.command[:split], self.command[split + 1 :]
        self.num_models, self.devices = (
            int(launcher[launcher.index(flag) + 1]) for flag in ("--num-models", "--devices-per-model")
        )
        self.model_args = {
            int(launcher[i + 1]): launcher[i + 2] for i, word in enumerate(launcher) if word == "--model-args"
        }
        self.words = [re.sub(r"\{model\+?(\d*)\}", lambda found: str(int(found[1] or 0)), word) for word in words]

    def value(self, flag):
        """Of the last time that it stands there; None where it does not."""
        return self.words[len(self.words) - self.words[::-1].index(flag)] if flag in self.words else None

    @property
    def options(self) -> VisionConfig:
        own = self.model_args.get(0, "").split()
        (start,) = [i for i, word in enumerate(self.words) if Path(word).name in PROGRAMS]
        return parse_options([*self.words[start + 1 :], *own])

    @property
    def updates(self):
        options = self.options
        images = IMAGES[self.scale] if "wrn28" not in options.model else 50_000
        table = Timetable(images, options.data_divisor, options.batch_size, self.devices, 1, options.stretch)
        return round(options.epochs * table.updates_per_epoch)

    @property
    def passes(self):
        """Runs through the whole data, or as many images as that."""
        options = self.options
        return self.updates * options.batch_size * self.devices / IMAGES[self.scale]


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "codistill-launch").write_text(LAUNCHER.format(python=sys.executable))
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return folder


def start(tools, script, *arguments, scale="full", check=True, **more):
    """What a script prints when nothing is trained."""
    env = {"PYTHON": str(tools / "python"), "DRY_RUN": "1", "SEEDS": "1", "SCALE": scale, "RECIPE_HAS_GPU": "yes"}
    ended = subprocess.run(
        ["bash", str(RECIPES / script), *map(str, arguments)],
        env={**os.environ, **env, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (ended.returncode == 0) == check, ended.stdout[-2000:]
    return ended.stdout


def trainings(tools, script, *arguments, scale="full"):
    """name of the arm -> its trainings."""
    found: dict[str, list[Training]] = {}
    for line in start(tools, script, *arguments, scale=scale).splitlines():
        if line.startswith("LAUNCHED "):
            command = json.loads(line.removeprefix("LAUNCHED "))[1:]  # after --dry-run
            training = Training(command[command.index("--num-models") :], scale)
            parts = Path(training.value("--save-dir")).parts
            found.setdefault(parts[-3] if script.startswith("paper") else parts[-2], []).append(training)
        elif line.startswith("fairseq-train "):
            raise AssertionError("a plain translation arm is not started by the launcher")
    return found


def one(found):
    [training] = found
    return training


# Scripts in which every arm makes as many updates as one of two models in 45 epochs.
@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize(
    "script", ["fig01", "fig02", "fig03", "fig05", "fig07", "fig08", "fig13", "fig14", "fig16", "frontier"]
)
def test_all_reduce_has_90_epochs_and_every_other_arm_45_of_half_the_batch(tools, script, scale):
    arms = trainings(tools, f"paper/{script}.sh", scale=scale)
    assert len(arms) >= 2
    for name, found in arms.items():
        training = one(found)
        is_all_reduce = "all_reduce" in name or name.startswith("hook")
        assert training.updates == UPDATES[scale], name
        assert training.passes == pytest.approx(ALL_REDUCE_EPOCHS if is_all_reduce else EPOCHS, rel=0.01), name
        assert (training.num_models == 1) == (is_all_reduce or "plain" in name or "alone" in name), name


@pytest.mark.parametrize("scale", ["full", "small"])
@pytest.mark.parametrize("script", ["fig01", "fig03", "fig05", "fig13", "fig14", "fig16", "fig17", "frontier"])
def test_codistilled_arms_take_the_tuned_drops_and_weight_decay_falls_at_them(tools, script, scale):
    codistilled = [
        one(found).options
        for found in trainings(tools, f"paper/{script}.sh", scale=scale).values()
        if one(found).num_models > 1
    ]
    assert codistilled
    for options in codistilled:
        assert options.epochs == EPOCHS
        assert options.lr_milestones == TUNED
        assert options.weight_decay == FALLING
        assert options.weight_decay_milestones == TUNED[:2]
        assert options.warmup_epochs == 2.5
        assert options.lr_schedule == ("cosine" if script == "fig03" else "step")


def test_all_reduce_drops_where_goyal_et_al_do(tools):
    options = one(trainings(tools, "paper/fig01.sh")["all_reduce"]).options
    assert (options.epochs, options.lr_milestones, options.weight_decay) == (90, [30, 60, 80], [1e-4])
    assert options.warmup_epochs == 5


@pytest.mark.parametrize("scale", ["full", "small"])
def test_figure_2_changes_one_thing_at_a_time(tools, scale):
    arms = {name: one(found).options for name, found in trainings(tools, "paper/fig02.sh", scale=scale).items()}
    for start_value in ("5e-4", "1e-4"):
        constant, falling = arms[f"constant_decay_{start_value}"], arms[f"falling_decay_{start_value}"]
        assert constant.weight_decay == [float(start_value)]
        assert falling.weight_decay == [float(start_value), 1e-5, 0]
        assert falling.weight_decay_milestones == GOYAL[:2]
        assert constant.lr_milestones == falling.lr_milestones == GOYAL
        later = arms["predictions_1" if start_value == "5e-4" else "shifted_codistilled"]
        differing = {f.name for f in dataclasses.fields(later) if getattr(later, f.name) != getattr(falling, f.name)}
        assert differing == {"lr_milestones", "weight_decay_milestones", "save_dir"}


def test_figure_7_keeps_weight_decay_in_every_arm(tools):
    arms = {name: one(found).options for name, found in trainings(tools, "paper/fig07.sh").items()}
    assert set(arms) == {"all_reduce", "constant_decay_1e-4", "plain_step"}
    assert all(options.weight_decay == [1e-4] for options in arms.values())
    assert arms["plain_step"].lr_milestones == arms["constant_decay_1e-4"].lr_milestones == GOYAL


def test_figures_8_and_9_have_both_architectures_at_the_values_of_appendix_a4(tools):
    arms = {name: one(found).options for name, found in trainings(tools, "paper/fig08.sh").items()}
    assert {options.model for options in arms.values()} == {"resnet50", "resnext101_32x8d"}
    for name in ("shifted_codistilled", "large_shifted_codistilled"):
        assert arms[name].weight_decay == [1e-4, 1e-5, 0]
        assert arms[name].weight_decay_milestones == TUNED[:2]
        assert arms[name].lr_milestones == TUNED


def test_the_other_resnext_can_be_asked_for(tools, monkeypatch):
    monkeypatch.setenv("RESNEXT", "resnext101_32x4d")
    arms = trainings(tools, "paper/fig03.sh")
    assert one(arms["cosine_large_codistilled"]).options.model == "resnext101_32x4d"
    preset = one(trainings(tools, "imagenet/train.sh", "--arm", "plain", "--preset", "resnext101_goyal")["plain"])
    assert preset.options.model == "resnext101_32x8d"


def test_figure_14_has_three_of_one_architecture_beside_three_different_ones(tools):
    arms = {name: one(found) for name, found in trainings(tools, "paper/fig14.sh").items()}
    assert {name: training.num_models for name, training in arms.items()} == {
        "predictions_1": 2, "three_alike": 3, "three_architectures": 3, "two_architectures": 2
    }  # fmt: skip
    assert arms["three_alike"].model_args == {}
    assert list(arms["three_architectures"].model_args.values()) == [
        "--model resnet18", "--model resnet50", "--model resnext101_32x8d"
    ]  # fmt: skip


@pytest.mark.parametrize("scale", ["full", "small"])
def test_figure_2c_keeps_the_epochs_whatever_the_batch(tools, scale):
    for found in trainings(tools, "paper/fig02c.sh", scale=scale).values():
        assert one(found).passes == pytest.approx(EPOCHS, rel=0.03)  # a ragged last batch is left out
        assert one(found).options.lr_milestones == TUNED


@pytest.mark.parametrize("scale", ["full", "small"])
def test_figure_17_has_one_model_alone_with_as_few_updates(tools, scale):
    arms = {name: one(found) for name, found in trainings(tools, "paper/fig17.sh", scale=scale).items()}
    assert arms["alone"].updates == UPDATES[scale]
    for models in (2, 4, 8):
        shortened, alone = arms[f"shortened_{models}"], arms[f"shortened_alone_{models}"]
        assert shortened.num_models == models
        assert shortened.updates == alone.updates == pytest.approx(UPDATES[scale] / models, rel=0.03)
        assert shortened.options.lr_milestones == alone.options.lr_milestones == TUNED
        for name in ("weight_decay", "weight_decay_milestones", "lr", "warmup_epochs"):  # they differ in teaching alone
            assert getattr(shortened.options, name) == getattr(alone.options, name)


@pytest.mark.parametrize("scale", ["full", "small"])
def test_figure_6_shows_every_split_to_one_model_for_every_n(tools, scale):
    arms = trainings(tools, "paper/fig06.sh", scale=scale)
    updates = arms["all_channels"][0].updates
    for group in ("frozen", "pretrained", "random"):
        for n in (1, 2, 4, 8):
            groups = arms[f"{group}_{n}"]
            assert [training.num_models for training in groups] == [n] * (8 // n)
            views = [[args.split()[-1] for args in training.model_args.values()] for training in groups]
            if group == "random":  # there is no common first group to cut
                assert views == [[str(number)] * n for number in range(8 // n)]
            else:
                assert sorted(view for seen in views for view in seen) == [str(split) for split in range(8)]
            assert [training.value("--save-dir")[-1] for training in groups] == [str(g * n) for g in range(8 // n)]
            assert {training.updates for training in groups} == {updates}
    if scale == "full":
        assert updates == 200 * (50_000 // 128)


def test_local_steps_begin_where_the_learning_rate_first_drops(tools):
    for scale in ("full", "small"):
        options = one(trainings(tools, "paper/frontier.sh", scale=scale)["hook_localsgd"]).options
        assert options.hook_start_epochs == options.lr_milestones[0] == 30


def test_a_figure_of_batches_takes_none_from_outside(tools):
    for option in (["--devices", "1"], ["--batch-size=8"], ["--update-freq", "8"]):
        said = start(tools, "paper/fig02c.sh", "--data", "DIR", *option, check=False)
        assert f"{option[0].partition('=')[0]} cannot be given to this figure: the batch is what" in said


@pytest.mark.parametrize("scale", ["full", "small"])
def test_in_the_frontier_of_translation_label_smoothing_decays_in_every_codistilled_arm(tools, scale):
    arms = trainings(tools, "paper/frontier_translation.sh", scale=scale)
    taught = {name: one(found) for name, found in arms.items() if one(found).num_models > 1}
    assert len(taught) == 6
    for name, training in taught.items():
        flags = [word for word in training.words if word.startswith("--label-smoothing-decay-")]
        assert flags, name
        assert all(float(training.value(flag)) > 0 for flag in flags), name
        assert ("decaying" in name) == (scale == "small")


@pytest.mark.parametrize("models", [2, 3, 4])
def test_one_of_n_models_has_an_nth_of_the_epochs_and_all_reduce_all(tools, models):
    count = ("--models", str(models))
    found = [
        one(trainings(tools, "imagenet/train.sh", "--arm", arm, *count)[arm])
        for arm in ("plain", "codistill", "all_reduce")
    ]
    assert [training.passes for training in found] == pytest.approx([90 / models, 90 / models, 90], rel=0.01)
    assert len({training.updates for training in found}) == 1
    found = [
        one(trainings(tools, "cifar10/train.sh", "--preset", "wrn28_10_cifar", "--arm", arm, *count)[arm])
        for arm in ("plain", "codistill", "all_reduce")
    ]
    assert [training.updates for training in found] == pytest.approx([200 * 390 / models] * 3, rel=0.01)


def test_the_learning_rate_follows_the_own_or_the_effective_batch(tools):
    def rate(training):
        options = training.options
        return options.lr * options.batch_size * training.devices / options.lr_batch_size

    arms = {
        (kind, arm): one(trainings(tools, "imagenet/train.sh", "--arm", arm, "--rate", kind)[arm])
        for kind in ("own", "effective")
        for arm in ("codistill", "all_reduce")
    }
    assert {key: rate(training) for key, training in arms.items()} == {
        ("own", "codistill"): 0.1, ("own", "all_reduce"): 0.2,
        ("effective", "codistill"): 0.2, ("effective", "all_reduce"): 0.2,
    }  # fmt: skip


def test_the_effective_rate_is_that_of_the_preset_and_of_a_number_of_models_that_divides_its_batch(tools):
    def lr_batch_size(*arguments):
        arm = trainings(tools, "imagenet/train.sh", "--arm", "plain", "--rate", "effective", *arguments)["plain"]
        return one(arm).options.lr_batch_size

    assert lr_batch_size("--preset", "wrn16_1_goyal") == 32
    assert lr_batch_size("--one-of", "8") == 32
    said = start(tools, "imagenet/train.sh", "--arm", "plain", "--rate", "effective", "--models", "3", check=False)
    assert "with M = 3 (--one-of, or --models), which does not divide 256, the lr_batch_size of --preset" in said
    assert said.count("\n") == 1


def test_models_of_several_architectures_are_as_many_as_named_and_teach_each_other(tools):
    mixed = ("--mixed", "resnet18,resnet50")
    said = start(tools, "imagenet/train.sh", "--arm", "all_reduce", *mixed, check=False)
    assert "--mixed is 'resnet18,resnet50' with --arm all_reduce, which trains one model: give that as --model" in said
    for options in ((*mixed, "--models", "4"), ("--models", "4", *mixed, "--models", "3")):
        said = start(tools, "imagenet/train.sh", "--arm", "codistill", *options, check=False)
        assert "leave --models out, it is the number of names" in said


def test_taught_translation_models_lose_their_label_smoothing(tools):
    for script in ("tab02", "a07"):
        for scale in ("full", "small"):
            found = [t for many in translation(tools, script, scale).values() for t in many if t.num_models > 1]
            assert found
            assert all(float(training.value("--label-smoothing")) == 0 for training in found)
    codistilled = one(translation(tools, "fig04", "full")["codistill"])
    assert (codistilled.value("--label-smoothing"), codistilled.value("--label-smoothing-decay-updates")) == (
        "0.1", "30000"
    )  # fmt: skip
    recipe = one(trainings(tools, "iwslt14_de_en/train.sh", "--arm", "codistill")["codistill"])
    assert recipe.value("--label-smoothing") == "0"


@pytest.mark.parametrize("recipe", ["wmt16_en_de", "multi30k_en_de", "iwslt14_de_en"])
def test_a_taught_model_of_several_devices_is_trained_on_all_of_them(tools, recipe):
    arguments = ("--arm", "taught", "--teacher", "t.pt", "--devices", "4")
    taught = one(trainings(tools, f"{recipe}/train.sh", *arguments)["taught"])
    plain = one(trainings(tools, f"{recipe}/train.sh", "--arm", "plain", "--devices", "4")["plain"])
    assert (taught.num_models, taught.devices) == (plain.num_models, plain.devices) == (1, 4)
    assert taught.value("--codistill-teacher") == "t.pt"
    assert taught.value("--update-freq") == plain.value("--update-freq")


@pytest.mark.parametrize("scale", ["full", "small"])
def test_figures_share_an_arm_only_where_it_is_the_same_training(tools, scale):
    seen: dict[str, list[str]] = {}
    for script in ("fig04", "frontier_translation", "fig12"):
        for name, found in translation(tools, script, scale).items():
            command = one(found).command
            assert seen.setdefault(name, command) == command, (script, name)
    assert len(seen) >= 7


def translation(tools, script, scale):
    """As :func:`trainings`, with arms that plain fairseq trains left out."""
    printed = start(tools, f"paper/{script}.sh", scale=scale)
    found: dict[str, list[Training]] = {}
    for line in printed.splitlines():
        if line.startswith("LAUNCHED "):
            command = json.loads(line.removeprefix("LAUNCHED "))
            training = Training(command[command.index("--num-models") :], scale)
            found.setdefault(Path(training.value("--save-dir")).parts[-3], []).append(training)
    return found


@pytest.mark.parametrize("recipe", ["iwslt14_de_en", "wmt16_en_de"])
def test_the_growth_of_alpha_ends(tools, recipe):
    training = one(trainings(tools, f"{recipe}/train.sh", "--arm", "codistill")["codistill"])
    assert float(training.value("--codistill-weight-growth")) == 1.1
    assert float(training.value("--codistill-weight-max")) == 10


def test_an_update_of_all_reduce_is_that_of_ott_et_al_and_one_of_two_models_has_half(tools):
    tokens = {}
    for arm in ("codistill", "all_reduce"):
        training = one(trainings(tools, "wmt16_en_de/train.sh", "--arm", arm)[arm])
        tokens[arm] = training.devices * int(training.value("--update-freq")) * int(training.value("--max-tokens"))
        assert training.value("--max-update") == "30000"
    assert tokens == {"all_reduce": 128 * 3584, "codistill": 64 * 3584}


def test_epochs_of_translation_are_an_nth_for_one_of_n_models(tools):
    epochs = {
        arm: int(one(trainings(tools, "multi30k_en_de/train.sh", "--arm", arm)[arm]).value("--max-epoch"))
        for arm in ("codistill", "all_reduce")
    }
    assert epochs == {"all_reduce": 60, "codistill": 30}
    table = translation(tools, "tab02", "small")
    assert {name: int(one(found).value("--max-epoch")) for name, found in table.items()} == {"n_2": 20, "n_4": 20}
    said = start(tools, "multi30k_en_de/train.sh", "--arm", "codistill", "--models", "7", check=False)
    assert "60/7 epochs, which is no whole number" in said
