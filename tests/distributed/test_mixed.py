"""A fairseq transformer and a Hugging Face one in one run, on the same batches; and what is said where they differ."""

import sys

import pytest
import torch
from helpers import codistill_command, free_ports, json_logs, run_together
from hosts import LOOPS, place

pytest.importorskip("transformers")
pytestmark = pytest.mark.hosts


def run(tmp_path, toy_data, *options):
    ports = free_ports(2)
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    fairseq = codistill_command(
        toy_data, tmp_path / "fairseq", 0, addresses, "--codistill-codec", "fp32", "--codistill-start-timeout", "120",
        "--max-epoch", "3", "--seed", "1",
    )  # fmt: skip
    other = [sys.executable, str(LOOPS / "mixed_loop.py"), str(tmp_path / "other"), "2", str(toy_data), *options]
    places = [place(model, ports, start_timeout=120) for model in range(2)]
    return run_together([fairseq, other], 280, places)


def test_a_fairseq_and_a_hugging_face_transformer_teach_each_other(tmp_path, toy_data):
    results = run(tmp_path, toy_data)
    assert [result.returncode for result in results] == [0, 0], results[0].output[-3000:] + results[1].output[-3000:]
    of_fairseq = json_logs(results[0].output, "train_inner")
    of_other = [log for log in torch.load(tmp_path / "other", weights_only=False) if "loss" in log]
    assert len(of_fairseq) == len(of_other) > 20
    for logs in (of_fairseq, of_other):
        assert all(log["codistill_peers"] == 1 and log["codistill_skipped"] == 0 for log in logs)
        assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    for one, other in zip(of_fairseq, of_other, strict=True):  # D is symmetric, and both saw the same rows
        assert one["codistill_mse"] == pytest.approx(other["codistill_mse"], abs=1e-3)
        assert one["codistill_agreement"] == pytest.approx(other["codistill_agreement"], abs=1e-3)


def test_models_whose_batches_cannot_be_the_same_are_told_what_differs(tmp_path, toy_data):
    results = run(tmp_path, toy_data, "--own-data")
    assert all(result.returncode != 0 for result in results)
    for result in results:
        assert "do not fit together; make equal" in result.output
        assert "--max-tokens" in result.output
        assert "samples of train_dataset" in result.output
        assert "target dictionary" in result.output
