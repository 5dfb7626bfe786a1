"""The divergences against hand-computed values and slow loops."""

import math

import pytest
import torch

from fairseq_codistill.losses.divergences import (
    DIVERGENCE_FUNCTIONS,
    finite_rows,
    kl_divergence,
    mean_squared_divergence,
    num_agreeing_rows,
)


def slow_mse(mine, theirs):
    total = 0.0
    for row_a, row_b in zip(mine.tolist(), theirs.tolist(), strict=True):
        total += sum((a - b) ** 2 for a, b in zip(row_a, row_b, strict=True)) / len(row_a)
    return total


def slow_kl(mine, theirs):
    def softmax(row):
        exponentials = [math.exp(value - max(row)) for value in row]
        return [value / sum(exponentials) for value in exponentials]

    total = 0.0
    for row_a, row_b in zip(mine.tolist(), theirs.tolist(), strict=True):
        total += sum(q * (math.log(q) - math.log(p)) for p, q in zip(softmax(row_a), softmax(row_b), strict=True))
    return total


SLOW = {"mse": slow_mse, "kl": slow_kl}


def test_mse_is_a_mean_over_classes_and_a_sum_over_rows():
    mine = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    theirs = torch.tensor([[1.0, 4.0, 3.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert mean_squared_divergence(mine, theirs).item() == (4 + 16) / 4 + 4 / 4


def test_kl_of_a_fair_and_a_loaded_coin_by_hand():
    mine = torch.zeros(1, 2)  # (1/2, 1/2)
    theirs = torch.tensor([[math.log(3.0), 0.0]])  # (3/4, 1/4)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl_divergence(mine, theirs).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", sorted(DIVERGENCE_FUNCTIONS))
class TestEveryDivergence:
    def test_equals_the_slow_reference(self, name):
        generator = torch.Generator().manual_seed(0)
        mine, theirs = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
        assert DIVERGENCE_FUNCTIONS[name](mine, theirs).item() == pytest.approx(SLOW[name](mine, theirs), rel=1e-5)

    def test_gradient_equals_finite_differences_of_the_slow_reference(self, name):
        generator = torch.Generator().manual_seed(1)
        mine, theirs = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
        mine.requires_grad_()
        DIVERGENCE_FUNCTIONS[name](mine, theirs).backward()
        step = 1e-5
        for row in range(2):
            for column in range(3):
                shift = torch.zeros(2, 3, dtype=torch.float64)
                shift[row, column] = step
                slope = SLOW[name](mine.detach() + shift, theirs) - SLOW[name](mine.detach() - shift, theirs)
                assert mine.grad[row, column].item() == pytest.approx(slope / (2 * step), rel=1e-3, abs=1e-6)

    def test_no_gradient_reaches_the_peer(self, name):
        mine, theirs = torch.randn(2, 3, 4).requires_grad_(), torch.randn(2, 3, 4).requires_grad_()
        DIVERGENCE_FUNCTIONS[name](mine[0], theirs[0]).backward()
        assert mine.grad is not None
        assert theirs.grad is None

    def test_identical_peers_give_0(self, name):
        mine = torch.randn(5, 6)
        assert DIVERGENCE_FUNCTIONS[name](mine, mine.clone()).item() == pytest.approx(0, abs=1e-6)

    def test_no_rows_give_0(self, name):
        assert DIVERGENCE_FUNCTIONS[name](torch.empty(0, 6), torch.empty(0, 6)).item() == 0

    def test_half_precision_is_computed_in_float32(self, name):
        mine, theirs = torch.randn(2, 3, 4)
        half = DIVERGENCE_FUNCTIONS[name](mine.half(), theirs.half())
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(DIVERGENCE_FUNCTIONS[name](mine, theirs).item(), rel=1e-2)

    def test_other_shapes_are_an_error_that_shows_both(self, name):
        with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5\)"):
            DIVERGENCE_FUNCTIONS[name](torch.zeros(3, 4), torch.zeros(3, 5))


def test_finite_rows_finds_nan_and_infinities():
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, float("inf")], [0.0, -float("inf")]])
    assert finite_rows(rows).tolist() == [True, False, False, False]


def test_agreement_counts_rows_with_the_same_largest_logit():
    mine = torch.tensor([[1.0, 2.0], [5.0, 0.0], [0.0, 1.0]])
    theirs = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.5, 0.6]])
    assert num_agreeing_rows(mine, theirs).item() == 2
