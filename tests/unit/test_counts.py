"""Draws by their counts, entropy coded: what arrives is what was drawn, and nothing damaged passes for it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.coordinator.codecs import multisets
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.coordinator.codecs.counts import pack, unpack


def logits(rows, classes, seed=0, scale=2.0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


def sharp(rows, classes, seed=0):
    """Predictions of which most are sure of their target, as late in training; and the targets."""
    generator = torch.Generator().manual_seed(seed)
    common = -torch.log(torch.arange(classes) + 3.0)
    targets = torch.multinomial(common.softmax(0), rows, replacement=True, generator=generator)
    predictions = common + torch.randn(rows, classes, generator=generator)
    predictions[torch.arange(rows), targets] += 20 * torch.rand(rows, generator=generator)
    return predictions, targets


@given(
    rows=st.integers(0, 90),
    classes=st.sampled_from([1, 2, 3, 17, 300, 70_000]),
    draws=st.integers(1, 40),
    scale=st.floats(0, 30),
    seed=st.integers(0, 10**6),
    has_targets=st.booleans(),
    marked=st.lists(st.integers(0, 89), max_size=4),
)
def test_what_is_decoded_is_what_was_drawn(rows, classes, draws, scale, seed, has_targets, marked):
    rows = min(rows, 200_000 // classes)
    predictions = logits(rows, classes, seed, scale)
    predictions[[row for row in marked if row < rows]] = float("nan")
    targets = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed)) if has_targets else None
    counts, plain = make_codec(f"counts:{draws}", salt=1), make_codec(f"tokens:{draws}", salt=1)
    payload = counts.encode(predictions, seed, targets)
    assert len(payload) <= counts.num_bytes(rows, classes)
    arrived = counts.decode(bytes(payload), rows, classes, seed, targets).classes
    assert torch.equal(arrived, plain.decode(plain.encode(predictions, seed), rows, classes).classes)


@given(length=st.integers(1, 8), number=st.integers(1, 30), seed=st.integers(0, 1000))
def test_ascending_sequences_and_their_numbers_belong_together(length, number, seed):
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(number, (20, length), generator=generator).sort(dim=1).values.numpy()
    ranks = multisets.rank(sequences, number)
    assert ranks.max() < multisets.num_multisets(number, length)
    assert (multisets.unrank(ranks, number, length) == sequences).all()


def test_a_payload_is_the_same_in_every_release_of_the_coder():
    draws = torch.tensor([[0, 0, 3, 5], [2, 2, 2, 2], [1, 4, 4, 9]])
    assert pack(draws, 10, torch.tensor([0, 2, 4])).hex() == "0104002d296309e62d4595"


def test_sharp_predictions_take_a_fourth_of_the_plain_bits_and_the_target_next_to_none():
    predictions, targets = sharp(2000, 3000)
    bits = {
        name: 8 * len(make_codec(name).encode(predictions, 1, targets)) / 2000 for name in ("tokens:16", "counts:16")
    }
    assert bits["counts:16"] < bits["tokens:16"] / 4
    sure = torch.full((2000, 3000), -100.0)
    sure[torch.arange(2000), targets] = 100.0
    assert 8 * len(make_codec("counts:16").encode(sure, 1, targets)) / 2000 < 0.15


class TestDamage:
    def test_a_bit_that_is_flipped_anywhere_is_noticed(self):
        predictions, targets = sharp(60, 200)
        payload = bytes(make_codec("counts:4").encode(predictions, 1, targets))
        drawn = unpack(payload, 60, 200, targets, 4)
        for bit in range(8 * len(payload)):
            broken = bytearray(payload)
            broken[bit // 8] ^= 1 << bit % 8
            try:
                assert torch.equal(make_codec("counts:4").decode(bytes(broken), 60, 200, 0, targets).classes, drawn)
            except CodecError:
                continue

    @pytest.mark.parametrize("size", [0, 6, 7, 20])
    def test_a_payload_that_was_cut_is_refused(self, size):
        predictions, targets = sharp(60, 200)
        payload = bytes(make_codec("counts:4").encode(predictions, 1, targets))[:size]
        with pytest.raises(CodecError):
            make_codec("counts:4").decode(payload, 60, 200, 0, targets)

    def test_one_for_another_shape_is_refused(self):
        predictions, targets = sharp(60, 200)
        payload = bytes(make_codec("counts:4").encode(predictions, 1, targets))
        for rows, classes, held in ((59, 200, targets[:59]), (60, 150, targets.clamp(max=149)), (60, 200, None)):
            with pytest.raises(CodecError):
                make_codec("counts:4").decode(payload, rows, classes, 0, held)

    def test_more_draws_than_were_agreed_on_are_refused_and_fewer_are_not(self):
        predictions, targets = sharp(60, 200)
        payload = bytes(make_codec("counts:4").encode(predictions, 1, targets, 2))
        assert make_codec("counts:4").decode(payload, 60, 200, 0, targets).classes.shape == (60, 2)
        with pytest.raises(CodecError, match="at most 1"):
            make_codec("counts:1").decode(payload, 60, 200, 0, targets)


class TestLabel:
    def test_it_is_the_most_likely_class_alone(self):
        predictions = logits(50, 30)
        sent = make_codec("label").decode(make_codec("label").encode(predictions, 0), 50, 30)
        assert torch.equal(sent.classes, predictions.argmax(1, keepdim=True))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_rows_that_are_not_finite_are_marked(self, bad):
        predictions = logits(3, 6)
        predictions[1, 2] = bad
        sent = make_codec("label").decode(make_codec("label").encode(predictions, 0), 3, 6)
        assert sent.finite_rows().tolist() == [True, False, True]

    @pytest.mark.parametrize("name", ["label", "vote"])
    def test_rows_of_very_many_classes_in_half_precision_are_finite_ones(self, name):
        predictions = torch.zeros(2, 70_000).half()  # the sum of their exponentials is beyond 65,504
        predictions[1] = -torch.inf
        codec = make_codec(name)
        assert codec.decode(codec.encode(predictions, 0), 2, 70_000).finite_rows().tolist() == [True, False]

    def test_one_that_is_the_target_takes_a_part_of_a_bit(self):
        predictions, targets = sharp(2000, 3000)
        right = predictions.argmax(1)
        assert 8 * len(make_codec("label").encode(predictions, 0, right)) / 2000 < 0.15
        assert 8 * len(make_codec("label").encode(predictions, 0, targets)) / 2000 < 8
