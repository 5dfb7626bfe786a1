"""Which models can be copied, for what their peers know: those that keep what they computed, tie, wrap or compile."""

import copy
import functools
import weakref

import pytest
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.replicas import Replicas, tensors_of


class Keeping(nn.Module):
    """Keeps what it computed: old weight norm's weight, spectral norm's, and its own outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.weight_norm(nn.Linear(4, 8))
        self.second = nn.utils.spectral_norm(nn.Linear(8, 3))
        self.outputs = []

    def forward(self, inputs):
        self.outputs = [self.second(self.first(inputs).tanh())]
        return self.outputs[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_model_that_keeps_what_it_computed_can_be_copied():
    mine, peer, batch = Keeping(), Keeping(), torch.randn(6, 4)
    for net in (mine, peer):
        net(batch).sum().backward()
    replicas = Replicas(mine, mode="eval")
    replicas.swap_in(1, Replicas(peer).encode(), 0)
    found = replicas.predict(lambda net: net(batch))[1]
    with torch.no_grad():
        torch.testing.assert_close(found, peer.eval()(batch))
    assert mine.outputs[0].grad_fn is not None  # the own one still has its graph


class Tied(nn.Module):
    """Weights that are tied by a view, not by being one parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.out = self.embed.weight.t()

    def forward(self, inputs):
        return self.embed(inputs) @ self.out.t()


class Flat(Tied):
    """The same with parameters that are slices of one buffer, as libraries lay them out."""

    def __init__(self):
        super().__init__()
        self.embed.weight.data = torch.randn(24)[12:24].view(4, 3)
        self.out = self.embed.weight.t()


class Counting(Tied):
    """Keeps something computed in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("norm", self.embed.weight.square().sum())


@pytest.mark.parametrize("kind", [Tied, Flat, Counting])
def test_a_view_of_a_parameter_is_one_of_the_copy(kind):
    mine, peer, batch = kind(), kind(), torch.randn(6, 3)
    replicas = Replicas(mine)
    replicas.swap_in(1, Replicas(peer).encode(), 0)
    with torch.no_grad():
        expected = peer(batch)
        mine.embed.weight.add_(1)  # which the copy does not see
    torch.testing.assert_close(replicas.predict(lambda net: net(batch))[1], expected)


def as_fairscale(forward):
    module = forward.__self__
    return functools.partial(
        lambda kind, module, inputs: kind.forward(module(), inputs), type(module), weakref.ref(module)
    )


@pytest.mark.parametrize("wrap", [torch.no_grad(), torch.autocast("cpu", torch.bfloat16), as_fairscale])
def test_a_forward_that_was_replaced_by_a_function_is_refused_before_the_meeting(wrap):
    """A copy would share it, and so predict what this model does."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    net[0].forward = wrap(net[0].forward)
    with pytest.raises(ConfigError, match=r"the forward\(\) of a Linear was replaced by a function"):
        Replicas(net)


@pytest.mark.parametrize("is_of_timm", [False, True])
def test_copies_wait_for_no_other_rank_in_synchronised_batch_normalisation(monkeypatch, is_of_timm):
    """Each rank has its copies at a time of its own. That of timm has an activation behind it."""
    alone = BatchNormAct2d(4, act_layer=nn.SiLU) if is_of_timm else nn.BatchNorm2d(4)
    convert = convert_sync_batchnorm if is_of_timm else nn.SyncBatchNorm.convert_sync_batchnorm
    peer, mine = (convert(copy.deepcopy(nn.Sequential(nn.Conv2d(4, 4, 1), alone))) for _ in range(2))
    assert isinstance(peer[1], nn.SyncBatchNorm)
    batch = torch.randn(8, 4, 2, 2)
    replicas = Replicas(mine, mode="train")
    nn.init.normal_(peer[0].weight)
    replicas.swap_in(1, Replicas(peer).encode(), elapsed=1)
    expected = alone(peer[0](batch))

    def forward_of_all_ranks(*_):
        raise AssertionError("waits for the other ranks")

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward_of_all_ranks)
    torch.testing.assert_close(replicas.predict(lambda net: net(batch))[1], expected)


@pytest.mark.parametrize("is_of_an_earlier_version", [False, True])
def test_a_compiled_model_and_one_that_is_not_have_the_same_architecture(is_of_an_earlier_version):
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    assert Replicas(torch.compile(net)).layout.digest == Replicas(net).layout.digest
    with_copy = Replicas(net)
    with_copy.swap_in(1, with_copy.encode(), elapsed=3)
    again, state = Replicas(torch.compile(copy.deepcopy(net))), with_copy.state_dict()
    if is_of_an_earlier_version:
        state["copies"]["1"] = {f"_orig_mod.{name}": tensor for name, tensor in state["copies"]["1"].items()}
    again.load_state_dict(state)
    assert again.elapsed == {1: 3}
    found, expected = (tensors_of(replicas._copies[1]) for replicas in (again, with_copy))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
