"""Peers per position over real sockets: only partners exchange, and one that ends or comes back costs its own terms."""

import threading
import time

import torch
from coordinating import BATCH, addresses_for, config, identity, predictions_of, run_models
from coordinating import open_coordinators as open_coordinators  # an autouse fixture

from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.pairing import partners

NUM_MODELS, POSITIONS, LAST, MIDDLE = 4, 24, 8, 16


def partner_of(model, position):
    return next(iter(partners(NUM_MODELS, 1, 1, BatchKey(1, position), model)))


def joined(model, addresses, **changes):
    coordinator = Coordinator(config(model, addresses, codistill_peers_per_position=1, **changes))
    coordinator.meet(identity(model))
    return coordinator


def exchange_at(coordinator, model, position):
    coordinator.post(BatchKey(1, position), BATCH, predictions_of(model, position))
    return coordinator.collect()


def test_only_partners_exchange_and_all_counts_hold():
    addresses = addresses_for(NUM_MODELS)

    def job(model):
        coordinator = joined(model, addresses)
        found = [exchange_at(coordinator, model, position) for position in range(POSITIONS)]
        coordinator.close("finished")
        return found, coordinator

    for model, (found, coordinator) in enumerate(run_models([lambda m=m: job(m) for m in range(NUM_MODELS)])):
        for position, exchange in enumerate(found):
            assert list(exchange.predictions) == [partner_of(model, position)]
            assert torch.equal(
                next(iter(exchange.predictions.values())), predictions_of(partner_of(model, position), position)
            )
            assert exchange.num_skipped == 0
        assert coordinator.meter.delivered_messages == POSITIONS
        assert coordinator.meter.stale_messages == coordinator.meter.mismatched_messages == 0
        assert coordinator.summary()["share_distilled"] == 1.0


def test_one_that_ends_costs_the_terms_of_its_partners_and_no_wait():
    addresses = addresses_for(NUM_MODELS)

    def job(model):
        coordinator = joined(model, addresses)
        found = [exchange_at(coordinator, model, at) for at in range(LAST if model == 3 else POSITIONS)]
        coordinator.close("finished")
        return found

    outcomes = run_models([lambda m=m: job(m) for m in range(NUM_MODELS)])
    for model, found in enumerate(outcomes[:3]):
        for position, exchange in enumerate(found):
            is_gone = partner_of(model, position) == 3 and position >= LAST
            assert exchange.num_skipped == is_gone
            assert len(exchange.predictions) == 1 - is_gone
        assert sum(exchange.wait_s for exchange in found) < 20.0  # no timeout was waited out


def test_one_that_is_started_again_is_exchanged_with_again():
    addresses, back = addresses_for(NUM_MODELS), threading.Event()
    has_arrived = [False] * NUM_MODELS

    def job(model):
        coordinator, found = joined(model, addresses), []
        for position in range(POSITIONS):
            if position == LAST and model == 3:
                coordinator.close("its process ended")
                coordinator = joined(model, addresses)
                back.set()
            elif position == LAST:
                while not back.wait(0.02):
                    coordinator.poll()
            if position == MIDDLE:  # how long it takes to catch up is the machine's affair
                has_arrived[model] = True
                while not all(has_arrived):
                    coordinator.poll()
                    time.sleep(0.005)
            found.append(exchange_at(coordinator, model, position))
        coordinator.close("finished")
        return found

    outcomes = run_models([lambda m=m: job(m) for m in range(NUM_MODELS)])
    for model, found in enumerate(outcomes):
        assert not isinstance(found, Exception), found
        missed = [position for position, exchange in enumerate(found) if exchange.num_skipped and position >= MIDDLE]
        assert len(missed) <= 1, f"model {model} missed {missed}"  # of the two or three that it has with model 3
        assert found[-1].num_skipped == 0
