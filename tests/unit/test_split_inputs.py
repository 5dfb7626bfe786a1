"""Inputs of a step in parts: which forms of them are cut, and what becomes of those that cannot be."""

from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fairseq_codistill import Codistiller
from fairseq_codistill.config import ConfigError
from fairseq_codistill.testing import Script, ScriptedTransport

ADDRESSES = "127.0.0.1:29600,127.0.0.1:29700"
NUM_CLASSES = 5


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def met(parts):
    """A Codistiller that has met a peer whose logits are ours plus 1."""
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits + 1))
    peers = Codistiller(num_models=2, addresses=ADDRESSES, codec="fp32", parts=parts, transport=transport)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES))
    return peers


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: UserDict(x=x, cache=False), lambda inputs: inputs.data["x"]),  # as tokenizers of transformers give
        (lambda x: Pair(x, -x), lambda inputs: (inputs.one - inputs.other) / 2),
        (lambda x: [x, (x, None)], lambda inputs: inputs[1][0]),
    ],
)
def test_inputs_of_every_form_are_cut_as_their_targets_are(wrap, unwrap):
    gradients = []
    for parts in ("1", "2"):
        model = torch.nn.Linear(2, NUM_CLASSES)
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.zeros_(model.bias)
        peers = met(parts)
        peers.forward_backward(
            model, wrap(random(5, 2)), torch.arange(5), range(5), call=lambda model, inputs: model(unwrap(inputs))
        )
        gradients.append(model.weight.grad)
    torch.testing.assert_close(*gradients)


class Named(UserDict):
    """That is made of no dict, so that a part of it would be another thing."""

    def __init__(self, *, x):
        super().__init__(x=x)


class Sized(UserDict):
    """That looks at what it is made of."""

    def __init__(self, x):
        super().__init__(x=x, size=x.size(0))


@pytest.mark.parametrize(
    "inputs",
    [
        (random(4, 2), [2, 2, 1, 1]),
        object(),
        (random(4, 2), torch.tensor(1.0)),
        Named(x=random(4, 2)),
        Sized(random(4, 2)),
    ],
)
def test_inputs_that_cannot_be_cut_stay_whole_or_are_told(inputs):
    batch = inputs, torch.arange(4), range(4)
    call = {"call": lambda model, inputs: model(random(4, 2))}
    auto = met("auto")
    auto.forward_backward(torch.nn.Linear(2, NUM_CLASSES), *batch, **call)
    assert auto.figures()["codistill_peers"] == 1
    assert not auto._parting.splits  # so no model will ever be asked to
    with pytest.raises(ValueError, match="parts is '2', and inputs are a .* cannot be cut; give a tensor"):
        met("2").forward_backward(torch.nn.Linear(2, NUM_CLASSES), *batch, **call)


@pytest.mark.parametrize("setting", ["find_unused_parameters", "static_graph"])
def test_no_batch_is_cut_whose_wrapper_would_miss_the_gradients_of_a_part(tmp_path, setting):
    batch = random(4, 2), torch.arange(4), range(4)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, searched = (
            DistributedDataParallel(torch.nn.Linear(2, NUM_CLASSES), **{setting: is_on}) for is_on in (False, True)
        )
        offers = []
        for model in (plain, searched):
            auto = met("auto")
            auto.forward_backward(model, *batch)
            assert auto.figures()["codistill_peers"] == 1
            offers.append(auto._parting.splits)
        assert offers == [True, False]
        met("2").forward_backward(plain, *batch)
        with pytest.raises(ConfigError, match=f"--codistill-parts is 2, and .* has {setting}, .*; give --codistill-p"):
            met("2").forward_backward(searched, *batch)
        met("1").forward_backward(searched, *batch)
    finally:
        torch.distributed.destroy_process_group()
