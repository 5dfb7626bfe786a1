"""Fewer bits in real processes of fairseq: counts that leave out the targets, a temperature, weights by validation."""

from helpers import codistill_command, free_ports, json_logs, run_together

SECONDS = 250
SETTINGS = (
    "--codistill-divergence kl --codistill-codec counts:4 --codistill-temperature 2 "
    f"--codistill-peer-weights validation --max-update 12 --max-tokens 128 --codistill-start-timeout {SECONDS}"
)


def test_models_train_and_every_batch_is_distilled(toy_data, tmp_path):
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    commands = [
        codistill_command(
            toy_data, tmp_path / str(model), model, addresses, "--seed", str(model + 1), *SETTINGS.split()
        )
        for model in range(2)
    ]
    for result in run_together(commands, SECONDS):
        assert result.returncode == 0, result.output
        logs = json_logs(result.output, "train_inner")
        assert len(logs) == 12
        assert all(float(log["codistill_peers"]) == 1 for log in logs)
        assert all(0 < float(log["codistill_loss"]) < 100 for log in logs)
