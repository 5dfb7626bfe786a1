"""Schedules against values computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.schedules import (
    distill_weight,
    half_cosine,
    label_smoothing,
    scaled_learning_rate,
    staircase,
    step_decay,
    warm_up,
)

GOYAL = (30, 60, 80)
# The milestones of appendix A.4, in epochs of a codistilled model: 15, 30, 40 of 45 moved to 18, 38, 44.
SHIFTED = (18, 38, 44)


def test_weight_grows_by_its_factor_every_epoch():
    assert [distill_weight(2.0, 1.1, epoch) for epoch in (1, 2, 3)] == pytest.approx([2.0, 2.2, 2.42])


def test_weight_grows_up_to_its_ceiling():
    weights = [distill_weight(1.0, 1.1, epoch, ceiling=10.0) for epoch in (1, 2, 25, 26, 90)]
    assert weights == pytest.approx([1, 1.1, 1.1**24, 10, 10])
    assert distill_weight(1.0, 1.1, 91) > 5000
    assert distill_weight(1.0, 1.1, 10_000, ceiling=10.0) == 10  # beyond what a float holds


def test_weight_is_0_until_the_burn_in_is_over():
    weights = [distill_weight(1.0, 1.0, 1, position, burn_in=3) for position in range(5)]
    assert weights == [0, 0, 0, 1, 1]


@given(st.floats(0, 10), st.integers(1, 50), st.integers(0, 10**6))
def test_weight_without_growth_and_burn_in_is_constant(weight, epoch, position):
    assert distill_weight(weight, 1.0, epoch, position) == weight


def test_label_smoothing_decays_linearly_over_updates_and_stays():
    values = [label_smoothing(0.1, 0.02, 1, update, decay_updates=4) for update in (0, 1, 2, 4, 9)]
    assert values == pytest.approx([0.1, 0.08, 0.06, 0.02, 0.02])


def test_label_smoothing_decays_linearly_over_epochs():
    values = [label_smoothing(0.1, 0.0, epoch, 0, decay_epochs=2) for epoch in (1, 2, 3, 4)]
    assert values == pytest.approx([0.1, 0.05, 0, 0])


def test_label_smoothing_drops_to_0_at_its_epoch_whatever_else_is_set():
    values = [label_smoothing(0.1, 0.05, epoch, 0, decay_epochs=10, drop_epoch=3) for epoch in (2, 3, 4)]
    assert values == pytest.approx([0.095, 0, 0])


@given(st.floats(0, 0.9), st.floats(0, 0.9), st.integers(1, 100), st.integers(0, 10**5), st.integers(0, 10**4))
def test_label_smoothing_stays_between_its_ends(start, end, epoch, update, decay):
    value = label_smoothing(start, end, epoch, update, decay_updates=decay)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


def test_learning_rate_grows_with_the_batch():
    assert scaled_learning_rate(0.1, 8192, 256) == pytest.approx(3.2)
    assert scaled_learning_rate(0.1, 64, 256) == pytest.approx(0.025)
    assert scaled_learning_rate(0.1, 64, 0) == 0.1


def test_warm_up_is_linear_and_ends_at_the_target():
    rates = [warm_up(3.2, 0.1, progress, 5) for progress in (0, 1, 2.5, 5, 50)]
    assert rates == pytest.approx([0.1, 0.72, 1.65, 3.2, 3.2])
    assert warm_up(3.2, 0.1, 0, 0) == 3.2


@pytest.mark.parametrize("milestones", [GOYAL, SHIFTED])
def test_step_decay_drops_at_each_milestone_and_not_before(milestones):
    first, second, third = milestones
    progress = [0, first - 0.001, first, second - 0.001, second, third - 0.001, third, 90]
    factors = [step_decay(at, milestones, 0.1) for at in progress]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_half_cosine_falls_from_1_to_0():
    values = [half_cosine(progress, 90) for progress in (0, 30, 45, 60, 90, 99)]
    assert values == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0], abs=1e-12)


@pytest.mark.parametrize("start", [5e-4, 1e-4])
def test_weight_decay_of_codistillation_falls_with_the_learning_rate(start):
    values = [staircase((start, 1e-5, 0), progress, (30, 60)) for progress in (0, 29.9, 30, 59.9, 60, 89.9)]
    assert values == [start, start, 1e-5, 1e-5, 0, 0]
    assert staircase((1e-4,), 70, ()) == 1e-4


def test_a_staircase_needs_a_value_for_every_step():
    with pytest.raises(ValueError, match="2 values with 2 milestones"):
        staircase((1e-4, 1e-5), 0, (30, 60))


@given(st.floats(0, 200), st.floats(0, 200))
def test_learning_rates_never_rise_after_the_warm_up(one, other):
    earlier, later = sorted((one, other))
    assert step_decay(earlier, GOYAL, 0.1) >= step_decay(later, GOYAL, 0.1)
    assert half_cosine(earlier, 90) >= half_cosine(later, 90)
