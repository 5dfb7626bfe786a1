"""Whether a set-up is one whose result is known, and what is said where nothing is."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from fairseq_codistill.vision.baseline import BANDS, Band, Verdict, differing, judge, setup_of, trial_of
from fairseq_codistill.vision.datasets import load_images
from fairseq_codistill.vision.distributed import Place
from fairseq_codistill.vision.engine import Trainer
from fairseq_codistill.vision.exchange import PeerExchange
from fairseq_codistill.vision.models import make_model
from fairseq_codistill.vision.options import parse_options
from helpers import run_together
from vision_helpers import vision_command

from fairseq_codistill.sampling import Timetable

PLACE = Place(0, 1, torch.device("cpu"))


def setup(*flags):
    config = trial_of(parse_options(["--verify-baseline", "--model", "wrn10_1", "--num-workers", "0", *flags]))
    images = load_images(config)
    table = Timetable(len(images.train), 1, config.batch_size * config.update_freq, 1, 1, config.stretch)
    model = make_model(config, images.num_classes)
    return setup_of(Trainer(config, PLACE, images, model, table, PeerExchange(config, PLACE, table)))


def band_of(known):
    return Band("the digits", known, 90.0, 95.0, "two seeds")


@pytest.mark.parametrize(
    ("top1", "verdict", "word"),
    [(92.0, Verdict.INSIDE, "inside"), (89.9, Verdict.OUTSIDE, "outside"), (95.1, Verdict.OUTSIDE, "outside")],
)
def test_a_known_set_up_is_inside_its_band_or_not(top1, verdict, word):
    known = setup()
    found, line = judge(known, top1, (band_of(known),))
    assert found is verdict
    assert f"{word} 90.00 to 95.00 (two seeds)" in line


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 0.2",
        "--weight-decay 5e-4",
        "--batch-size 16",
        "--augmentation cifar",
        "--warmup-epochs 2 --warmup-lr 0",
        "--freeze-first-group",
        "--weight-decay 1e-4 0 --weight-decay-milestones 0.5",
        "--label-smoothing-end 0.1 --label-smoothing-decay-updates 10",
    ],
)
def test_another_set_up_is_not_known_and_told_what_differs(flags):
    found, line = judge(setup(*flags.split()), 92.0, (band_of(setup()),))
    assert found is Verdict.NOT_KNOWN
    assert "is not known for this set-up. The nearest that is known, the digits, differs in" in line


def test_what_changes_in_the_epoch_is_known_by_its_values_over_it():
    changing = setup(*"--label-smoothing 0.2 --label-smoothing-decay-updates 22".split())  # of 44 in an epoch
    assert changing["--label-smoothing"] == [0.2, 0.1, 0.0, 0.0, 0.0]
    assert setup(*"--label-smoothing 0.2 --label-smoothing-drop-epoch 1".split())["--label-smoothing"] == 0.0
    late = setup(*"--weight-decay 1e-4 0 --weight-decay-milestones 0.95".split())
    assert late["--weight-decay"] == [1e-4, 1e-4, 1e-4, 1e-4, 0.0]


def test_one_model_alone_is_tried_whoever_would_teach_it():
    flags = (
        "--codistill-num-models 2 --codistill-addresses a:1,b:2 --codistill-teacher t.pt --codistill-teacher-cache c"
    )
    config = trial_of(parse_options(["--verify-baseline", *flags.split()]))
    assert not config.is_taught


def test_what_does_not_matter_in_the_first_epoch_does_not_matter():
    assert not differing(setup(), setup("--seed", "7", "--epochs", "45", "--lr-milestones", "18", "38", "44"))
    later = (
        "--weight-decay 1e-4 0 --weight-decay-milestones 1 --label-smoothing-end 0.1 --label-smoothing-decay-epochs 2"
    )
    assert not differing(setup(), setup(*later.split()))
    assert not differing(setup("--batch-size", "16"), setup("--batch-size", "8", "--update-freq", "2"))


def test_of_imagenet_only_what_was_published_is_told():
    known = {**setup(), "--model": "resnet50", "--dataset": "imagefolder", "classes": 1000, "--image-size": 224}
    found, line = judge(known, 20.0)
    assert found is Verdict.NOT_KNOWN
    assert "not known" in line
    assert "after all 90 epochs" in line


def test_the_command_trains_one_epoch_alone_writes_nothing_and_judges(tmp_path):
    flags = "--verify-baseline --stretch 4 --batch-size 16 --lr 0.02 --lr-batch-size 0 --codistill-num-models 2".split()
    flags += "--codistill-addresses 127.0.0.1:1,127.0.0.1:2 --max-updates 7".split()
    (result,) = run_together([vision_command(tmp_path / "none", *flags)], timeout_s=200)
    assert result.returncode == Verdict.INSIDE, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("baseline: ")]
    assert "results/baseline" in line
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("band", BANDS, ids=[band.name for band in BANDS])
def test_every_band_is_what_was_measured(band):
    measured = json.loads((Path(__file__).parents[2] / band.source.split(", ")[1]).read_text())
    assert band.setup == measured["setup"]
    assert [band.low, band.high] == measured["band"]
    assert len(measured["top1"]) == 8
    mean, deviation = (f(measured["top1"].values()) for f in (statistics.mean, statistics.stdev))
    assert [band.low, band.high] == pytest.approx([mean - 4 * deviation, min(100, mean + 4 * deviation)], abs=0.02)
