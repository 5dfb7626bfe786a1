"""Options of vision: presets, flags that win, and settings that cannot work."""

import dataclasses
import subprocess
import sys

import pytest
from fairseq_codistill.vision.options import PRESETS, make_parser, parse_options, read_config

from fairseq_codistill.config import ConfigError


def test_the_vision_package_never_loads_fairseq():
    code = (
        "import sys, vision.train; print([name for name in sys.modules if name.split('.')[0] in ('fairseq', 'hydra')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_preset_is_valid():
    names = [path.name for path in PRESETS.glob("*.yaml")]
    assert len(names) >= 7
    for name in names:
        parse_options(["--config", name, "--no-save"])


def test_presets_add_up_and_the_command_line_wins():
    config = parse_options(
        "--config resnet50_goyal.yaml codistill_a4 --no-save --dataset imagefolder:x --lr 0.2".split()
    )
    assert (config.model, config.lr, config.epochs, config.warmup_epochs) == ("resnet50", 0.2, 45, 2.5)
    assert config.lr_milestones == config.weight_decay_milestones + [44] == [18, 38, 44]
    assert config.weight_decay == [1e-4, 1e-5, 0]


def test_every_field_is_a_flag_and_a_key_and_its_default_is_kept(tmp_path):
    default = parse_options(["--no-save"])
    file = tmp_path / "all.yaml"
    import yaml

    file.write_text(yaml.safe_dump(dataclasses.asdict(default)))
    assert parse_options(["--config", str(file)]) == default
    flags = make_parser().format_help()
    assert all("--" + name.replace("_", "-") in flags for name in dataclasses.asdict(default))


def test_help_is_grouped_and_shows_choices_defaults_and_examples():
    text = make_parser().format_help()
    titles = ["data:", "model:", "training:", "label smoothing:", "codistillation:", "run:", "examples:"]
    at = [text.index(f"\n{title}\n") for title in titles]
    assert at == sorted(at)
    assert at[1] < text.index("\n  --model TEXT") < at[2] < text.index("\n  --lr X") < at[3]
    divergences = "--codistill-divergence {mse,kl,reverse_kl,js}"
    for shown in ("--amp {none,bf16,fp16}", divergences, "--codistill-transport {zmq,gloo}"):
        assert shown in text
    assert "[32]" in text[text.index("--batch-size N") :][:200]
    examples = text[at[-1] :]
    assert examples.count("codistill-vision") == 2
    assert "codistill-launch --num-models 2" in examples


def test_a_flag_that_cannot_be_read_is_one_line_without_usage(capsys):
    for flags, message in (
        (["--epochs", "many"], "argument --epochs: invalid float value: 'many'"),
        (["--codistill-interval", "1.5"], "argument --codistill-interval: invalid int value: '1.5'"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
        (["--modle", "resnet18"], "did you mean --model?"),
        (["resnet18"], "unrecognized arguments: resnet18; codistill-vision --help"),
        (["--amp", "fp8"], "--amp is 'fp8'; it must be one of none, bf16, fp16"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_options([*flags, "--no-save"])
    assert capsys.readouterr().err == ""


def test_a_switch_that_is_on_in_a_preset_can_be_turned_off():
    assert parse_options("--config resnet50_goyal --no-save".split()).channels_last
    assert not parse_options("--config resnet50_goyal --no-save --no-channels-last".split()).channels_last
    assert parse_options(["--no-save"]).no_save


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1", "'learning_rate' is no option"),
        ("weight_decays: 1", "did you mean 'weight_decay'"),
        ("epochs: many", "epochs is 'many'; it must be of type float"),
        ("batch_size: 1.5", "batch_size is 1.5; it must be of type int"),
        ("channels_last: 1", "channels_last is 1; it must be of type bool"),
        ("amp: fp8", "--amp is 'fp8'; it must be one of none, bf16, fp16"),
        ("- a", "it must hold 'option: value' lines"),
        ("a: [", "while parsing"),
    ],
)
def test_a_preset_with_a_mistake_is_refused(tmp_path, content, message):
    file = tmp_path / "mistake.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        parse_options(["--config", str(file), "--no-save"])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_of_options_in_another_encoding_is_one_line(tmp_path, encoding):
    file = tmp_path / "umlaut.yaml"
    file.write_text("save_dir: Übung", encoding=encoding)
    with pytest.raises(ConfigError, match=f"--config {file}: it is not UTF-8 .* at byte [0-9]+"):
        read_config(str(file))


def test_a_preset_is_taken_by_its_name_and_not_for_a_file_of_the_same_name_that_is_not_there(tmp_path):
    for name in ("cosine", "cosine.yaml", "vision/configs/cosine.yaml", "somewhere/vision/configs/cosine.yaml"):
        assert read_config(name)["lr_schedule"] == "cosine"
    for path in ("my/cosine.yaml", "./cosine.yaml", str(tmp_path / "cosine"), "configs/cosine.yaml"):
        with pytest.raises(ConfigError, match=f"--config {path}: no such file, and no preset of that name"):
            read_config(path)


def test_numbers_are_read_as_people_write_them(tmp_path):
    file = tmp_path / "numbers.yaml"
    file.write_text("weight_decay: 1e-4\nlr: 1\ncodistill_codec: tokens:4\nview: 3")
    assert read_config(str(file)) == {
        "weight_decay": [1e-4],
        "lr": 1.0,
        "codistill_codec": "tokens:4",
        "view": "3",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--save-dir is not set"),
        ("--config none_such --no-save", "the presets are"),
        ("--no-save --dataset mnist", "--dataset is 'mnist'"),
        ("--no-save --dataset imagefolder", "say where the images are: imagefolder:DIR"),
        ("--no-save --dataset digits:x", "write 'digits'"),
        ("--no-save --data-fraction 2/3", "--data-fraction is '2/3'"),
        ("--no-save --data-fraction 0.5", "it must be 1 or 1/k"),
        ("--no-save --weight-decay 1e-4 0", "--weight-decay has 2 values and --weight-decay-milestones 0"),
        ("--no-save --lr-milestones 60 30", "epochs must ascend"),
        ("--no-save --epochs 0", "--epochs is 0.0"),
        ("--no-save --stretch 0", "--stretch is 0.0"),
        ("--no-save --epochs nan", "--epochs is nan"),
        ("--no-save --epochs 1e308", "--epochs is 1e+308; it must be more than 0, and at most 1e+09"),
        ("--no-save --eval-epochs 1e308", "--eval-epochs is 1e+308"),
        ("--no-save --seed 18446744073709551616", "--seed is 18446744073709551616; it must be below 2 to the power"),
        ("--no-save --codistill-data-seed 9223372036854775808", "--codistill-data-seed is 9223372036854775808"),
        ("--no-save --skip-broken", "--skip-broken is set, but --dataset is 'digits', which has no files"),
        ("--no-save --batch-size 0", "--batch-size is 0"),
        ("--no-save --view 8", "a number from 0 to 7"),
        ("--no-save --model-kwargs depth", "--model-kwargs has 'depth'"),
        ("--no-save --drop-rate 1", "--drop-rate is 1.0"),
        ("--no-save --comm-hook powersgd --hook-start 1", "powersgd needs at least 2"),
        ("--no-save --comm-hook post_localsgd --epochs 9 --hook-start-epochs 9", "post_localsgd would never begin"),
        ("--no-save --comm-hook powersgd --amp fp16", "give --amp bf16, or --comm-hook fp16"),
        ("--no-save --comm-hook post_localsgd --amp fp16", "whose overflows it does not survive"),
        ("--no-save --codistill-num-models 2", "--codistill-addresses"),
        ("--no-save --update-freq 0", "--update-freq is 0"),
        ("--no-save --ema-decay 1", "--ema-decay is 1.0"),
        ("--no-save --max-nonfinite -1", "--max-nonfinite is -1"),
        ("--no-save --mixup 0.2 --batch-size 3", "pair the images of a batch; make it even"),
        ("--no-save --pretrained --initial-checkpoint x", "give one of them"),
        ("--no-save --first-group x --initial-checkpoint y", "--first-group is 'x' and --initial-checkpoint 'y'"),
        (
            "--no-save --codistill-num-models 2 --codistill-addresses 127.0.0.1:29600,127.0.0.1:29700 "
            "--transfer-dataset digits --codistill-lookahead",
            "--codistill-lookahead with --transfer-dataset 'digits'",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named(flags, message):
    with pytest.raises(ConfigError) as error:
        parse_options(flags.split())
    assert message in str(error.value)


def test_broken_images_of_a_transfer_set_may_be_skipped_beside_data_without_files():
    parse_options("--no-save --skip-broken --transfer-dataset imagefolder:DIR".split())


def test_files_of_options_add_up_however_often_the_flag_is_given():
    once = parse_options("--no-save --config resnet50_goyal cosine".split())
    twice = parse_options("--no-save --config resnet50_goyal --config cosine".split())
    assert twice == once
    assert (once.model, once.lr_schedule) == ("resnet50", "cosine")
