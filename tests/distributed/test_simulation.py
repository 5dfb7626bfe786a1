"""What is simulated in one process is what real processes learn, with dropout in every model."""

import json
import sys
from pathlib import Path

import plain_run
import pytest
from helpers import free_ports, run_together
from torch.utils.data import TensorDataset

from fairseq_codistill.testing import simulate

PROGRAM = str(Path(plain_run.__file__))
NUM_UPDATES, BATCH_SIZE = 12, 16  # three batches a pass: four passes, each in an order of its own
FORMS = {
    "fp32, three models": (3, {"codec": "fp32"}),
    "tokens, kl, interval 2, burn-in 3": (
        2,
        {"codec": "tokens:4", "divergence": "kl", "interval": 2, "burn_in": 3, "weight": 0.5, "weight_growth": 1.1},
    ),
    "checkpoints with dropout, three models": (
        3,
        {"exchange": "checkpoints", "codec": "fp32", "interval": 4, "replica_wait": True, "replica_mode": "train"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_simulated_losses_are_those_of_real_processes(form, tmp_path):
    num_models, settings = FORMS[form]
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))
    everywhere = {**settings, "num_models": num_models, "addresses": addresses, "data_seed": 2}
    commands = [
        [sys.executable, PROGRAM, str(tmp_path / f"{model}.json"), str(model), str(NUM_UPDATES), str(BATCH_SIZE),
         json.dumps(everywhere)]
        for model in range(num_models)
    ]  # fmt: skip
    for result in run_together(commands, 200):
        assert result.returncode == 0, result.output
    dataset = plain_run.make_dataset()
    simulation = simulate(
        num_models,
        plain_run.make_twin if "exchange" in settings else plain_run.make_model,
        TensorDataset(*dataset.tensors[:2]),
        batch_size=BATCH_SIZE,
        num_updates=NUM_UPDATES,
        make_optimizer=plain_run.make_optimizer,
        data_seed=2,
        seed=3,
        **settings,
    )
    for model, losses in enumerate(simulation.losses):
        real = json.loads((tmp_path / f"{model}.json").read_text())
        assert losses == pytest.approx(real, abs=1e-6)
        assert simulation.figures[model][-2]["codistill_peers"] == num_models - 1
    assert simulation.losses[0] != simulation.losses[1]
