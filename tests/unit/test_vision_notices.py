"""What a user is told before the first update."""

import dataclasses

import pytest
from fairseq_codistill.vision import notices
from fairseq_codistill.vision.config import VisionConfig
from fairseq_codistill.vision.options import parse_options

MODELS = "--no-save --codistill-num-models 2 --codistill-addresses 127.0.0.1:1,127.0.0.1:2".split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--codistill-interval 100", "nothing will be exchanged after the first one"),
        ("--codistill-burn-in 100", "nothing will be exchanged"),
        ("--codistill-codec columns:10", "there are 10 classes: all of them will be sent"),
        ("--codistill-codec topk:12 --codistill-divergence kl", "all of them will be sent"),
    ],
)
def test_a_setting_that_exchanges_nothing_or_everything_is_one_line(flags, message):
    (notice,) = notices.of_run(parse_options([*MODELS, *flags.split()]), num_updates=100, num_classes=10)
    assert message in notice
    assert flags.split()[0] in notice


@pytest.mark.parametrize("flags", ["", "--codistill-interval 99 --codistill-codec columns:9", "--codistill-weight 0"])
def test_ordinary_settings_are_no_news(flags):
    assert notices.of_run(parse_options([*MODELS, *flags.split()]), num_updates=100, num_classes=10) == []


def test_one_model_alone_is_told_nothing_of_the_exchange():
    assert notices.of_run(parse_options("--no-save --codistill-interval 1000".split()), 100, 10) == []


def test_a_run_that_goes_on_with_other_options_is_told_old_and_new():
    before = dataclasses.asdict(VisionConfig())
    now = {**before, "codistill_codec": "int8", "codistill_interval": 5, "lr": 3.0}
    assert notices.of_resumption(before, now) == [
        "--codistill-codec is 'int8'; up to the checkpoint it was 'fp16'",
        "--codistill-interval is 5; up to the checkpoint it was 1",
    ]
    del before["codistill_codec"]
    assert len(notices.of_resumption(before, now)) == 1
