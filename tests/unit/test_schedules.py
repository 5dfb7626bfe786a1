"""Schedules against values computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.schedules import distill_weight, label_smoothing


def test_weight_grows_by_its_factor_every_epoch():
    assert [distill_weight(2.0, 1.1, epoch) for epoch in (1, 2, 3)] == pytest.approx([2.0, 2.2, 2.42])


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
