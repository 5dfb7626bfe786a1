"""Real fairseq runs whose validation lines say how far the models are from each other."""

from pathlib import Path

import pytest
from helpers import codistill_command, free_ports, gloo_ranks, json_logs, run_together

from fairseq_codistill.report.charts import run_charts
from fairseq_codistill.report.runs import find_runs

SECONDS = 240
COMPARED = ["valid_codistill_mse", "valid_codistill_agreement", "valid_codistill_peers"]


def addresses(world_size: int = 1) -> str:
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(2, world_size))


def test_validation_lines_hold_the_same_agreement_on_both_models_and_the_plain_loss(toy_data, tmp_path):
    """With two ranks a model whose shards are ragged; without the option nothing of a training changes."""
    outputs = {}
    for option in ([], ["--codistill-validate-agreement"]):
        where, ports, commands = addresses(2), free_ports(2), []
        for model in range(2):
            folder = tmp_path / f"{len(option)}" / str(model)
            command = codistill_command(
                toy_data, folder, model, where, "--seed", str(model + 1), "--max-epoch", "2", "--no-save",
                "--validate-interval-updates", "3", "--max-tokens-valid", "60", *option,
            )  # fmt: skip
            commands += gloo_ranks(command, 2, ports[model])
        results = run_together(commands, SECONDS)
        assert [result.returncode for result in results] == [0] * 4, results[0].output[-3000:]
        outputs[len(option)] = [results[rank].output for rank in (0, 2)]
    for without, compared in zip(*outputs.values(), strict=True):
        assert [log["valid_loss"] for log in json_logs(without, "valid")] == [
            log["valid_loss"] for log in json_logs(compared, "valid")
        ]
        assert [log["loss"] for log in json_logs(without, "train_inner")] == [
            log["loss"] for log in json_logs(compared, "train_inner")
        ]
        assert not [name for log in json_logs(without, "valid") for name in log if "codistill" in name]
    first, second = (json_logs(output, "valid") for output in outputs[1])
    assert len(first) == len(second) >= 4
    for mine, theirs in zip(first, second, strict=True):
        assert mine["valid_codistill_peers"] == theirs["valid_codistill_peers"] == 1
        assert 0 <= mine["valid_codistill_agreement"] == theirs["valid_codistill_agreement"] <= 1
        assert mine["valid_codistill_mse"] == pytest.approx(theirs["valid_codistill_mse"], rel=1e-2)
    for model, output in enumerate(outputs[1]):
        (tmp_path / f"model-{model}.log").write_text(output)
    (run,) = find_runs(Path(tmp_path))
    charts = {chart.key: chart for chart in run_charts(run)}
    assert [len(curve.points) for curve in charts["valid_codistill_agreement"].curves] == [len(first)] * 2


def test_copies_of_the_peers_predict_validation_batches(toy_data, tmp_path):
    where = addresses()
    commands = [
        codistill_command(
            toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), "--max-epoch", "2", "--no-save",
            "--codistill-exchange", "checkpoints", "--codistill-interval", "4", "--codistill-validate-agreement",
            "--codistill-replica-wait",
        )
        for model in range(2)
    ]  # fmt: skip
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output[-3000:]
        last = json_logs(result.output, "valid")[-1]
        assert [name for name in COMPARED if name in last] == COMPARED
        assert last["valid_codistill_peers"] == 1


def test_models_that_validate_at_other_updates_train_to_their_ends(toy_data, tmp_path):
    where = addresses()
    commands = [
        codistill_command(
            toy_data, tmp_path / str(model), model, where, "--seed", str(model + 1), "--max-epoch", "2", "--no-save",
            "--codistill-validate-agreement", "--validate-interval-updates", str(interval), "--codistill-timeout", "60",
        )
        for model, interval in enumerate((2, 3))
    ]  # fmt: skip
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output[-3000:]
        assert "away" not in result.output
        peers = [log["valid_codistill_peers"] for log in json_logs(result.output, "valid")]
        assert set(peers) == {0, 1}  # both at every sixth update and at the end of an epoch
        assert {log["codistill_peers"] for log in json_logs(result.output, "train_inner")} == {1}
