"""What is simulated in one process is what real processes learn, with dropout in every model."""

import plain_loop
import pytest
import torch
from test_plain_loop import NUM_BATCHES, run_models
from torch.utils.data import TensorDataset

from fairseq_codistill.testing import simulate

DROPOUT = 0.3
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
    options = f"--batches {NUM_BATCHES} --dropout {DROPOUT} --global-generator"
    processes = run_models(tmp_path, "m", *options.split(), num_models=num_models, data_seed=7, **settings)
    simulation = simulate(
        num_models,
        lambda index: plain_loop.make_model(DROPOUT),
        TensorDataset(*plain_loop.make_data().tensors[:2]),  # without the ids
        batch_size=plain_loop.BATCH_SIZE,
        num_updates=NUM_BATCHES,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        data_seed=7,
        **settings,
    )
    for model, process in enumerate(processes):
        assert simulation.losses[model] == pytest.approx([loss for _, loss in process["losses"]], abs=1e-6)
        assert simulation.figures[model][-2]["codistill_peers"] == num_models - 1
    assert simulation.losses[0] != simulation.losses[1]
