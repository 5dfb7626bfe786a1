"""Codecs that send a part of the predictions: what arrives, that it is unbiased, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.coordinator.codecs import draws
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.coordinator.codecs.draws import draw_systematically
from fairseq_codistill.losses import divergences
from fairseq_codistill.losses.distillation import peer_divergence


def logits(rows, classes, seed=0, scale=2.0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


def round_trip(name, predictions, seed=7, salt=0):
    codec = make_codec(name, salt)
    payload = codec.encode(predictions, seed)
    assert len(payload) == codec.num_bytes(*predictions.shape)
    return make_codec(name).decode(bytes(payload), *predictions.shape, seed)


def assert_unbiased(estimates, truth):
    """The mean of the estimates is within 4 of its standard errors: fails for an unbiased one in 16,000."""
    estimates = torch.tensor(estimates, dtype=torch.float64)
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - truth) < 4 * standard_error, (estimates.mean(), truth, standard_error)
    assert standard_error < 0.05 * truth, "too noisy a test to show anything"


class TestColumns:
    def test_values_are_those_of_the_drawn_classes(self):
        predictions = logits(5, 50)
        sent = round_trip("columns:8", predictions)
        assert sorted(set(sent.classes.tolist())) == sorted(sent.classes.tolist())
        assert torch.equal(sent.values.float(), predictions[:, sent.classes].half().float())

    def test_draws_are_the_same_in_every_release_and_differ_between_positions(self):
        def draws(seed):
            return round_trip("columns:4", logits(1, 100), seed).classes.tolist()

        assert draws(7) == [37, 26, 78, 91]
        assert draws(8) != draws(7)

    def test_every_class_is_drawn_equally_often(self):
        counts = torch.zeros(20)
        for seed in range(2000):
            counts[round_trip("columns:5", logits(1, 20), seed).classes] += 1
        assert (counts / 2000 - 5 / 20).abs().max() < 4 * (0.25 * 0.75 / 2000) ** 0.5

    def test_estimate_of_the_squared_error_is_unbiased(self):
        mine, theirs = logits(6, 40, seed=1), logits(6, 40, seed=2)
        estimates = [peer_divergence(mine, round_trip("columns:4", theirs, s), "mse").item() for s in range(600)]
        assert_unbiased(estimates, divergences.mean_squared_divergence(mine, theirs))

    def test_more_columns_than_classes_is_the_dense_divergence(self):
        mine, theirs = logits(3, 7, seed=1), logits(3, 7, seed=2).half().float()
        estimate = peer_divergence(mine, round_trip("columns:100", theirs), "mse")
        torch.testing.assert_close(estimate, divergences.mean_squared_divergence(mine, theirs))

    def test_other_columns_than_the_peers_are_noticed(self):
        payload = make_codec("columns:4").encode(logits(2, 50), seed=1)
        with pytest.raises(CodecError, match="--codistill-data-seed"):
            make_codec("columns:4").decode(payload, 2, 50, seed=2)

    def test_rows_that_are_not_finite_are_marked(self):
        predictions = logits(3, 6)
        predictions[1] = float("nan")
        sent = round_trip("columns:2", predictions)
        assert sent.finite_rows().tolist() == [True, False, True]
        assert sent.select(sent.finite_rows()).values.shape == (2, 2)


def independent_draws(predictions, num_draws, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.softmax(predictions, 1), num_draws, replacement=True, generator=generator)


def counts_of(classes, num_classes):
    return torch.nn.functional.one_hot(classes, num_classes).sum(1).double()


class TestTokens:
    @given(
        rows=st.integers(1, 4),
        classes=st.integers(1, 200),
        draws=st.integers(1, 40),
        scale=st.floats(0, 30),
        seed=st.integers(0, 10**6),
    )
    def test_each_class_is_drawn_as_often_as_its_share_of_the_points_says(self, rows, classes, draws, scale, seed):
        predictions = logits(rows, classes, seed, scale)
        counts = counts_of(draw_systematically(predictions, draws, seed), classes)
        expected = draws * torch.softmax(predictions.double(), dim=1)
        assert torch.equal(counts.sum(1), torch.full((rows,), float(draws), dtype=torch.float64))
        assert bool(((counts - expected).abs() < 1 + 1e-4 * draws).all())

    def test_a_class_that_cannot_be_is_never_drawn(self):
        predictions = logits(300, 70)
        predictions[:, ::3] = -torch.inf
        assert bool((draw_systematically(predictions, 9, seed=3) % 3 != 0).all())

    @pytest.mark.parametrize("draws", [1, 2, 5, 16])
    @pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
    def test_draws_are_unbiased_and_counts_vary_no_more_than_independent_ones(self, draws, scale):
        predictions = logits(1, 40, seed=draws, scale=scale).expand(4000, -1)
        expected = torch.softmax(predictions[0].double(), dim=0)
        ours = counts_of(draw_systematically(predictions, draws, seed=1), 40) / draws
        theirs = counts_of(independent_draws(predictions, draws, seed=1), 40) / draws
        standard_error = (expected / draws / 4000).sqrt()
        assert bool(((ours.mean(0) - expected).abs() <= 5 * standard_error + 1e-6).all())
        assert ours.var(0).sum() <= 1.05 * theirs.var(0).sum()

    def test_estimate_of_the_cross_entropy_is_unbiased(self):
        mine, theirs = logits(6, 12, seed=1), logits(6, 12, seed=2)
        probabilities = torch.softmax(theirs, dim=1)
        cross_entropy = -(probabilities * torch.log_softmax(mine, dim=1)).sum()
        estimates = [peer_divergence(mine, round_trip("tokens:2", theirs, s), "kl").item() for s in range(600)]
        assert_unbiased(estimates, cross_entropy)

    def test_its_gradient_is_that_of_the_kl_divergence_on_average(self):
        mine, theirs = logits(4, 6, seed=1).requires_grad_(), logits(4, 6, seed=2)
        dense = torch.autograd.grad(divergences.kl_divergence(mine, theirs), mine)[0]
        total = torch.zeros_like(dense)
        for seed in range(500):
            sampled = peer_divergence(mine, round_trip("tokens:8", theirs, seed), "kl")
            total += torch.autograd.grad(sampled, mine)[0]
        torch.testing.assert_close(total / 500, dense, atol=4 * 0.5 / (8 * 500) ** 0.5, rtol=0)

    @pytest.mark.parametrize(("classes", "num_bytes"), [(1000, 2), (65535, 2), (65536, 4)])
    def test_ids_take_16_bits_where_the_vocabulary_allows(self, classes, num_bytes):
        assert make_codec("tokens:3").num_bytes(10, classes) == 30 * num_bytes
        predictions = torch.full((2, classes), -100.0)
        predictions[0, classes - 1] = predictions[1, 0] = 100.0
        assert round_trip("tokens:3", predictions).classes.tolist() == [[classes - 1] * 3, [0] * 3]

    def test_models_draw_differently_and_each_again_alike(self):
        predictions = torch.zeros(4, 1000)
        first, again = round_trip("tokens:4", predictions, salt=0), round_trip("tokens:4", predictions, salt=0)
        other = round_trip("tokens:4", predictions, salt=1)
        assert torch.equal(first.classes, again.classes)
        assert not torch.equal(first.classes, other.classes)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_rows_that_are_not_finite_are_marked(self, bad):
        predictions = logits(3, 6)
        predictions[1, 2] = bad
        assert round_trip("tokens:2", predictions).finite_rows().tolist() == [True, False, True]

    def test_rows_beyond_one_chunk_keep_their_order(self):
        predictions = torch.full((1200, 30), -100.0)
        wanted = torch.arange(1200) % 30
        predictions[torch.arange(1200), wanted] = 100.0
        assert torch.equal(round_trip("tokens:1", predictions).classes[:, 0], wanted)

    @pytest.mark.parametrize("ids", [[30, 1], [-1, 1], [-2, 1]])
    def test_ids_that_cannot_be_are_refused(self, ids):
        payload = torch.tensor(ids, dtype=torch.int16).numpy().tobytes()
        with pytest.raises(CodecError, match="class ids"):
            make_codec("tokens:2").decode(payload, 1, 30, 0)


class TestTopK:
    @given(kept=st.integers(1, 12), seed=st.integers(0, 100))
    def test_bounds_of_the_dense_divergences_that_are_reached_with_all_classes(self, kept, seed):
        mine, theirs = logits(4, 9, seed=seed), logits(4, 9, seed=seed + 1).half().float()
        sent = round_trip(f"topk:{kept}", theirs)
        for name, function in divergences.DIVERGENCE_FUNCTIONS.items():
            dense, partial = function(mine, theirs), peer_divergence(mine, sent, name)
            assert partial >= -1e-4
            assert partial <= dense * 1.0001 + 1e-4
            if kept >= 9:
                torch.testing.assert_close(partial, dense, rtol=1e-4, atol=1e-4)

    def test_identical_predictions_do_not_diverge(self):
        mine = logits(4, 50).half().float()
        for name in divergences.DIVERGENCE_FUNCTIONS:
            assert abs(peer_divergence(mine, round_trip("topk:5", mine), name).item()) < 1e-4

    @pytest.mark.parametrize("offset", [0.0, 20.0, -100.0])
    def test_rounding_moves_no_probability_between_the_kept_classes_and_the_others(self, offset):
        mine = logits(64, 1000, scale=0.3) + offset
        mine[torch.arange(64), torch.arange(64)] += 14  # nearly certain: all that is left over is 0.002
        divergence = peer_divergence(mine, round_trip("topk:16", mine), "kl").item() / 64
        assert abs(divergence) < 1e-4  # of a model to itself
        sent = round_trip("topk:16", mine)
        others = 1 - (sent.values.float() - sent.log_norm.unsqueeze(1)).exp().sum(dim=1)
        kept = torch.softmax(mine.double(), dim=1).gather(1, sent.classes).sum(dim=1)
        torch.testing.assert_close(others.double(), 1 - kept, rtol=0.1, atol=2e-5)

    def test_rows_that_are_not_finite_are_marked(self):
        predictions = logits(3, 6)
        predictions[1, 2] = float("nan")
        assert round_trip("topk:2", predictions).finite_rows().tolist() == [True, False, True]

    @pytest.mark.parametrize("bad", [30, -1])
    def test_ids_that_cannot_be_are_refused(self, bad):
        payload = bytearray(make_codec("topk:2").encode(logits(1, 30), 0))
        payload[-4:] = torch.tensor([bad, bad], dtype=torch.int16).numpy().tobytes()
        with pytest.raises(CodecError, match="class"):
            make_codec("topk:2").decode(payload, 1, 30, 0)


def test_what_drawing_needs_of_memory_goes_by_the_draws_where_classes_are_few(monkeypatch):
    sizes, draw = [], draws._draw
    monkeypatch.setattr(
        draws, "_draw", lambda rows, number, start: sizes.append(len(rows)) or draw(rows, number, start)
    )
    predictions = logits(2000, 10)
    whole = draw_systematically(predictions, 64, seed=3)
    monkeypatch.setattr(draws, "CHUNK_ELEMENTS_CPU", 64 * draws.BLOCK * 100)
    assert torch.equal(draw_systematically(predictions, 64, seed=3), whole)
    assert sizes[-20:] == [100] * 20


@pytest.mark.parametrize("name", ["columns:3", "tokens:3", "topk:3"])
class TestEverySampledCodec:
    @pytest.mark.parametrize("shape", [(0, 5), (1, 5), (1, 1)])
    def test_odd_shapes(self, name, shape):
        sent = round_trip(name, logits(*shape))
        assert sent.finite_rows().shape == (shape[0],)
        divergence = "mse" if name.startswith("columns") else "kl"
        assert peer_divergence(logits(*shape, seed=3), sent, divergence).shape == ()

    def test_another_length_is_an_error(self, name):
        with pytest.raises(CodecError, match=r"\(2, 9\)"):
            make_codec(name).decode(bytes(5), 2, 9, 0)


def test_what_travelled_must_determine_the_divergence():
    mine = logits(2, 9)
    for name, divergence in (("columns:2", "kl"), ("tokens:2", "mse")):
        with pytest.raises(ValueError, match="does not determine"):
            peer_divergence(mine, round_trip(name, mine), divergence)


def test_sixteen_tokens_are_14600_times_below_all_reduce_of_the_big_transformer():
    bits = 8 * make_codec("tokens:16").num_bytes(3584, 32768)
    assert round(2 * 210e6 * 32 / bits, -2) == 14_600


@pytest.mark.parametrize("elements", [1, 40 * 7])
def test_what_is_drawn_does_not_depend_on_how_many_rows_are_looked_at_at_a_time(monkeypatch, elements):
    predictions = 3 * torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    expected = draw_systematically(predictions, 5, seed=2)
    monkeypatch.setattr(draws, "CHUNK_ELEMENTS_CPU", elements)
    assert torch.equal(draw_systematically(predictions, 5, seed=2), expected)
