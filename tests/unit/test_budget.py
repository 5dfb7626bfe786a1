"""A budget of bits: the same positions on all sides without a word, and no more bits than were given."""

import pytest
import torch

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.budget import Budget, budget_of
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.transports.sealing import HEADER_OVERHEAD, PAYLOAD_OVERHEAD
from fairseq_codistill.testing import simulate


def test_when_there_is_room_depends_on_position_and_rows_alone():
    budgets = [Budget(0.01, 1, 1, 1), Budget(0.01, 1, 1, 1, num_updates=50)]
    budgets[0].encode(make_codec("counts:4"), torch.randn(400, 30), 1, None, 0)  # what was sent changes nothing
    rooms = [[budget.has_room(elapsed, 900) for elapsed in range(200)] for budget in budgets]
    assert rooms[0] == rooms[1]
    assert sum(rooms[0]) == 200 * 10_000 // (24 * 900 + 8 * 84)


def test_with_room_for_every_message_none_is_left_out_and_draws_fill_it():
    budget, codec = Budget(0.1, 1, 1, 1), make_codec("counts:64")
    predictions = torch.randn(500, 100)
    spent = [8 * (len(budget.encode(codec, predictions, seed, None, seed)) + 84) for seed in range(20)]
    assert all(budget.has_room(elapsed, 500) for elapsed in range(20))
    assert 0.8e5 < sum(spent) / 20 <= 1.001e5
    assert max(spent) <= 5e5


def test_late_positions_get_more_than_early_ones():
    budget, codec, predictions = Budget(0.05, 1, 1, 1, num_updates=100), make_codec("counts:64"), torch.randn(500, 100)
    spent = [len(budget.encode(codec, predictions, elapsed, None, elapsed)) for elapsed in range(100)]
    assert sum(spent[-20:]) > 2 * sum(spent[:20])
    assert 8 * (sum(spent) / 100 + 84) <= 0.0501e6


def test_sharp_predictions_leave_bits_to_those_that_are_not():
    budget, codec = Budget(0.02, 1, 1, 1), make_codec("counts:64")
    sharp, flat = torch.randn(500, 100), torch.randn(500, 100)
    sharp[:, 3] += 50
    alone = len(Budget(0.02, 1, 1, 1).encode(codec, flat, 1, None, 0))
    for elapsed in range(5):
        budget.encode(codec, sharp, elapsed, None, elapsed)
    assert len(budget.encode(codec, flat, 1, None, 5)) > 1.5 * alone


@pytest.mark.parametrize("num_peers", [1, 5])
def test_through_a_relay_what_leaves_is_counted_with_a_header_for_each_peer(num_peers):
    budget_bits = {1: 3.5e3, 5: 12e3}[num_peers]  # less than all draws take, more than one of each row

    def overhead(**changes):
        config = CodistillationConfig(
            codistill_budget_mbit=budget_bits / 1e6, codistill_num_models=num_peers + 1, **changes
        )
        budget = budget_of(config, num_peers, 1, None)
        sent = 0
        for elapsed in range(60):
            if budget.has_room(elapsed, 32):
                sent += 8 * len(budget.encode(make_codec("counts:16"), torch.randn(32, 100), elapsed, None, elapsed))
                sent += told
        return sent / 60

    headers = num_peers * (84 + HEADER_OVERHEAD)
    told = 8 * (headers + PAYLOAD_OVERHEAD)
    assert 0.8 * budget_bits < overhead(codistill_relay="relay:29700") <= 1.01 * budget_bits


def test_without_a_budget_there_is_none():
    assert budget_of(CodistillationConfig(), 1, 1, None) is None


@pytest.mark.parametrize(("peers", "messages"), [(3, 1), (1, 4)])
def test_it_is_for_all_peers_and_messages_of_an_update_together(peers, messages):
    whole, shared = Budget(0.12, 1, 1, 1), Budget(0.12, peers, messages, 1)
    assert whole.has_room(0, 4000)
    assert shared.has_room(0, 4000 // (peers * messages) - 30)
    assert not shared.has_room(0, 4000)


def test_models_with_a_budget_stay_in_step():
    generator = torch.Generator().manual_seed(5)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 6, generator=generator), torch.randint(9, (64,), generator=generator)
    )
    found = simulate(
        3, lambda index: torch.nn.Linear(6, 9), data, batch_size=32, num_updates=40,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        codec="counts:16", divergence="kl", budget_mbit=0.0007,
    )  # fmt: skip
    peers = [[update["codistill_peers"] for update in updates] for updates in found.figures]
    assert peers[0] == peers[1] == peers[2]
    assert {0.0, 2.0} == set(peers[0])
    assert all(update["codistill_skipped"] == 0 for updates in found.figures for update in updates)


def test_a_slower_model_skips_nothing_where_the_budget_leaves_positions_out():
    """The other one waits for it at the next position that anything is sent at, however far that is."""
    budget = Budget(0.005, 1, 1, 1)
    due = [elapsed for elapsed in range(120) if budget.has_room(elapsed, 3584)]
    gaps = [later - earlier for earlier, later in zip(due, due[1:], strict=False)]
    assert max(gaps) > 8
    assert max(gaps) <= budget.spacing() <= max(gaps) + 1
    assert Budget(100.0, 1, 1, 3).spacing() == 3
