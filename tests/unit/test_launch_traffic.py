"""The table of --dry-run: the bits a run will send, and where each number of the formulas comes from."""

import sys

import pytest

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch import cli, traffic
from fairseq_codistill.launch.plan import last_value, model_commands

FAIRSEQ = [sys.executable, "-m", "fairseq_cli.train", "data", "--seed", "{model+1}", "--save-dir", "out/{model}"]
PLUGIN = ["--user-dir", "plugin", "--task", "codistill_translation", "--criterion", "codistillation"]
OTHER = [sys.executable, "-m", "another.program", "--seed", "{model}"]
VISION = [sys.executable, "-m", "vision.train", "--seed", "{model}"]


@pytest.fixture
def data_folder(tmp_path):
    """A fairseq data folder as far as the plan looks at it: 6 German and 3 English symbols."""
    (tmp_path / "dict.de.txt").write_text("".join(f"d{index} 1\n" for index in range(6)))
    (tmp_path / "dict.en.txt").write_text("".join(f"e{index} 1\n" for index in range(3)))
    return tmp_path


def test_dry_run_prints_commands_and_bits_by_the_formulas(data_folder, capsys):
    command = [*FAIRSEQ, *PLUGIN, "--cpu", "--max-tokens", "100", "--update-freq", "2", "--target-lang", "en"]
    command[3] = str(data_folder)
    assert cli.main(["--num-models", "3", "--dry-run", "--plan-parameters", "1000000", "--", *command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# model 0", "# model 1", "# model 2"]
    assert "--codistill-model-index 2" in lines[lines.index("# model 2") + 1]
    bits = {line.split("  ")[1]: line.split("  ", 2)[2].split() for line in lines if "Mbit" in line}
    # (3 - 1) peers x 200 tokens x 7 symbols x 16 bits; 2 x 1e6 parameters x 32 bits
    assert bits["predictions fp16 T=1 (this run)"] == ["0.045", "Mbit"]
    assert bits["all_reduce fp32"] == ["64.000", "Mbit", "1,428.57"]
    assert bits["all_reduce fp16"][0] == "32.000"
    assert bits["checkpoints fp32 T=1"][0] == "64.000"
    assert bits["checkpoints fp32 T=625"][0] == "0.102"


def test_without_bits_a_dry_run_prints_the_same_commands_and_builds_no_model(monkeypatch, capsys):
    words = ["--num-models", "3", "--base-port", "29600", "--dry-run"]
    command = [*FAIRSEQ, *PLUGIN, "--cpu", "--max-tokens", "100"]
    assert cli.main([*words, "--plan-parameters", "1", "--", *command]) == 0
    with_bits = capsys.readouterr().out
    monkeypatch.delattr(cli, "traffic_report")
    assert cli.main([*words, "--no-bits", "--", *command]) == 0
    assert with_bits.startswith(capsys.readouterr().out)


def test_target_language_is_inferred_from_the_files_as_fairseq_does(data_folder):
    (data_folder / "train.en-de.en.idx").write_text("")
    classes = traffic.num_classes(["fairseq-train", f"{data_folder}:elsewhere"])
    assert classes.value == 6 + 4
    assert str(data_folder / "dict.de.txt") in classes.source


def test_vocabulary_of_the_plan_is_that_of_fairseq(data_folder):
    from fairseq.data import Dictionary

    path = data_folder / "dict.de.txt"
    path.write_text(path.read_text() + "madeupword0000 0\n")
    classes = traffic.num_classes(["fairseq-train", str(data_folder), "-t", "de"])
    assert classes.value == len(Dictionary.load(str(path)))


def test_what_is_not_known_is_said_with_the_option_that_gives_it():
    report = traffic.traffic_report([OTHER, OTHER])
    assert "unknown" in report
    for option in ("--plan-classes", "--plan-rows", "--plan-parameters"):
        assert f"give {option}" in report


def test_rows_of_an_image_job_are_its_batch_size():
    assert traffic.num_rows([*OTHER, "--batch-size", "32"]).value == 32
    assert traffic.num_rows([*FAIRSEQ, "--batch-size", "2", "--max-target-positions", "50"]).value == 100


TINY = (
    "-s de -t de --arch transformer --cpu --max-tokens 10 --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 8 "
    "--decoder-embed-dim 8 --encoder-ffn-embed-dim 8 --decoder-ffn-embed-dim 8 --encoder-attention-heads 1 "
    "--decoder-attention-heads 1 --share-all-embeddings"
).split()


def test_another_copy_of_this_package_as_the_user_dir_is_no_obstacle(data_folder, tmp_path):
    """A clone is the working folder of an installed launcher, or the other way around."""
    copy = tmp_path / "clone" / "fairseq_codistill"
    (copy / "tasks").mkdir(parents=True)
    (copy / "tasks" / "codistillation.py").write_text("")
    plugin = ["--user-dir", str(copy), "--task", "codistill_translation", "--criterion", "codistillation"]
    counted = traffic.num_parameters(["fairseq-train", str(data_folder), *TINY, *plugin])
    plain = traffic.num_parameters(["fairseq-train", str(data_folder), *TINY, "--task", "translation"])
    assert counted.value == plain.value is not None, counted.source


def test_parameters_are_counted_on_the_model_that_fairseq_builds(data_folder):
    from fairseq.data import Dictionary

    num_symbols = len(Dictionary.load(str(data_folder / "dict.de.txt")))
    command = ["fairseq-train", str(data_folder), *TINY, "--task", "translation"]
    counted = traffic.num_parameters(command)
    attention, feed_forward, norm = 4 * (8 * 8 + 8), 2 * (8 * 8 + 8), 2 * 8
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    expected = num_symbols * 8 + encoder + decoder
    # fairseq 0.12.2 keeps the weights of every encoder layer twice, for its fast inference; they are part of the model.
    assert counted.value in (expected, expected + attention + feed_forward), counted.source
    assert counted.powersgd_value == counted.value  # matrices of 8 x 8 are not worth two factors


def test_powersgd_sends_two_factors_of_a_matrix_that_is_large_enough():
    assert traffic.powersgd_numbers((1000,)) == 1000
    assert traffic.powersgd_numbers((1000, 500)) == 1500 * 4
    assert traffic.powersgd_numbers((64, 3, 7, 7)) == (64 + 147) * 4
    assert traffic.powersgd_numbers((8, 8)) == 64


def test_plan_with_a_step_time_tells_links_and_hours_for_the_codec_and_interval_of_the_command():
    command = [*OTHER, "--codistill-codec", "tokens:16", "--codistill-interval=10"]
    report = traffic.traffic_report([command] * 2, 32768, 3584, 210_000_000, plan_step_s=0.5)
    line = next(line for line in report.splitlines() if "(this run)" in line)
    # 3584 tokens x 16 draws x 16 bits / 10 = 91,750 bits; 7,200 updates an hour; a tenth of a step is 0.05 s
    assert line.split()[-6:] == ["0.092", "Mbit", "0.66", "Gbit", "1.835", "Mbit/s"]
    assert "predictions tokens:16 T=10 (this run)" in line
    assert next(line for line in report.splitlines() if "all_reduce fp32" in line).split()[2:5] == [
        "13,440.000",
        "Mbit",
        f"{2 * 210e6 * 32 / (3584 * 16 * 16 / 10):,.2f}",
    ]


@pytest.mark.parametrize(
    ("extra", "step_s"), [(["--codistill-interval", "0"], None), ([], 0.0), (["--codistill-codec", "fp12"], None)]
)
def test_a_plan_that_cannot_be_is_refused(extra, step_s):
    with pytest.raises(ConfigError, match="--codistill-interval|--plan-step-s|--codistill-codec"):
        traffic.traffic_report([[*OTHER, *extra]] * 2, plan_step_s=step_s)


def test_a_model_that_fairseq_cannot_build_is_said_with_the_reason(data_folder):
    counted = traffic.num_parameters(["fairseq-train", str(data_folder), "--arch", "transformer", "--no-such-flag"])
    assert counted.value is None
    assert "--no-such-flag" in counted.source
    assert "give --plan-parameters" in counted.source


def test_a_command_without_an_architecture_is_told_so(data_folder):
    counted = traffic.num_parameters(["fairseq-train", str(data_folder), "--task", "codistill_translation"])
    assert counted.value is None
    assert "the command has no --arch" in counted.source


def test_models_of_different_size_have_rows_of_their_own(monkeypatch):
    sizes = {"small": 10**6, "big": 10**7}
    monkeypatch.setattr(
        traffic,
        "num_parameters",
        lambda command, classes: traffic.Assumed(sizes[last_value(command, "--arch") or ""], "test"),
    )
    commands = [["p", "--arch", "small", "--seed", "1"], ["p", "--arch", "big", "--seed=2"]]
    report = traffic.traffic_report(commands, plan_classes=10, plan_rows=10)
    assert "all_reduce fp32 of model 0                           64.000 Mbit" in report
    assert "all_reduce fp32 of model 1                          640.000 Mbit" in report


def test_sizes_are_counted_once_for_models_that_differ_in_seed_and_folder():
    first, second = model_commands(FAIRSEQ, 2)
    assert traffic.same_but_for_identity(first) == traffic.same_but_for_identity(second)
    assert traffic.same_but_for_identity(["p", "--seed=1", "--lr", "1"]) == ("p", "--lr", "1")


def test_a_run_that_exchanges_checkpoints_is_planned_by_their_size(data_folder, capsys):
    command = [*FAIRSEQ, *PLUGIN, "--cpu", "--max-tokens", "100", "--codistill-exchange", "checkpoints"]
    command[3] = str(data_folder)
    options = ["--num-models", "3", "--dry-run", "--plan-parameters", "1000000", "--"]
    assert cli.main([*options, *command, "--codistill-interval", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # (3 - 1) peers x 1e6 parameters x 16 bits / 50
    assert [line.split() for line in lines if "this run)" in line] == [
        "checkpoints fp16 T=50 (this run) 0.640 Mbit".split()
    ]
    with pytest.raises(SystemExit):
        cli.main([*options, *command, "--codistill-codec", "int8"])
    assert "parameters travel as one of fp32, fp16, bf16" in capsys.readouterr().err


def test_a_loop_that_finds_its_options_in_the_environment_is_planned_by_them(monkeypatch, capsys):
    for name, value in (("CODEC", "topk:8"), ("DIVERGENCE", "kl"), ("INTERVAL", "10"), ("PEERS_PER_POSITION", "1")):
        monkeypatch.setenv(f"CODISTILL_{name}", value)
    sizes = "--plan-classes 1000 --plan-rows 128 --plan-parameters 1000".split()
    assert cli.main(["--num-models", "3", "--dry-run", *sizes, "--", "python", "loop.py", "--seed", "{model}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "this run)" in line]
    per_row = 8 * (16 + 16) + 32  # 8 logits and their classes, and the logsumexp
    assert line.split() == f"predictions topk:8 T=10 (this run) {128 * per_row / 10 / 1e6:.3f} Mbit".split()


@pytest.mark.parametrize(("budget", "sent"), [("0.01", "0.010"), ("1000", None)])
def test_a_run_with_a_budget_sends_no_more(budget, sent, capsys):
    sizes = "--plan-classes 1000 --plan-rows 512 --plan-parameters 1000".split()
    options = f"--codistill-codec counts:16 --codistill-divergence kl --codistill-budget-mbit {budget}".split()
    options += ["--seed", "{model}", "--no-save"]
    assert cli.main(["--num-models", "2", "--dry-run", *sizes, "--", "codistill-vision", *options]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "(this run" in line]
    assert ("by its budget" in line) == (sent is not None)
    if sent is not None:
        assert line.split()[-2] == sent


def test_settings_of_a_vision_run_are_read_from_its_presets_and_flags(capsys):
    command = [*VISION, "--config", "resnet50_goyal", "codistill_step", "--dataset", "imagefolder:/none", "--no-save"]
    models = ["--num-models", "2", "--dry-run", "--model-args", "1", "--model resnet18", "--"]
    assert cli.main([*models, *command, "--codistill-interval", "5"]) == 0
    printed = capsys.readouterr().out
    assert "classes: 1,000 (those of ImageNet" in printed
    assert "rows per device and update: 32" in printed
    assert "parameters of model 0: 25,557,032 (counted on resnet50)" in printed
    assert "parameters of model 1: 11,689,512 (counted on resnet18)" in printed
    bits = {line.split("  ")[1]: line.split("  ", 2)[2].split() for line in printed.splitlines() if "Mbit" in line}
    assert bits["predictions fp32 T=5 (this run)"] == ["0.205", "Mbit"]  # 32 images x 1,000 classes x 32 bits / 5
    assert bits["all_reduce fp32 of model 0"][0] == "1,635.650"


def test_one_model_on_several_devices_has_no_exchange_in_its_plan(capsys):
    command = [*VISION, "--model", "wrn10_1", "--dataset", "cifar10:/none", "--no-save"]
    assert cli.main(["--num-models", "1", "--devices-per-model", "2", "--dry-run", "--", *command]) == 0
    printed = capsys.readouterr().out
    assert "all_reduce fp32" in printed
    assert "this run)" not in printed
    assert "checkpoints" not in printed


def test_without_data_the_translation_model_is_built_with_the_vocabulary_of_the_plan(tmp_path):
    command = ["fairseq-train", str(tmp_path / "none"), "--arch", "transformer_tiny", "--share-all-embeddings"]
    small, large = (traffic.num_parameters(command, plan_classes=classes) for classes in (100, 150))
    assert large.value - small.value == 50 * 64  # one more row of 64 numbers for each symbol, shared by all embeddings


def test_an_unreadable_option_of_a_vision_run_is_named(capsys):
    command = [*VISION, "--no-save", "--codistill-codec", "zip"]
    with pytest.raises(SystemExit):
        cli.main(["--num-models", "2", "--dry-run", "--", *command])
    assert "--codistill-codec is 'zip'" in capsys.readouterr().err


def test_rows_of_a_vision_run_are_those_of_all_batches_of_an_update():
    rows = traffic.num_rows([*VISION[:3], "--no-save", "--batch-size", "32", "--update-freq", "4"])
    assert rows.value == 128
    assert "--update-freq 4" in rows.source
