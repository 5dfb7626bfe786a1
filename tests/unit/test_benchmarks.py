"""The benchmarks stay alive: each runs in its tiny form."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.benchmarks
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


@pytest.mark.benchmarks
def test_exchange_reports_whole_steps_without_and_with(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "exchange.py"), "--tiny", "--end-to-end", "--keys", "--out", str(out)]
    command += ["--transports", "zmq", "--codecs", "fp16"]
    subprocess.run(command, check=True, timeout=200, env=environment())
    figures = json.loads(out.read_text())
    assert figures["rows"] == []
    (row,) = figures["steps"]
    assert (row["codec"], row["transport"], row["keys"]) == ("fp16", "zmq", True)
    assert len(row["seconds"]["with"]["wall"]) == len(row["seconds"]["without"]["wall"]) == 3
    assert row["processor"]["with_s"] > 0


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


@pytest.mark.slow
def test_the_vision_baseline_reports_every_seed_and_the_band(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "vision_baseline.py"), "--seeds", "2", "--out", str(out), "--", "--cpu"]
    command += "--model wrn10_1 --num-workers 0 --batch-size 256".split()
    subprocess.run(command, check=True, timeout=120, env=environment())
    found = json.loads(out.read_text())
    low, high = found["band"]
    assert found["top1"].keys() == {"1", "2"}
    assert low <= min(found["top1"].values()) <= max(found["top1"].values()) <= high
    assert found["setup"]["batch of an update"] == 256


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_loss_in_half_precision_has_logits_of_half_the_size_and_a_lower_peak(tmp_path):
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "loss.py"),
        "--tiny",
        "--models",
        "2",
        "--dtype",
        "fp16",
        "--amp",
        "fp16",
    ]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=200, env=environment())
    found = json.loads(out.read_text())
    assert found["about"]["dtype"] == found["about"]["amp"] == "fp16"
    for line in found["lines"]:
        assert line["logits_bytes"] == 2 * 4096 * 600
        assert line["logits_bytes"] <= line["peak_bytes"]["codistillation"] < line["peak_bytes"]["stock"]


def run_slow_links(out, *settings):
    command = [sys.executable, str(BENCHMARKS / "slow_links.py"), "--tiny", "--out", str(out), *settings]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment())
    assert result.returncode == 0, result.stderr
    assert "failed" not in (out / "table.md").read_text(), result.stderr
    assert (out / "figure.png").stat().st_size > 0
    figures = json.loads((out / "figures.json").read_text())
    (workload,) = figures["workloads"]
    return figures["about"], workload


@pytest.mark.benchmarks
def test_slow_links_compares_methods_with_training_alone_on_loopback(tmp_path):
    about, workload = run_slow_links(tmp_path, "--loopback", "--methods", "none,fp16", "--repeats", "2")
    assert about["hosts"] == "loopback"
    (row,) = workload["rows"]
    assert row["method"] == "fp16"
    (cell,) = row["cells"]  # a rate that cannot be limited is not claimed
    assert cell["rate_mbit_s"] is None
    assert cell["interface_mbit"] is None
    ratios = [start["cells"][0]["ratio"] for start in row["starts"]]
    assert min(ratios) > 0
    assert cell["ratio"] == pytest.approx(sum(ratios) / 2)
    assert cell["ratio_error"] == pytest.approx(abs(ratios[0] - ratios[1]) / 2)
    # 4 images x 10 classes x 16 bits, and the header.
    assert cell["counted_mbit"] == pytest.approx((640 + 84 * 8) * 1e-6)


@pytest.mark.benchmarks
@pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")), reason="needs root and iproute2"
)
def test_slow_links_limits_the_link_and_counts_what_the_interface_sends(tmp_path):
    about, workload = run_slow_links(tmp_path, "--methods", "none,ddp,checkpoints", "--rates", "unlimited,5")
    if about["hosts"] == "loopback":
        pytest.skip(f"no network namespaces here: {about['why_not']}")
    all_reduce, checkpoints = workload["rows"]
    for cell in (*all_reduce["cells"], checkpoints["cells"][0]):
        assert cell["interface_mbit"] == pytest.approx(cell["counted_mbit"], rel=0.15)
        # a message at the edge of the window may leave on its other side
        assert cell["counted_mbit"] * 0.95 < cell["payload_mbit"] < cell["interface_mbit"]
    limited = all_reduce["cells"][1]
    assert limited["updates_per_s"] * limited["interface_mbit"] < 2 * 5
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(name in listed for name in about["namespaces"])


@pytest.mark.benchmarks
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or not (shutil.which("ip") and shutil.which("tc")),
    reason="needs root, tun interfaces and iproute2",
)
def test_slow_links_delays_all_reduce_and_predictions_alike(tmp_path):
    about, workload = run_slow_links(tmp_path, "--methods", "none,ddp,fp16", "--rates", "unlimited", "--delay-ms", "40")
    assert about["delay_ms"] == workload["delay_ms"] == 40
    for row in workload["rows"]:
        (cell,) = row["cells"]
        assert cell["updates_per_s"] < 1 / 0.04  # nobody has the other's at once, by gloo or by ZeroMQ
    assert "40 ms one way" in (tmp_path / "table.md").read_text()


@pytest.mark.benchmarks
def test_scaling_reports_bits_memory_and_time_of_every_number_of_models_and_devices(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--tiny", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment())
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [(row["n"], row["x"]) for row in rows] == [(3, 1), (3, 2)]
    for row in rows:
        assert row["codistilled"]["mbit"] == pytest.approx(row["formula_mbit"] + row["header_mbit"])
        assert row["alone"]["mbit"] == 0
        assert row["codistilled"]["resident_mb"] > 50
        assert row["own_cost_ms"] > 0
