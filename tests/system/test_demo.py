"""The demonstration, shortened: two codistilled models learn the embedded corpus, at length under fixed bounds."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)  # a busy machine may need far longer than an idle one

REPOSITORY = Path(__file__).parents[2]
SHORT = ["--lr", "3e-3", "--max-epoch", "4"]  # a third of the demo's epochs


def run_demo(out, num_pairs, warmup):
    """The folder that a shortened demo wrote, and what it printed."""
    ended = subprocess.run(
        ["bash", str(REPOSITORY / "recipes/demo/run.sh"), *SHORT, "--warmup-updates", str(warmup)],
        env={**os.environ, "DEMO_OUT": str(out), "DEMO_MIN_BLEU": "0", "DEMO_PAIRS": str(num_pairs)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return out, ended.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """With an eighth of its pairs."""
    return run_demo(tmp_path_factory.mktemp("demo") / "out", 500, 20)


def logged(out, model, kind):
    lines = (out / f"{model}/train.log").read_text().splitlines()
    return [json.loads(line.split(f" | {kind} | ")[1]) for line in lines if f" | {kind} | " in line]


def test_both_models_learn(demo):
    for model in (0, 1):
        perplexities = [float(record["valid_ppl"]) for record in logged(demo[0], model, "valid")]
        assert len(perplexities) == 4
        assert perplexities == sorted(perplexities, reverse=True)
        assert perplexities[-1] < 0.7 * perplexities[0]


@pytest.mark.slow
def test_both_models_learn_under_bleu_and_perplexity_bounds(tmp_path):
    out, _ = run_demo(tmp_path / "out", 4000, 200)
    models = json.loads((out / "report.json").read_text())["models"]
    assert [model["model"] for model in models] == [0, 1]
    for model in models:
        assert model["bleu"] > 25
        assert model["best_valid_ppl"] < 3.5
        assert "tok:13a" in model["bleu_signature"]


def test_bits_sent_are_those_of_the_fp16_predictions_and_fewer_than_all_reduce(demo):
    out = demo[0]
    vocab_size = len((out / "data/bin/dict.en.txt").read_text().splitlines()) + 4  # and fairseq's special symbols
    updates = logged(out, 0, "train")
    tokens_per_update = sum(float(record["train_wpb"]) for record in updates) / len(updates)
    for model in json.loads((out / "report.json").read_text())["models"]:
        expected = tokens_per_update * vocab_size * 16 / 1e6
        assert model["sent_megabits_per_update"] == pytest.approx(expected, rel=0.01)
        assert model["all_reduce_megabits_per_update"] == pytest.approx(64 * model["num_parameters"] / 1e6)
        assert model["times_fewer_bits"] > 5


def test_progress_figure_and_report_are_shown(demo):
    out, printed = demo
    for headline in ("1/4  corpus", "2/4  training", "3/4  translation", "4/4  report"):
        assert f"== {headline}" in printed
    for model in (0, 1):
        assert f"model {model}  epoch   4" in printed
        assert len((out / f"{model}/bleu.hyp").read_text().splitlines()) == 200
    assert f"figure: {out / 'curves.png'}" in printed
    assert (out / "curves.png").stat().st_size > 10_000


def test_a_folder_that_is_not_a_demo_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    ended = subprocess.run(
        ["bash", str(REPOSITORY / "recipes/demo/run.sh")],
        env={**os.environ, "DEMO_OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode != 0
    assert "is not of an earlier demo" in ended.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"
