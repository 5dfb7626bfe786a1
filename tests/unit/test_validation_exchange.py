"""Validation batches are compared with the peers' predictions, and nothing but figures comes of it."""

import pytest
import torch
from coordinating import BATCH, addresses_for, config, identity, predictions_of, run_models
from coordinating import open_coordinators as open_coordinators  # an autouse fixture

from fairseq_codistill import figures
from fairseq_codistill.codistiller import Codistiller
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.peers import PeerState
from fairseq_codistill.coordinator.validation import validation_key
from fairseq_codistill.testing import Fault, Script, ScriptedTransport

NOBODY = "127.0.0.1:1,127.0.0.1:2"  # never opened
LAST = BatchKey(1, 4)  # of training, before the validation


def train(coordinator, model, position):
    coordinator.post(BatchKey(1, position), BATCH, predictions_of(model, position))
    return coordinator.collect()


def validate(coordinator, model, number, mark=BATCH):
    return coordinator.validation.exchange(validation_key(LAST, number), mark, predictions_of(model, 100 + number))


def test_models_that_validate_together_get_each_others_predictions_and_train_on():
    addresses = addresses_for(2)

    def job(model):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(identity(model))
        found = [train(coordinator, model, LAST.position)]
        found += [validate(coordinator, model, number) for number in range(20)]  # more than a mailbox keeps
        found += [train(coordinator, model, 5)]
        summary = coordinator.summary()
        coordinator.close()
        return found, summary

    for model, (found, summary) in enumerate(run_models([lambda: job(0), lambda: job(1)])):
        positions = [LAST.position, *range(100, 120), 5]
        for position, exchange in zip(positions, found, strict=True):
            assert torch.equal(exchange.predictions[1 - model], predictions_of(1 - model, position))
        assert summary["exchanges"] == summary["batches_due"] == 2  # of training


def test_a_peer_that_trains_on_instead_is_not_waited_for():
    addresses = addresses_for(2)

    def job(model):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(identity(model))
        train(coordinator, model, LAST.position)
        found = [validate(coordinator, model, number) for number in range(3)] if model == 0 else []
        taught = train(coordinator, model, 5)
        state = coordinator.peers[1 - model].state
        coordinator.close()
        return found, taught, state

    (found, taught, state), (_, taught_too, _) = run_models([lambda: job(0), lambda: job(1)])
    assert [exchange.predictions for exchange in found] == [{}, {}, {}]
    assert found[-1].wait_s < 20
    assert set(taught.predictions) == {1}
    assert set(taught_too.predictions) == {0}
    assert state is not PeerState.AWAY


def scripted(faults, **settings):
    script = Script(1, NOBODY, lambda key, logits: -logits, faults)
    coordinator = Coordinator(config(0, NOBODY, **settings), transport=ScriptedTransport(script))
    coordinator.meet(identity(0))
    return coordinator


def test_a_peer_that_is_missing_costs_one_timeout_a_validation_and_stays_what_it_was():
    silent = {tuple(validation_key(LAST, number)): Fault.DROP for number in range(2)}
    coordinator = scripted(silent, codistill_timeout=0.3)
    train(coordinator, 0, LAST.position)
    first, second, third = (validate(coordinator, 0, number) for number in range(3))
    assert first.wait_s >= 0.3
    assert second.wait_s < 0.3
    assert not first.predictions
    assert not second.predictions
    assert set(third.predictions) == {1}  # what is there is taken
    assert coordinator.peers[1].state is PeerState.PRESENT
    assert set(train(coordinator, 0, 5).predictions) == {1}


def test_other_validation_data_are_not_compared_and_no_error(caplog):
    others = {tuple(validation_key(LAST, number)): Fault.MISALIGNED for number in range(5)}
    coordinator = scripted(others, codistill_max_mismatches=2)
    train(coordinator, 0, LAST.position)
    assert [validate(coordinator, 0, number).predictions for number in range(5)] == [{}] * 5
    assert caplog.text.count("not compared in validation with model 1") == 1
    assert set(train(coordinator, 0, 5).predictions) == {1}


@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_figures_of_a_validation_are_means_over_what_was_compared(divergence):
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    changed = torch.tensor([[9.0, 0.0, 3.0], [0.0, 9.0, 0.0]])
    script = Script(1, NOBODY, lambda key, mine: changed, codec="fp32")
    transport = ScriptedTransport(script)
    peers = Codistiller(num_models=2, addresses=NOBODY, codec="fp32", divergence=divergence, transport=transport)
    peers.meet(torch.nn.Linear(2, 2))
    rows = torch.tensor([0, 1])
    with torch.no_grad():
        sums = peers.compare(validation_key(LAST, 0), BATCH, logits, rows)
    means = figures.compared_means(lambda name: float(sums.get(name, 0.0)))
    assert means["codistill_peers"].value == 1
    assert means["codistill_agreement"].value == 0.5
    if divergence == "mse":
        assert means["codistill_mse"].value == pytest.approx((9 / 3 + 162 / 3) / 2)


def test_figures_that_nobody_was_there_for_are_left_out():
    peers = Codistiller(num_models=1)
    assert peers.compare(validation_key(LAST, 0), BATCH, torch.zeros(2, 2)) == {}
    nobody = figures.no_comparison(torch.zeros(1))
    assert set(figures.compared_means(lambda name: float(nobody.get(name, 0.0)))) == {"codistill_peers"}
