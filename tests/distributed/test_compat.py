"""fairseq with the torch that is installed: decode, resume, and the checks that stay on."""

import argparse
import sys

import pytest
import torch
from helpers import USER_DIR, environment, free_ports, gloo_ranks, json_logs, run_together, train_command

from fairseq_codistill import compat
from fairseq_codistill.config import ConfigError

SECONDS = 240
CHECKS_BY_DEFAULT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


class Surprise:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("a checkpoint ran code",))


@pytest.fixture(scope="module")
def stock_run(toy_data, tmp_path_factory):
    """Folder of a plain fairseq run whose checkpoint holds a namespace and numpy arrays (from --eval-bleu)."""
    folder = tmp_path_factory.mktemp("stock")
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 5}', "--eval-bleu-detok", "space"]
    (result,) = run_together([train_command(toy_data, folder, "--max-update", "4", *bleu)], SECONDS)
    assert result.returncode == 0, result.output
    return folder


def generate(data, checkpoint, *extra):
    return [sys.executable, "-m", "fairseq_cli.generate", str(data), "--cpu", "--path", str(checkpoint),
            "--max-len-b", "5", *extra]  # fmt: skip


def test_user_dir_decodes_a_plain_checkpoint_that_torch_refuses_without_it(toy_data, stock_run):
    checkpoint = stock_run / "checkpoint_last.pt"
    commands = [generate(toy_data, checkpoint, "--user-dir", USER_DIR), generate(toy_data, checkpoint)]
    with_user_dir, without = run_together(commands, SECONDS)
    assert with_user_dir.returncode == 0, with_user_dir.output
    assert "Generate test with beam=5" in with_user_dir.output
    if CHECKS_BY_DEFAULT:
        assert without.returncode != 0
        assert "Weights only load failed" in without.output


def test_user_dir_resumes_on_two_ranks(toy_data, stock_run, tmp_path):
    command = train_command(
        toy_data, tmp_path, "--restore-file", str(stock_run / "checkpoint_last.pt"), "--user-dir", USER_DIR,
        "--max-update", "7", "--no-save", "--max-tokens", "100", "--reset-dataloader",
    )  # fmt: skip
    results = run_together(gloo_ranks(command, 2, free_ports(1)[0]), SECONDS)
    for result in results:
        assert result.returncode == 0, result.output
    assert [log["num_updates"] for log in json_logs(results[0].output, "train_inner")] == [5, 6, 7]


def test_weights_only_stays_on_for_everything_else(tmp_path):
    compat.apply()
    torch.save({"args": argparse.Namespace(value=Surprise())}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="(?i)weights.?only|unsupported"):
        torch.load(tmp_path / "bad.pt", weights_only=True)
    torch.save({"args": argparse.Namespace(value=3)}, tmp_path / "good.pt")
    assert torch.load(tmp_path / "good.pt", weights_only=True)["args"].value == 3


def test_nan_gradients_are_reported_as_such(toy_data, tmp_path):
    command = train_command(
        toy_data, tmp_path, "--user-dir", USER_DIR, "--optimizer", "sgd", "--lr", "1e20", "--max-update", "9"
    )
    (result,) = run_together([command], SECONDS)
    assert result.returncode != 0
    assert "gradients are Nan/Inf" in result.output
    assert "StopIteration" not in result.output


@pytest.mark.parametrize(("variables", "refused"), [({"WORLD_SIZE": "2"}, True), ({"WORLD_SIZE": "1"}, False)])
def test_torchrun_that_would_train_independent_models_is_refused(monkeypatch, variables, refused):
    for name, value in {"MASTER_ADDR": "x", "MASTER_PORT": "1", "RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(ConfigError, match="WORLD_SIZE is 2"):
            compat.check_world(1)
    compat.check_world(2)


def test_a_cluster_that_only_happens_to_set_world_size_is_left_alone(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    compat.check_world(1)
    assert environment()["WORLD_SIZE"] == "16"
