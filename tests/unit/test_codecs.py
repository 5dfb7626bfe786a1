"""Codecs: rounding within its bound, odd values, odd shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.coordinator.codecs import CODECS, CODECS_BY_CODE, CodecError

RELATIVE_ERROR = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}


def round_trip(name, predictions):
    codec = CODECS[name]
    payload = codec.encode(predictions)
    assert len(payload) == codec.num_bytes(*predictions.shape)
    return codec.decode(payload, *predictions.shape)


def test_every_codec_has_its_own_number():
    assert len(CODECS_BY_CODE) == len(CODECS)


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
        payload = CODECS[name].encode(predictions)
        expected = predictions.detach().clone()
        with torch.no_grad():
            base.zero_()
        assert torch.equal(CODECS[name].decode(payload, 4, 3).float(), expected)

    def test_another_length_is_an_error_that_names_both(self, name):
        payload = CODECS[name].encode(torch.zeros(2, 3))
        with pytest.raises(CodecError, match=r"\(2, 4\)"):
            CODECS[name].decode(payload, 2, 4)

    def test_received_bytes_decode_like_sent_ones(self, name):
        predictions = torch.randn(3, 5)
        payload = CODECS[name].encode(predictions)
        assert torch.equal(CODECS[name].decode(bytes(payload), 3, 5), CODECS[name].decode(payload, 3, 5))


def test_fp16_shows_what_it_cannot_hold_as_infinite():
    assert torch.isinf(round_trip("fp16", torch.tensor([[70000.0]]))).all()
