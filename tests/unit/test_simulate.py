"""Simulated runs: repeatable, without a trace outside, and with the faults of real ones."""

import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fairseq_codistill.config import ConfigError
from fairseq_codistill.sampling import Numbered
from fairseq_codistill.testing import Simulation, simulate

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, torch.arange(20) % 3)


def make_model(index):
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def run(num_models=2, make_model=make_model, num_updates=5, **settings):
    return simulate(
        num_models,
        make_model,
        DATA,
        batch_size=8,
        num_updates=num_updates,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        **settings,
    )


def test_a_simulation_repeats_exactly_and_leaves_the_random_numbers_of_the_caller_alone():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    drawn = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    first = run(3, codec="fp32")
    assert (torch.rand(1), random.random(), np.random.rand()) == drawn
    second = run(3, codec="fp32")
    assert first.losses == second.losses
    assert first.figures[0][-1]["codistill_peers"] == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"codec": "fp32"},
        {"codec": "topk:2", "divergence": "kl", "interval": 2},
        {"exchange": "checkpoints", "codec": "fp32", "interval": 2, "replica_wait": True},
    ],
    ids=lambda settings: settings["codec"],
)
def test_models_that_exchange_nothing_learn_what_each_learns_alone(settings):
    """Numbers drawn for one model are not missing in another: with α = 0, others leave no trace."""
    alone = [run(1, seed=seed).losses[0] for seed in (1, 2, 3)]
    together = run(3, weight=1e-12, **settings).losses
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_bits_are_those_of_the_predictions_and_the_headers():
    simulation = run(3, codec="fp16")
    predictions = 2 * 8 * 3 * 16  # two peers, a batch of eight, three classes, sixteen bits
    assert simulation.bits[0] == simulation.bits[1] == simulation.bits[2]
    assert predictions < simulation.bits[0] < predictions + 2 * 8 * 128


def test_models_are_scored_in_evaluation_mode_and_agree_with_themselves():
    simulation = run(2, evaluate=lambda model: (model.training, torch.is_grad_enabled()))
    assert simulation.scores == [(False, False), (False, False)]
    assert 0.0 <= simulation.agreement(INPUTS) <= 1.0
    simulation.models[1] = simulation.models[0]
    assert simulation.agreement(INPUTS) == 1.0


def test_agreement_is_the_mean_over_all_pairs_of_models():
    class Fixed(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.classes = torch.tensor(classes)

        def forward(self, inputs):
            return nn.functional.one_hot(self.classes, 3).float()

    models = [Fixed(classes) for classes in ([0, 0, 1, 1], [0, 0, 1, 2], [2, 0, 1, 1])]
    agreement = Simulation(models, [], [], [], []).agreement(INPUTS[:4])
    assert agreement == pytest.approx((3 / 4 + 3 / 4 + 2 / 4) / 3)


def test_models_of_one_seed_are_refused_as_in_a_real_run():
    def make_twin(index):
        torch.manual_seed(7)
        return make_model(index)

    with pytest.raises(ConfigError, match="identical parameters.*give every model its own seed"):
        run(2, make_twin)


def test_several_in_a_row_are_no_runs_of_one_name(caplog):
    run(num_updates=1)
    run(num_updates=1)
    assert "in a run of this name before" not in caplog.text


def test_a_model_that_fails_ends_the_simulation_with_its_own_error():
    class Failing(nn.Linear):
        num_calls = 0

        def forward(self, inputs):
            self.num_calls += 1
            if self.num_calls == 3:
                raise OverflowError("too much")
            return super().forward(inputs)

    with pytest.raises(OverflowError, match="too much"):
        run(3, lambda index: Failing(4, 3) if index == 1 else nn.Linear(4, 3))


def test_a_checkpoint_that_cannot_be_sent_keeps_nobody_waiting_and_is_not_learned_from():
    def make_large(index):
        model = nn.Linear(4, 3)
        model.register_buffer("large", torch.tensor(1e6 if index == 1 else 1.0))  # beyond the range of fp16
        return model

    started = time.monotonic()
    simulation = run(
        2, make_large, exchange="checkpoints", codec="fp16", replica_wait=True, interval=2, timeout=60.0, weight=0.1
    )
    assert time.monotonic() - started < 30
    assert [len(losses) for losses in simulation.losses] == [5, 5]
    assert simulation.figures[0][-1]["codistill_peers"] == 0
    assert simulation.figures[1][-1]["codistill_peers"] == 1


def test_with_checkpoints_distillation_begins_with_the_first_exchange_after_the_burn_in():
    simulation = run(2, num_updates=10, exchange="checkpoints", codec="fp32", replica_wait=True, burn_in=3, interval=2)
    for figures in simulation.figures:
        assert [update["codistill_peers"] for update in figures] == [0] * 4 + [1] * 6


def test_a_numbered_data_set_gives_each_sample_its_number():
    numbered = Numbered(DATA)
    assert len(numbered) == 20
    inputs, target, number = numbered[7]
    assert torch.equal(inputs, INPUTS[7])
    assert (int(target), number) == (1, 7)
    image, number = Numbered(torch.zeros(4, 3, 8, 8))[2]  # an input alone, which is not taken apart
    assert (image.shape, number) == ((3, 8, 8), 2)
    with pytest.raises(TypeError, match="samples are dictionaries; give each its index"):
        Numbered([{"input_ids": [1], "labels": [2]}])[0]


@pytest.mark.parametrize("settings", [{"lookahead": True, "codec": "fp32"}, {"update_freq": 4}])
def test_what_it_does_not_simulate_is_refused(settings):
    with pytest.raises(ConfigError, match="leave lookahead and update_freq out"):
        run(**settings)
