"""The benchmarks stay alive: each runs in its tiny form."""

import json
import subprocess
import sys
from pathlib import Path

from helpers import environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_exchange_reports_every_part_for_every_codec_and_transport(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "exchange.py"), "--tiny", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    expected = [("fp32", "zmq", 160), ("fp32", "gloo", 160), ("fp16", "zmq", 80), ("fp16", "gloo", 80)]
    assert [(row["codec"], row["transport"], row["bytes"]) for row in rows] == expected
    for row in rows:
        assert row["median_ms"].keys() == {"encode", "send", "wait", "decode"}
        assert row["median_ms"]["encode"] > 0
        assert row["median_ms"]["decode"] > 0
        assert row["share"] == row["total_ms"] / 1e3 / row["step_s"]


def test_codecs_reports_every_codec_with_the_divergences_it_serves(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "codecs.py"
    out = tmp_path / "figures.json"
    subprocess.run([sys.executable, str(script), "--tiny", "--out", str(out)], check=True, timeout=120)
    lines = {(line["codec"], line["divergence"]): line for line in json.loads(out.read_text())["lines"]}
    assert len(lines) == 17
    assert lines["fp32", "mse"]["bits_per_row"] == 3200
    assert abs(lines["fp32", "kl"]["bias"]) < 1e-6
    assert lines["columns:64", "mse"]["spread"] > 0
    assert lines["topk:8", "kl"]["bias"] < 0


def test_the_vision_loader_reports_its_speed_with_and_without_fingerprints(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "vision_loader.py"), "--tiny", "--out", str(out)]
    subprocess.run(command, check=True, timeout=120, env=environment())
    lines = json.loads(out.read_text())["lines"]
    assert [line["fingerprint"] for line in lines] == [False, True]
    assert all(line["images_per_s"] > 0 for line in lines)


def test_the_loss_allocates_no_more_than_its_goal_for_every_codec_and_number_of_models(tmp_path):
    """Peaks are exact and the same on every machine of one torch; times are not asserted."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "loss.py"), "--tiny", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert result.returncode == 0, result.stderr
    lines = json.loads(out.read_text())["lines"]
    codecs = [("fp32", "kl"), ("fp32", "mse"), ("tokens:16", "kl"), ("columns:512", "mse")]
    cases = [(line["codec"], line["divergence"], line["models"]) for line in lines]
    assert cases == [(*codec, models) for models in (2, 4) for codec in codecs]
    for line in lines:
        assert line["is_met"]["peak"], line
        assert line["peak_bytes"]["codistillation"] >= line["logits_bytes"]  # their gradient at least
        assert line["peak_bytes"]["stock"] >= 2 * line["logits_bytes"]
        assert len(line["times_s"]["stock"]["wall"]) == len(line["times_s"]["codistillation"]["wall"]) == 2
    assert [line["peers_bytes"] for line in lines if line["codec"] == "fp32"] == [
        4 * 4096 * 600 * peers for peers in (1, 1, 3, 3)
    ]
    assert "| tokens:16 | kl | 4 |" in result.stdout


def test_scaling_sends_what_the_formula_says_and_headers(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--tiny", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert result.returncode == 0, result.stderr
    [row] = json.loads(out.read_text())["rows"]
    assert row["formula_mbit"] == 4 * 10 * 32 / 1e6
    assert 0 < row["codistilled"]["mbit"] - row["formula_mbit"] < 1000 / 1e6
    assert row["without"]["mbit"] == 0
    assert row["codistilled"]["memory_mib"] > 100
