"""Which batch is this: the order of the positions, and what a fingerprint sees."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.coordinator.keys import FINGERPRINT_BYTES, BatchKey, DataOrder, fingerprint, parameters_digest

NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6)


def digest(ids, targets):
    return fingerprint(torch.tensor(ids, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))


def test_positions_are_ordered_as_the_batches_are():
    in_order = [BatchKey(e, p, m) for e in (1, 2) for p in (0, 1, 10) for m in (0, 1)]
    shuffled = in_order[::2] + in_order[1::2]
    assert sorted(shuffled) == in_order
    assert BatchKey(1, 2) == BatchKey(1, 2, 0)


def test_a_position_is_written_as_a_user_would_say_it():
    assert str(BatchKey(3, 14, 1)) == "epoch 3 position 14 micro-batch 1"


def test_the_same_batch_has_the_same_fingerprint_in_any_layout_and_integer_type():
    ids, targets = torch.tensor([1, 2]), torch.tensor([5, 6, 7])
    first = fingerprint(ids, targets)
    assert len(first) == FINGERPRINT_BYTES
    every_second = torch.tensor([5, 0, 6, 0, 7])[::2]
    assert not every_second.is_contiguous()
    assert fingerprint(ids.to(torch.int32), every_second) == first


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_batches_have_the_same_fingerprint_only_if_ids_and_targets_are_the_same(ids, targets, other_ids, other_targets):
    same = (ids, targets) == (other_ids, other_targets)
    assert (digest(ids, targets) == digest(other_ids, other_targets)) == same


def test_order_and_the_border_between_ids_and_targets_matter():
    batches = [([1, 2], [5, 6]), ([2, 1], [5, 6]), ([1, 2], [6, 5]), ([1], [2, 5, 6]), ([1, 2, 5], [6]), ([], [1, 2])]
    assert len({digest(*batch) for batch in batches}) == len(batches)


def test_padding_that_callers_leave_out_does_not_matter():
    narrow = torch.tensor([[4, 5], [6, 1]])  # 1 is the padding
    wide = torch.tensor([[4, 5, 1, 1], [6, 1, 1, 1]])
    ids = torch.tensor([8, 9])
    assert fingerprint(ids, narrow[narrow.ne(1)]) == fingerprint(ids, wide[wide.ne(1)])


@pytest.mark.parametrize("update_freq", [[1], [2], [1, 4], [3, 1, 2]])
def test_elapsed_counts_updates_over_epochs_and_key_is_its_inverse(update_freq):
    order = DataOrder(num_batches=7, update_freq=update_freq)
    walked = [
        (epoch, position)
        for epoch in range(1, 6)
        for position in range(math.ceil(7 / update_freq[min(epoch, len(update_freq)) - 1]))
    ]
    assert [order.elapsed(*place) for place in walked] == list(range(len(walked)))
    assert [order.key(elapsed) for elapsed in range(len(walked))] == [BatchKey(*place) for place in walked]


def test_the_fingerprint_sees_one_changed_pixel_and_the_shape_of_the_images():
    ids, targets = torch.arange(2), torch.arange(2)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    changed = images.clone()
    changed[1, 2, 3, 3] = 1
    seen = {fingerprint(ids, targets, pixels) for pixels in (None, images, changed, images.view(2, 3, 2, 8))}
    assert len(seen) == 4
    assert fingerprint(ids, targets, images.clone()) in seen


def test_the_digest_of_parameters_sees_every_value():
    parameters = [torch.zeros(3), torch.ones(2, 2)]
    assert parameters_digest(parameters) == parameters_digest([p.clone() for p in parameters])
    assert parameters_digest(parameters) != parameters_digest([torch.zeros(3), torch.ones(2, 2) + 1e-6])
