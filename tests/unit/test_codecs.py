"""Codecs: rounding within its bound, odd values, odd shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.choices import CODECS, SIZED_CODECS, ConfigError
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.losses.chunked import chunked_loss
from fairseq_codistill.losses.distillation import peer_divergence
from fairseq_codistill.losses.generalised import Divergence

RELATIVE_ERROR = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}


def round_trip(name, predictions):
    codec = make_codec(name)
    payload = codec.encode(predictions, seed=7)
    assert len(payload) == codec.num_bytes(*predictions.shape)
    return codec.decode(payload, *predictions.shape, seed=7)


def test_every_codec_has_its_own_number():
    made = [make_codec(name + (":2" if name in SIZED_CODECS else "")) for name in CODECS]
    assert [codec.name for codec in made] == list(CODECS)
    assert len({codec.code for codec in made}) == len(CODECS)


@pytest.mark.parametrize("name", ["fp64", "fp16:2", "tokens", "tokens:0", "tokens:x", "columns:-1", ""])
def test_a_codec_that_cannot_be_is_refused_by_name(name):
    with pytest.raises(ConfigError, match="--codistill-codec is"):
        make_codec(name)


@pytest.mark.parametrize("name", sorted(RELATIVE_ERROR))
class TestEveryDenseCodec:
    @given(rows=st.integers(0, 5), classes=st.integers(1, 9), seed=st.integers(0, 1000))
    def test_error_is_within_its_bound(self, name, rows, classes, seed):
        predictions = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 10
        decoded = round_trip(name, predictions).float()
        assert decoded.shape == (rows, classes)
        error = (decoded - predictions).abs()
        assert bool((error <= RELATIVE_ERROR[name] * predictions.abs() + 1e-7).all())

    def test_nan_and_infinities_stay_what_they_are(self, name):
        predictions = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
        decoded = round_trip(name, predictions)
        assert torch.isnan(decoded[0, 0])
        assert decoded[0, 1:].tolist() == [float("inf"), -float("inf"), 1.0]

    def test_payload_is_a_copy_of_any_layout_and_needs_no_gradient(self, name):
        base = torch.arange(12.0, requires_grad=True)
        predictions = base.view(3, 4).t()
        payload = make_codec(name).encode(predictions, 0)
        expected = predictions.detach().clone()
        with torch.no_grad():
            base.zero_()
        assert torch.equal(make_codec(name).decode(payload, 4, 3, 0).float(), expected)

    def test_another_length_is_an_error_that_names_both(self, name):
        payload = make_codec(name).encode(torch.zeros(2, 3), 0)
        with pytest.raises(CodecError, match=r"\(2, 4\)"):
            make_codec(name).decode(payload, 2, 4, 0)

    def test_received_bytes_decode_like_sent_ones(self, name):
        predictions = torch.randn(3, 5)
        payload = make_codec(name).encode(predictions, 0)
        assert torch.equal(make_codec(name).decode(bytes(payload), 3, 5, 0), make_codec(name).decode(payload, 3, 5, 0))


def test_fp16_shows_what_it_cannot_hold_as_infinite():
    assert torch.isinf(round_trip("fp16", torch.tensor([[70000.0]]))).all()


class TestInt8:
    @given(rows=st.integers(0, 5), classes=st.integers(1, 9), seed=st.integers(0, 1000))
    def test_error_is_at_most_half_a_step(self, rows, classes, seed):
        predictions = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * 10
        decoded = round_trip("int8", predictions).logits()
        assert decoded.shape == (rows, classes)
        bound = predictions.abs().amax(dim=1, keepdim=True) / 254 if rows else predictions
        assert bool(((decoded - predictions).abs() <= bound * 1.0001).all())

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_row_that_is_not_finite_arrives_as_nan_and_alone(self, bad):
        received = round_trip("int8", torch.tensor([[1.0, 2.0], [bad, 1.0], [0.0, 0.0]]))
        assert received.finite_rows().tolist() == [True, False, True]
        decoded = received.logits()
        assert torch.isnan(decoded[1]).all()
        assert torch.isfinite(decoded[[0, 2]]).all()

    def test_it_is_multiplied_out_where_it_is_moved_to(self):
        received = round_trip("int8", torch.randn(3, 4))
        assert (received.values.dtype, received.scales.dtype) == (torch.int8, torch.float32)
        moved = received.select(slice(1, 3)).to(torch.device("meta"))
        assert moved.values.is_meta
        assert moved.logits().is_meta
        assert moved.logits().dtype == torch.float32
        assert moved.shape == (2, 4)
        assert torch.equal(received.select(torch.tensor([True, False, True])).logits(), received.logits()[[0, 2]])

    @pytest.mark.parametrize("form", ["mse", "kl", "js"])
    def test_the_loss_is_that_of_the_logits(self, form):
        received, mine = round_trip("int8", 3 * torch.randn(5, 7)), torch.randn(5, 7).requires_grad_()
        whole = Divergence(form, 2.0, 0.3) if form == "js" else Divergence(form)
        results = []
        for peer in (received, received.logits()):
            found = chunked_loss(mine, [peer], whole, target=torch.arange(5))
            results.append([found.total, found.num_agreeing, *torch.autograd.grad(found.total, mine)])
            results[-1].append(peer_divergence(mine, peer, whole))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with pytest.raises(ValueError, match="the peer's are"):
            chunked_loss(mine, [received.select(slice(0, 2))], whole)

    def test_another_length_is_an_error(self):
        with pytest.raises(CodecError, match=r"\(2, 4\)"):
            make_codec("int8").decode(bytes(7), 2, 4, 0)
