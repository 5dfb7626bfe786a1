"""Which positions are exchanged at, who is behind, and several positions in flight."""

import threading

import pytest
import torch
from coordinating import BATCH, addresses_for, config, identity, predictions_of, run_models
from coordinating import open_coordinators as open_coordinators  # an autouse fixture

from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.mailbox import CAPACITY
from fairseq_codistill.coordinator.peers import PeerState


def test_due_positions_are_multiples_of_the_interval():
    coordinator = Coordinator(config(0, addresses_for(2), codistill_interval=5))
    assert [elapsed for elapsed in range(16) if coordinator.is_due(elapsed)] == [0, 5, 10, 15]


def test_who_starts_behind_learns_where_the_others_are_and_one_ahead_has_nothing_to_skip():
    addresses = addresses_for(3)
    starts = [0, 25, 7]
    barrier = threading.Barrier(3)

    def job(model):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(identity(model), DataOrder(10), starts[model])
        barrier.wait(20)
        return coordinator.num_behind(starts[model], within_reach=False), coordinator.num_behind(starts[model])

    outcomes = run_models([lambda model=model: job(model) for model in range(3)])
    assert outcomes == [(25, 25), (0, 0), (18, 18)]


@pytest.mark.parametrize(
    ("settings", "start", "lead", "skipped"),
    [
        ({"codistill_interval": 20}, 30, 3, 0),  # it waits at 40 for whoever it has met
        ({"codistill_interval": 20}, 30, 10, 0),
        ({"codistill_interval": 20}, 30, 11, 11),  # the exchange at 40 was made without us
        ({"codistill_interval": 20}, 40, 1, 1),
        ({"codistill_burn_in": 100}, 30, 5, 0),
        ({"codistill_burn_in": 100}, 30, 50, 50),  # too far for it to wait when the exchanges begin
        ({"codistill_burn_in": 100}, 99, 2, 2),
        ({"codistill_interval": 20, "codistill_exchange": "checkpoints", "codistill_replica_wait": True}, 30, 3, 0),
    ],
)
def test_at_the_start_a_lead_without_a_missed_exchange_is_none(settings, start, lead, skipped):
    """Two models that resume together meet a moment apart, and the first one goes on: no reason to skip batches."""
    addresses = addresses_for(2)
    barrier = threading.Barrier(2)

    def job(model, elapsed):
        coordinator = Coordinator(config(model, addresses, **settings))
        coordinator.meet(identity(model), DataOrder(10), elapsed)
        barrier.wait(20)
        return coordinator.num_behind(start, within_reach=False)

    assert run_models([lambda: job(0, start), lambda: job(1, start + lead)])[0] == skipped


@pytest.mark.parametrize("interval", [1, 3])
def test_a_lead_that_the_mailbox_bridges_is_caught_up_and_a_larger_one_skipped(interval):
    addresses = addresses_for(2)
    order = DataOrder(10)
    reach = CAPACITY * interval
    done = threading.Event()

    def ahead():
        coordinator = Coordinator(config(1, addresses, codistill_interval=interval))
        coordinator.meet(identity(1), order)
        for elapsed in (reach, reach + 1):
            coordinator.post(order.key(elapsed), BATCH, predictions_of(1, elapsed))
        assert done.wait(20)
        return coordinator.num_behind(reach + 1)

    def behind():
        coordinator = Coordinator(config(0, addresses, codistill_interval=interval))
        coordinator.meet(identity(0), order)
        while coordinator.peers[1].newest != order.key(reach + 1):
            coordinator.poll(0)
        found = [coordinator.num_behind(elapsed) for elapsed in (0, 1, 2)]
        done.set()
        return found

    assert run_models([behind, ahead]) == [[reach + 1, 0, 0], 0]


def test_who_is_slower_in_a_burn_in_is_waited_for_and_skips_nothing():
    """Nothing is exchanged in it, so the lead of the other may be large by the time that the exchanges begin."""
    addresses, settings = addresses_for(2), {"codistill_burn_in": 100}
    order, done = DataOrder(1000), threading.Event()

    def fast():
        coordinator = Coordinator(config(1, addresses, **settings))
        coordinator.meet(identity(1), order)
        for elapsed in range(100):
            coordinator.poll(elapsed)
        coordinator.post(order.key(100), BATCH, predictions_of(1, 0))
        exchange = coordinator.collect()
        assert done.wait(20)
        return sorted(exchange.predictions)

    def slow():
        coordinator = Coordinator(config(0, addresses, **settings))
        coordinator.meet(identity(0), order)
        while coordinator.peers[1].newest is None:
            coordinator.poll(40)
        behind = [coordinator.num_behind(elapsed) for elapsed in (40, 85, 92, 99)]
        coordinator.post(order.key(100), BATCH, predictions_of(0, 0))
        coordinator.collect()
        # Once the other gave up waiting and is beyond what the mailbox keeps, there is something to skip.
        coordinator.peers[1].newest = order.key(108)
        done.set()
        return behind, coordinator.num_behind(40)

    assert run_models([slow, fast]) == [([0, 0, 0, 0], 68), [0]]


def test_nobody_follows_a_peer_that_has_finished():
    addresses = addresses_for(2)

    def finished():
        coordinator = Coordinator(config(1, addresses))
        coordinator.meet(identity(1), DataOrder(10), 90)
        coordinator.close()

    def other():
        coordinator = Coordinator(config(0, addresses))
        coordinator.meet(identity(0), DataOrder(10), 0)
        while coordinator.peers[1].state is not PeerState.FINISHED:
            coordinator.poll(0)
        return coordinator.num_behind(0, within_reach=False)

    assert run_models([other, finished])[0] == 0


@pytest.mark.parametrize("num_models", [2, 3])
def test_two_positions_in_flight_bring_what_one_at_a_time_does(num_models):
    addresses = addresses_for(num_models)
    keys = [BatchKey(1, position, part) for position in range(4) for part in range(2)]

    def job(model):
        coordinator = Coordinator(config(model, addresses), num_kept=2)
        coordinator.meet(identity(model))
        received = {}
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            for key in (first, second):
                coordinator.post(key, BATCH, predictions_of(model, keys.index(key)))
            # an odd model takes the second part first; everyone is fed the first part again at the end
            for key in (second, first) if model % 2 else (first, second):
                received[key] = coordinator.collect(key)
            coordinator.post(first, BATCH, predictions_of(model, 99))
            again = coordinator.collect()
            assert again.predictions.keys() == received[first].predictions.keys()
            assert again.wait_s == again.sent_bytes == 0
        coordinator.close()
        return received, coordinator.meter

    for model, (received, meter) in enumerate(run_models([lambda m=m: job(m) for m in range(num_models)])):
        for number, key in enumerate(keys):
            assert set(received[key].predictions) == {*range(num_models)} - {model}
            for peer, values in received[key].predictions.items():
                assert torch.equal(values, predictions_of(peer, number))
        assert meter.delivered_messages == len(keys) * (num_models - 1)
        assert meter.stale_messages == meter.rejected_messages == 0


def test_a_batch_fed_again_while_it_is_pending_still_gets_its_peers():
    addresses = addresses_for(2)

    def job(model):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(identity(model))
        for key in (BatchKey(1, 0, 0), BatchKey(1, 0, 1), BatchKey(1, 0, 0)):
            coordinator.post(key, BATCH, predictions_of(model, key.micro_batch))
        exchanges = [coordinator.collect(), coordinator.collect(BatchKey(1, 0, 1))]
        coordinator.close()
        return exchanges

    for model, exchanges in enumerate(run_models([lambda: job(0), lambda: job(1)])):
        for part, exchange in enumerate(exchanges):
            assert torch.equal(exchange.predictions[1 - model], predictions_of(1 - model, part))


def test_a_position_that_was_never_posted_cannot_be_collected():
    coordinator = Coordinator(config(0, addresses_for(2)))
    with pytest.raises(AssertionError, match="follows post"):
        coordinator.collect(BatchKey(1, 0))


@pytest.mark.parametrize("lengths", [(150, 100), (100, 150)])
def test_models_in_step_are_so_also_where_epochs_differ_in_length(lengths):
    """Shards, virtual epochs: the batches of an epoch are made when it begins, on all models alike."""
    addresses, barrier = addresses_for(2), threading.Barrier(2)

    def job(model, lead):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(
            identity(model), DataOrder(lengths[0]), 140
        )  # what is announced counts in the first epoch alone
        order = DataOrder(lengths[1])
        coordinator.follow(order)
        position = 20 + lead
        coordinator.post(BatchKey(3, position), BATCH, predictions_of(model, 0))
        barrier.wait(20)
        while coordinator.peers[1 - model].newest is None:
            coordinator.poll()
        behind = coordinator.num_behind(order.elapsed(3, position))
        barrier.wait(20)
        return behind

    assert run_models([lambda: job(0, 0), lambda: job(1, 3)]) == [0, 0]
    addresses, barrier = addresses_for(2), threading.Barrier(2)
    assert run_models([lambda: job(0, 0), lambda: job(1, 30)]) == [30, 0]
