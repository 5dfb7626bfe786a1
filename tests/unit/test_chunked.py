"""The loss computed chunk by chunk, against slow references over whole tensors in double precision."""

import pytest
import torch

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.predictions import Columns, Tokens
from fairseq_codistill.losses import sweep
from fairseq_codistill.losses.chunked import chunked_loss
from fairseq_codistill.losses.distillation import peer_divergence

CASES = (("fp32", "mse"), ("fp32", "kl"), ("fp16", "kl"), ("columns:3", "mse"), ("tokens:4", "kl"),
         ("topk:3", "mse"), ("topk:3", "kl"))  # fmt: skip
NUM_POSITIONS, NUM_CLASSES, EPSILON, WEIGHT = 11, 7, 0.1, 0.7


@pytest.fixture(autouse=True, params=[1, 3, 100])
def rows_of_a_chunk(request, monkeypatch):
    """One row, a number that does not divide the rows, and all of them at once."""
    monkeypatch.setattr(sweep, "CHUNK_ELEMENTS_CPU", request.param * NUM_CLASSES)


def random(*shape, seed):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sent(codec, predictions, seed=0):
    made = make_codec(codec, salt=seed)
    return made.decode(made.encode(predictions.float(), 0), *predictions.shape, seed=0)


def slow_supervised(logits, target, epsilon):
    """Row by row, class by class: every wrong class has epsilon / (C - 1), the right one the rest."""
    lprobs = torch.log_softmax(logits.double(), dim=1)
    total = logits.new_zeros((), dtype=torch.float64)
    for row, right in enumerate(target.tolist()):
        for label in range(logits.size(1)):
            share = 1 - epsilon if label == right else epsilon / (logits.size(1) - 1)
            total = total - share * lprobs[row, label]
    return total


def slow_divergence(mine, theirs, divergence):
    """In double precision where the plain functions, which are held to slow loops elsewhere, would round to float32."""
    mine = mine.double()
    if isinstance(theirs, Columns):
        return (mine[:, theirs.classes] - theirs.values.double()).square().mean(dim=1).sum()
    if isinstance(theirs, Tokens):
        return -torch.log_softmax(mine, dim=1).gather(1, theirs.classes).mean(dim=1).sum()
    if isinstance(theirs, torch.Tensor) and divergence == "mse":
        return (mine - theirs.double()).square().mean(dim=1).sum()
    if isinstance(theirs, torch.Tensor):
        q = torch.softmax(theirs.double(), dim=1)
        return (q * (q.log() - torch.log_softmax(mine, dim=1))).sum()
    return peer_divergence(mine, theirs, divergence).double()


@pytest.mark.parametrize(("codec", "divergence"), CASES)
class TestEveryKindOfPeer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("is_padded", [False, True])
    def test_loss_and_gradient_equal_the_slow_reference(self, codec, divergence, dtype, is_padded):
        logits = random(NUM_POSITIONS, NUM_CLASSES, seed=1).to(dtype).requires_grad_()
        rows = torch.tensor([0, 2, 3, 4, 7, 8, 10]) if is_padded else None
        mine = logits if rows is None else logits[rows]
        target = torch.arange(mine.size(0)) % NUM_CLASSES
        peers = [sent(codec, random(*mine.shape, seed=seed), seed) for seed in (2, 3, 4)]
        found = chunked_loss(logits, peers, divergence, WEIGHT, rows, target, EPSILON)
        (gradient,) = torch.autograd.grad(found.total, logits)
        each = torch.stack([slow_divergence(mine, peer, divergence) for peer in peers])
        supervised = slow_supervised(mine, target, EPSILON)
        total = supervised + WEIGHT * each.mean()
        (expected,) = torch.autograd.grad(total, logits)
        tolerance = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
        torch.testing.assert_close(found.supervised, supervised.detach(), **tolerance)
        torch.testing.assert_close(found.nll, slow_supervised(mine, target, 0.0).detach(), **tolerance)
        torch.testing.assert_close(found.divergences, each.detach(), **tolerance)
        torch.testing.assert_close(found.total.detach(), total.detach(), **tolerance)
        torch.testing.assert_close(gradient, expected, **tolerance)

    def test_without_a_target_it_is_the_divergence_alone(self, codec, divergence):
        logits = random(NUM_POSITIONS, NUM_CLASSES, seed=1).requires_grad_()
        peer = sent(codec, random(NUM_POSITIONS, NUM_CLASSES, seed=2))
        found = chunked_loss(logits, [peer], divergence, WEIGHT)
        expected = WEIGHT * slow_divergence(logits, peer, divergence)
        assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
        slope, right = (torch.autograd.grad(value, logits)[0] for value in (found.total, expected))
        torch.testing.assert_close(slope, right, rtol=1e-6, atol=1e-6)
        assert found.supervised.item() == found.nll.item() == 0

    def test_rows_that_are_not_finite_are_left_out_and_counted(self, codec, divergence):
        logits = random(NUM_POSITIONS, NUM_CLASSES, seed=1).requires_grad_()
        target = torch.arange(NUM_POSITIONS) % NUM_CLASSES
        theirs = random(NUM_POSITIONS, NUM_CLASSES, seed=2)
        good = torch.ones(NUM_POSITIONS, dtype=torch.bool)
        good[1] = good[6] = False
        broken = theirs.clone()
        broken[1], broken[6] = float("nan"), float("inf")
        whole = sent(codec, random(NUM_POSITIONS, NUM_CLASSES, seed=3), 1)
        found = chunked_loss(logits, [sent(codec, broken), whole], divergence, WEIGHT, None, target, EPSILON)
        kept = sent(codec, broken)
        kept = kept[good] if isinstance(kept, torch.Tensor) else kept.select(good)
        partial = slow_divergence(logits[good], kept, divergence)
        mean = (partial + slow_divergence(logits, whole, divergence)) / 2
        expected = slow_supervised(logits, target, EPSILON) + WEIGHT * mean
        assert found.num_nonfinite == 2
        assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
        slope, right = (torch.autograd.grad(value, logits)[0] for value in (found.total, expected))
        torch.testing.assert_close(slope, right, rtol=1e-6, atol=1e-6)

    def test_no_rows_give_0_and_a_gradient_of_0(self, codec, divergence):
        logits = random(3, NUM_CLASSES, seed=1).requires_grad_()
        peer = sent(codec, torch.empty(0, NUM_CLASSES))
        none = torch.empty(0, dtype=torch.int64)
        found = chunked_loss(logits, [peer], divergence, WEIGHT, none, none, EPSILON)
        found.total.backward()
        assert found.total.item() == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_one_logit_that_is_not_finite_leaves_its_row_out(divergence, value):
    logits, theirs = random(2, NUM_POSITIONS, NUM_CLASSES, seed=1)
    theirs[4, 2] = value
    found = chunked_loss(logits.requires_grad_(), [theirs], divergence)
    found.total.backward()
    assert found.num_nonfinite == 1
    assert torch.isfinite(found.total)
    assert logits.grad[4].abs().max() < 1e-12
    assert logits.grad[3].abs().max() > 1e-3


# Not topk, which is computed in float32, too coarse for finite differences, and held to the plain function above.
@pytest.mark.parametrize(("codec", "divergence"), [case for case in CASES if not case[0].startswith("topk")])
def test_gradcheck(codec, divergence):
    logits = random(5, NUM_CLASSES, seed=1).requires_grad_()
    peers = [sent(codec, random(5, NUM_CLASSES, seed=seed), seed) for seed in (2, 3)]
    target = torch.arange(5)

    def loss(x):
        return chunked_loss(x, peers, divergence, WEIGHT, None, target, EPSILON).total

    assert torch.autograd.gradcheck(loss, logits)


def test_a_second_derivative_is_refused():
    logits = random(3, NUM_CLASSES, seed=1).requires_grad_()
    total = chunked_loss(logits, [logits.detach() + 1], "mse").total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, logits, create_graph=True)


def test_a_loss_scale_saves_half_precision_gradients_from_underflow():
    """A gradient of about 2e-9 is 0 in float16, and about 3e-5 once scaled by 2 ** 14."""
    logits = torch.tensor([[10.0] + [-10.0] * (NUM_CLASSES - 1)])
    target, scale = torch.tensor([0]), 2.0**14
    half, single = logits.half().requires_grad_(), logits.requires_grad_()
    for leaf in (half, single):
        (scale * chunked_loss(leaf, [torch.zeros(1, NUM_CLASSES)], "kl", 0.0, None, target).total).backward()
    assert half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad.float(), single.grad, rtol=1e-2, atol=0)
    assert 0 < single.grad[0, 1] < scale * 2**-25


def test_a_batch_may_go_backward_twice_and_gradients_add_up():
    logits = random(NUM_POSITIONS, NUM_CLASSES, seed=1).requires_grad_()
    total = chunked_loss(logits, [logits.detach() + random(1, NUM_CLASSES, seed=2)], "kl").total
    total.backward(retain_graph=True)
    once = logits.grad.clone()
    total.backward()
    assert torch.equal(logits.grad, 2 * once)


def test_no_gradient_reaches_a_peer():
    mine, theirs = (random(3, NUM_CLASSES, seed=seed).requires_grad_() for seed in (1, 2))
    chunked_loss(mine, [theirs], "mse").total.backward()
    assert mine.grad is not None
    assert theirs.grad is None


def test_agreement_is_told_by_the_first_of_several_largest_logits():
    mine = torch.tensor([[0.0, 3, 1], [5, 5, 0], [0, 1, 2], [9, 0, 0]])
    theirs = torch.tensor([[0.0, 7, 7], [0, 5, 5], [0, 0, 1], [float("nan"), 0, 0]])
    result = chunked_loss(mine, [theirs, theirs], "mse")
    assert result.num_agreeing.item() == 2 * 2
    assert result.num_compared == 2 * 3
    assert result.num_nonfinite == 2


def test_autocast_does_not_round_what_is_computed():
    logits, theirs = random(2, NUM_POSITIONS, NUM_CLASSES, seed=1).float()
    plain = chunked_loss(logits, [theirs], "kl").total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunked_loss(logits, [theirs], "kl").total, plain)


def test_another_shape_is_an_error_that_shows_both():
    with pytest.raises(ValueError, match=r"3 rows of 7.*\(2, 7\)"):
        chunked_loss(torch.zeros(3, 7), [torch.zeros(2, 7)], "mse")


@pytest.mark.parametrize(("codec", "divergence"), [("columns:2", "kl"), ("tokens:2", "mse")])
def test_what_travelled_must_determine_the_divergence(codec, divergence):
    with pytest.raises(ValueError, match="does not determine"):
        chunked_loss(torch.zeros(2, 7), [sent(codec, torch.zeros(2, 7))], divergence)


def test_a_peer_that_counts_nothing_spoils_nothing_though_its_divergence_overflows():
    mine = random(4, NUM_CLASSES, seed=1).float().requires_grad_()
    near, far = random(4, NUM_CLASSES, seed=2).float(), torch.full((4, NUM_CLASSES), 1e30)
    found = chunked_loss(mine, [near, far], "mse", peer_weights=[2.0, 0.0])
    alone = chunked_loss(mine, [near], "mse")
    assert float(found.total.detach()) == pytest.approx(float(alone.total.detach()))
