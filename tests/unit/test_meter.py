"""The paper's formulas with its own numbers."""

import pytest

from fairseq_codistill.coordinator.meter import (
    Numbering,
    TrafficMeter,
    all_reduce_bits,
    checkpoint_bits,
    prediction_bits,
)

RESNET50 = 25_000_000  # the paper's b_model = 8e8 bits


def test_the_papers_resnet50_figures():
    assert all_reduce_bits(RESNET50) == 16e8
    assert checkpoint_bits(2, RESNET50, interval=625) == pytest.approx(1.28e6)
    assert prediction_bits(2, num_rows=32, num_classes=1000, interval=1) == pytest.approx(3.2e4 * 32)
    assert all_reduce_bits(RESNET50) / prediction_bits(2, 32, 1000, 1) > 1500


def test_one_model_sends_nothing_and_more_models_send_to_each_peer():
    assert prediction_bits(1, 32, 1000, 1) == 0
    assert prediction_bits(4, 32, 1000, 1) == 3 * prediction_bits(2, 32, 1000, 1)
    assert prediction_bits(2, 32, 1000, 10, bits_per_value=16) == prediction_bits(2, 32, 1000, 1) / 20


def test_meter_adds_up():
    meter = TrafficMeter()
    meter.count_sent(10)
    meter.count_sent(5)
    meter.count_received(7)
    summary = meter.summary()
    assert (summary["sent_bytes"], summary["sent_messages"]) == (15, 2)
    assert (summary["received_bytes"], summary["received_messages"]) == (7, 1)


@pytest.mark.parametrize(
    ("numbers", "num_lost"),
    [
        ([1, 2, 3], 0),
        ([7, 8], 0),
        ([1, 4, 5], 2),
        ([1, 4, 2], 1),
        ([1, 4, 2, 3], 0),
        ([3, 1], 1),
        ([0, 0, 5, 7], 1),
        ([], 0),
    ],
)
def test_gaps_in_the_numbers_are_what_was_lost(numbers, num_lost):
    numbering = Numbering()
    for number in numbers:
        numbering.note(number)
    assert numbering.num_lost == num_lost
    numbering.restart()
    assert numbering.num_lost == num_lost
    for number in (1, 3):
        numbering.note(number)
    assert numbering.num_lost == num_lost + 1
