"""Who exchanges with whom: symmetric, the same on all sides, every pair equally often, unbiased for all peers."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.pairing import partners
from fairseq_codistill.losses.divergences import kl_divergence
from fairseq_codistill.testing import simulate


@given(n=st.integers(2, 12), p=st.integers(1, 11), seed=st.integers(0, 99), position=st.integers(0, 10**6))
def test_everybody_has_p_partners_who_have_him(n, p, seed, position):
    if p >= n or n * p % 2:
        return
    found = [partners(n, p, seed, BatchKey(1, position), model) for model in range(n)]
    for model, others in enumerate(found):
        assert len(others) == p
        assert model not in others
        assert all(model in found[other] for other in others)


def test_micro_batches_and_parts_of_an_update_have_the_same_partners_and_other_positions_others():
    assert partners(8, 1, 1, BatchKey(2, 5, 0), 3) == partners(8, 1, 1, BatchKey(2, 5, 7), 3)
    assert len({partners(8, 1, 1, BatchKey(2, position), 3) for position in range(60)}) == 7


@pytest.mark.parametrize(("n", "p"), [(4, 1), (4, 2), (6, 1), (5, 2), (6, 3)])
def test_all_pairings_occur_and_every_pair_equally_often(n, p):
    positions = 3000
    tables = [tuple(partners(n, p, 1, BatchKey(1, at), model) for model in range(n)) for at in range(positions)]
    expected = positions * p / (n - 1)
    for one, other in itertools.combinations(range(n), 2):
        met = sum(other in table[one] for table in tables)
        assert abs(met - expected) < 4.5 * math.sqrt(expected * (1 - p / (n - 1)))
    if p == 1:
        assert len(set(tables)) == math.prod(range(n - 1, 0, -2))  # all perfect matchings


def test_the_term_is_that_of_algorithm_1_in_expectation():
    generator = torch.Generator().manual_seed(1)
    predictions = [torch.randn(5, 7, generator=generator) for _ in range(6)]
    mine = predictions[2].clone().requires_grad_()

    def term(peers):
        return sum(kl_divergence(mine, predictions[peer]) for peer in peers) / len(peers)

    (whole,) = torch.autograd.grad(term([0, 1, 3, 4, 5]), mine)
    slopes = {peer: torch.autograd.grad(term([peer]), mine)[0] for peer in (0, 1, 3, 4, 5)}
    total = sum(slopes[next(iter(partners(6, 1, 3, BatchKey(1, at), 2)))] for at in range(4000)) / 4000
    torch.testing.assert_close(total, whole, atol=0.03, rtol=0)


def run(num_models, **settings):
    generator = torch.Generator().manual_seed(5)
    data = torch.utils.data.TensorDataset(
        torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    )
    return simulate(
        num_models, lambda index: torch.nn.Linear(6, 3), data, batch_size=8, num_updates=12,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), **settings,
    )  # fmt: skip


def test_eight_models_send_what_two_send():
    two, eight = run(2), run(8, peers_per_position=1)
    assert all(bits == pytest.approx(two.bits[0], rel=0.02) for bits in eight.bits)
    for updates in eight.figures:
        assert all(update["codistill_peers"] == 1 and update["codistill_skipped"] == 0 for update in updates)


def test_p_of_all_peers_is_the_exchange_with_all():
    whole, named = run(3), run(3, peers_per_position=2)
    assert whole.losses == named.losses


@pytest.mark.parametrize(
    ("n", "settings", "message"),
    [
        (3, {"peers_per_position": 1}, "n x p is odd; use 2"),
        (4, {"peers_per_position": 4}, "between 0 .all. and 3"),
        (4, {"peers_per_position": -1}, "0"),
        (4, {"peers_per_position": 1, "exchange": "checkpoints"}, "copies are kept of all"),
        (4, {"peers_per_position": 1, "codec": "vote", "divergence": "kl"}, "no majority"),
    ],
)
def test_what_cannot_be_paired_is_refused_at_the_start(n, settings, message):
    addresses = ",".join(f"127.0.0.1:{29600 + model}" for model in range(n))
    config = CodistillationConfig(codistill_num_models=n, codistill_addresses=addresses)
    for name, value in settings.items():
        setattr(config, f"codistill_{name}", value)
    with pytest.raises(ConfigError, match=message):
        config.validate()
