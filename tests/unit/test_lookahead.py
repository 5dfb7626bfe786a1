"""Looking ahead: what is sent before it is due, that it leaves no trace, and that nothing is sent twice."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_codistill import AlignmentError, CodistillationConfig, Codistiller, ConfigError, with_next
from fairseq_codistill.lookahead import undisturbed, unwrapped
from fairseq_codistill.testing import Script, ScriptedTransport

NOBODY = "127.0.0.1:1,127.0.0.1:2"  # never opened


def met(model, **settings):
    script = Script(1, NOBODY, lambda key, logits: logits + 1)
    peers = Codistiller(
        num_models=2, addresses=NOBODY, codec="fp32", transport=ScriptedTransport(script), lookahead=True, **settings
    )
    peers.meet(model)
    return peers, script


def batch_of(number):
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(4, 3, generator=generator)
    return inputs, torch.randint(3, (4,), generator=generator), torch.arange(4) + 4 * number


def test_a_look_ahead_leaves_statistics_random_numbers_and_gradients_as_they_were():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    loss = model(torch.randn(8, 3)).sum()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, others = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1].tolist())
    with undisturbed(model) as bare:
        random.random(), np.random.rand(700)
        assert not bare(torch.randn(8, 3)).requires_grad
        assert int(model[1].num_batches_tracked) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loss.backward()  # of the batch at hand, whose pass kept what the look ahead must not change


@pytest.mark.parametrize("interval", [1, 3])
def test_each_batch_but_the_first_is_sent_once_one_update_early_by_the_parameters_of_then(interval):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    peers, script = met(model, interval=interval)
    sent_early, losses = [], []
    for (inputs, targets, ids), following in with_next([batch_of(number) for number in range(7)]):
        loss = peers.loss(model(inputs), targets, ids)
        losses.append(loss.item())
        if following is not None:
            expected = model(following[0]).detach()
            sent_early.append(peers.look_ahead(model, *following))
            if sent_early[-1]:
                assert torch.equal(list(script.received[0].values())[-1], expected)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    due = [number for number in range(7) if number % interval == 0]
    assert [key.position for key in script.received[0]] == due
    assert [number + 1 for number, was_sent in enumerate(sent_early) if was_sent] == due[1:]
    assert peers.figures()["codistill_peers"] == 1


def test_a_batch_that_is_fed_again_after_a_look_ahead_has_what_it_had_the_first_time():
    model = nn.Linear(3, 3)
    peers, script = met(model)
    for (inputs, targets, ids), following in with_next([batch_of(number) for number in range(4)]):
        first = peers.loss(model(inputs), targets, ids)
        if following is not None:
            peers.look_ahead(model, *following)
        again = peers.loss(model(inputs), targets, ids, again=True)  # as after an overflow
        assert torch.equal(first, again)
        assert peers.figures()["codistill_peers"] == 1
    assert [key.position for key in script.received[0]] == [0, 1, 2, 3]


def test_the_step_of_a_loop_looks_ahead_where_it_is_given_the_next_batch():
    model = nn.Linear(3, 3)
    peers, script = met(model)
    for batch, following in with_next([batch_of(number) for number in range(3)]):
        peers.forward_backward(model, *batch, following=following)
        done = len(script.received[0])
        assert done == 3 if following is None else int(batch[2][0]) // 4 + 2
    assert peers.figures()["codistill_skipped"] == 0


@pytest.mark.parametrize("settings", [{"parts": "2"}, {"exchange": "checkpoints"}, {"codec": "vote"}])
def test_what_cannot_be_looked_ahead_at_is_refused(settings):
    names = {f"codistill_{name}": value for name, value in settings.items()}
    config = CodistillationConfig(
        codistill_num_models=2,
        codistill_addresses=NOBODY,
        codistill_lookahead=True,
        **{"codistill_codec": "fp32", **names},
    )
    with pytest.raises(ConfigError, match="--codistill-lookahead with --codistill-"):
        config.validate()


def test_a_look_ahead_at_another_batch_than_the_next_is_told_before_it_teaches():
    model = nn.Linear(3, 3)
    peers, _ = met(model)
    first, second, third = (batch_of(number) for number in range(3))
    peers.loss(model(first[0]), *first[1:])
    assert peers.look_ahead(model, *third)
    with pytest.raises(AlignmentError, match="position 1 .* a look ahead takes the batch that comes next"):
        peers.loss(model(second[0]), *second[1:])


def test_a_part_of_a_model_that_is_called_module_is_no_wrapper_of_it():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, inputs):
            return self.head(self.module(inputs))

    model, batch = Scaled(), batch_of(1)
    peers, script = met(model)
    peers.loss(model(batch_of(0)[0]), *batch_of(0)[1:])
    peers.look_ahead(nn.DataParallel(model), *batch)
    assert torch.equal(list(script.received[0].values())[-1], model(batch[0]))


@pytest.mark.parametrize("own", ["parameter", "buffer", "arithmetic"])
def test_a_module_around_another_is_a_part_of_the_model_unless_a_library_put_it_there(own):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(3, 3)
            if own == "parameter":
                self.scale = nn.Parameter(torch.tensor(5.0))
            if own == "buffer":
                self.register_buffer("scale", torch.tensor(5.0))

        def forward(self, inputs):
            return getattr(self, "scale", 5.0) * self.module(inputs)

    model, batch = Scaled(), batch_of(1)
    assert unwrapped(nn.DataParallel(model)) is model
    peers, script = met(nn.DataParallel(model))
    peers.loss(model(batch_of(0)[0]), *batch_of(0)[1:])
    peers.look_ahead(nn.DataParallel(model), *batch)
    assert torch.equal(list(script.received[0].values())[-1], model(batch[0]))


def test_a_compiled_wrapper_is_taken_off_as_well_and_a_compiled_model_stays():
    model = nn.Linear(3, 3)
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model
    compiled = torch.compile(model, backend="eager")
    assert unwrapped(nn.DataParallel(compiled)) is compiled


def test_a_transfer_set_is_not_looked_ahead_at():
    script = Script(1, NOBODY, lambda key, logits: logits + 1)
    peers = Codistiller(
        num_models=2, addresses=NOBODY, codec="fp32", transport=ScriptedTransport(script), lookahead=True
    )
    with pytest.raises(ConfigError, match="lookahead is set, and a transfer set is exchanged"):
        peers.meet(nn.Linear(3, 3), transfer={"name": "shared"})
