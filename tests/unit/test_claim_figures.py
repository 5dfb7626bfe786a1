"""The figures of the test of the claim: calibration, what models predict together, intervals and verdicts."""

import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_ind, ttest_rel

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/claim"))
import evaluate
import summary


def test_calibration_error_by_hand():
    # Confidence 0.9 (two images, one right) and 0.6 (one, right): (|0.9 - 0.5| x 2 + |0.6 - 1| x 1) / 3.
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    targets = torch.tensor([0, 1, 1])
    assert evaluate.expected_calibration_error(probabilities.log(), targets) == pytest.approx(1.2 / 3)


def test_what_models_predict_together_is_the_mean_of_their_probabilities():
    first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    together = evaluate.log_mean_probability([first, second]).exp()
    expected = (first.double().softmax(1) + second.double().softmax(1)) / 2
    assert torch.allclose(together, expected)


def test_the_gap_that_is_closed_and_its_error_by_hand():
    plain, all_reduce = summary.Sample([60.0, 62.0]), summary.Sample([65.0, 65.0])
    share, error = summary.gap_closed(summary.Sample([63.0, 63.0]), plain, all_reduce)
    assert share == 0.5
    assert error == pytest.approx(0.5 * 1.0 / 4)  # only one model alone varies: standard error 1, of a gap of 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([65.0, 65.1, 65.2], "equivalent"),
        ([67.0, 67.1, 67.2], "better"),
        ([60.0, 60.1, 60.2], "worse"),
        ([63.0, 65.1, 67.2], "not decided"),
    ],
)
def test_verdicts_need_an_interval_inside_the_margin_or_off_0(values, expected):
    assert summary.verdict(summary.Sample(values), summary.Sample([65.0, 65.1, 65.2]), 0.5) == expected


def test_an_interval_is_that_of_welch():
    first, second = [1.0, 2.0, 3.0], [0.0, 0.0, 3.0]
    difference, low, high = summary.interval(summary.Sample(first), summary.Sample(second))
    reference = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert difference == 1.0
    assert (low, high) == pytest.approx((reference.low, reference.high))


def test_beside_it_is_that_of_the_differences_by_seed_and_is_said_where_it_tells_otherwise():
    one, other = summary.Sample([1.0, 2.1, 3.2]), summary.Sample([0.0, 1.0, 2.0])
    reference = ttest_rel(one.values, other.values).confidence_interval(0.95)
    assert summary.paired(one, other) == pytest.approx((reference.low, reference.high))
    assert reference.low > 0 > summary.interval(one, other)[1]
    told = summary.comparison("mse", "plain", {"mse": one, "plain": other}, "top1")
    assert told.endswith(f"; by seed +{reference.low:.2f} to +{reference.high:.2f}): not decided (not so by seed)")
    told = summary.comparison("mse", "plain", {"mse": summary.Sample([9.0, 9.1, 9.3]), "plain": other}, "top1")
    assert told.endswith("): better")
    assert "by seed" not in summary.comparison(
        "mse", "plain", {"mse": one, "plain": summary.Sample([0.0, 1.0])}, "top1"
    )
