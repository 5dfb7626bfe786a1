"""Coordinators of several models in threads, over real sockets on loopback."""

import logging
import threading

import pytest
import torch
from coordinating import BATCH, addresses_for, config, identity, predictions_of, run_models
from coordinating import open_coordinators as open_coordinators  # an autouse fixture

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.alignment import Judge
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.coordinator import AlignmentError, Coordinator
from fairseq_codistill.coordinator.introductions import Introduction
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.wire import Kind, Message


@pytest.mark.parametrize("num_models", [2, 3])
def test_every_model_gets_what_each_peer_predicted_at_that_position(num_models):
    addresses = addresses_for(num_models)

    def job(model):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(identity(model))
        received = []
        for position in range(6):
            coordinator.post(BatchKey(1, position), BATCH, predictions_of(model, position))
            received.append(coordinator.collect())
        coordinator.close()
        return received, coordinator.meter

    for model, (received, meter) in enumerate(run_models([lambda m=m: job(m) for m in range(num_models)])):
        for position, exchange in enumerate(received):
            assert set(exchange.predictions) == {*range(num_models)} - {model}
            for peer, values in exchange.predictions.items():
                assert torch.equal(values, predictions_of(peer, position))
            assert exchange.num_skipped == 0
        assert meter.delivered_messages == 6 * (num_models - 1)
        assert meter.rejected_messages == meter.mismatched_messages == 0


def test_what_one_peer_sent_is_decoded_while_another_is_waited_for(monkeypatch):
    addresses, first_is_decoded = addresses_for(3), threading.Event()

    def job(model):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(identity(model))
        if model == 0:
            verified = coordinator._judge.verified

            def noted(peer, *what):
                found = verified(peer, *what)
                if peer.model == 2:
                    first_is_decoded.set()
                return found

            monkeypatch.setattr(coordinator._judge, "verified", noted)
        came = model != 1 or first_is_decoded.wait(20.0)  # model 1 is late: the other must not have to wait for it
        coordinator.post(BatchKey(1, 0), BATCH, predictions_of(model, 0))
        exchange = coordinator.collect()
        coordinator.close()
        return came, exchange

    outcomes = run_models([lambda m=m: job(m) for m in range(3)])
    assert all(came for came, _ in outcomes)
    exchange = outcomes[0][1]
    assert list(exchange.predictions) == [1, 2]  # the order of arrival is no order of summation
    for peer, values in exchange.predictions.items():
        assert torch.equal(values, predictions_of(peer, 0))


def test_a_batch_fed_again_gets_the_same_peers_without_another_message():
    addresses = addresses_for(2)

    def job(model):
        coordinator = Coordinator(config(model, addresses), num_kept=2)
        coordinator.meet(identity(model))
        seen = []
        for key in [(1, 0, 0), (1, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 0, 1)]:
            coordinator.post(BatchKey(*key), BATCH, predictions_of(model, key[2]))
            seen.append(coordinator.collect())
        coordinator.close()
        return seen, coordinator.meter

    for model, (seen, meter) in enumerate(run_models([lambda: job(0), lambda: job(1)])):
        peer = 1 - model
        for first, again in ((0, 2), (1, 3)):
            assert torch.equal(seen[first].predictions[peer], seen[again].predictions[peer])
            assert seen[again].sent_bytes == 0
            assert seen[again].wait_s == 0
        assert seen[5].predictions == {}  # of an update that is over, and was not kept
        assert meter.delivered_messages == 3


def refused(first, second, changes=({}, {})):
    addresses = addresses_for(2)

    def job(model, who):
        Coordinator(config(model, addresses, **changes[model])).meet(who)

    return run_models([lambda: job(0, first), lambda: job(1, second)])


def test_other_settings_are_refused_on_both_sides_and_named():
    for error in refused(identity(0), identity(1, settings={"--max-tokens": 8})):
        assert isinstance(error, ConfigError)
        assert "--max-tokens" in str(error)


def test_another_number_of_devices_is_refused_on_both_sides():
    addresses = addresses_for(2)

    def job(model):
        Coordinator(config(model, addresses, codistill_start_timeout=5.0), 0, 1 + model).meet(identity(model))

    for error in run_models([lambda: job(0), lambda: job(1)]):
        assert isinstance(error, ConfigError)
        assert "devices per model" in str(error)


def test_identical_parameters_are_refused_on_both_sides():
    for error in refused(identity(0), identity(1, parameters_digest="0")):
        assert isinstance(error, ConfigError)
        assert "identical parameters" in str(error)


def test_identical_parameters_are_allowed_on_request_but_never_with_the_same_seed(caplog):
    allowed = ({"codistill_allow_identical_init": True},) * 2
    assert refused(identity(0), identity(1, parameters_digest="0"), allowed) == [None, None]
    assert caplog.text.count("without dropout, or a part of each that begins anew, they stay equal") == 2
    for error in refused(identity(0), identity(1, parameters_digest="0", seed=0), allowed):
        assert isinstance(error, ConfigError)


@pytest.mark.parametrize("what", ["fingerprint", "rows"])
def test_misaligned_batches_are_never_delivered_and_soon_an_error(what):
    addresses = addresses_for(2)

    def job(model):
        coordinator = Coordinator(config(model, addresses, codistill_max_mismatches=3))
        coordinator.meet(identity(model, remarks={"fairseq version": f"v{model}"}))
        batch = BATCH if what == "rows" else bytes([model]) * 16
        rows = 3 + model if what == "rows" else 3
        for position in range(9):
            coordinator.post(BatchKey(1, position), batch, torch.zeros(rows, 4))
            assert coordinator.collect().predictions == {}
        return position

    for error in run_models([lambda: job(0), lambda: job(1)]):
        assert isinstance(error, AlignmentError)
        assert "3 batches in a row" in str(error)
        assert "fairseq version: 'v" in str(error)


def test_a_peer_that_vanishes_costs_one_timeout_and_the_run_goes_on(caplog):
    addresses = addresses_for(2)
    vanished = threading.Event()

    def mortal():
        coordinator = Coordinator(config(1, addresses))
        coordinator.meet(identity(1))
        coordinator.post(BatchKey(1, 0), BATCH, predictions_of(1, 0))
        coordinator.collect()
        coordinator._mailbox._transport.close(1.0)  # no goodbye
        vanished.set()

    def survivor():
        coordinator = Coordinator(config(0, addresses, codistill_timeout=0.5))
        coordinator.meet(identity(0))
        exchanges = []
        for position in range(4):
            coordinator.post(BatchKey(1, position), BATCH, predictions_of(0, position))
            exchanges.append(coordinator.collect())
            assert vanished.wait(20)
        coordinator.close()
        return exchanges

    with caplog.at_level(logging.WARNING):
        exchanges, _ = run_models([survivor, mortal])
    assert [len(exchange.predictions) for exchange in exchanges] == [1, 0, 0, 0]
    assert [exchange.num_skipped for exchange in exchanges] == [0, 1, 1, 1]
    assert exchanges[1].wait_s >= 0.5
    assert exchanges[2].wait_s < exchanges[1].wait_s
    assert "model 1 is away" in caplog.text


def test_a_peer_that_was_late_once_comes_back_into_step():
    addresses = addresses_for(2)
    went_on = threading.Event()
    last = 30

    def job(model, timeout_s):
        coordinator = Coordinator(config(model, addresses, codistill_timeout=timeout_s))
        coordinator.meet(identity(model))
        received = []
        for position in range(last):
            if model == 1 and position == 5:
                assert went_on.wait(20)  # model 0 has given up on it and is two positions further
            coordinator.post(BatchKey(1, position), BATCH, predictions_of(model, position))
            received.append(len(coordinator.collect().predictions))
            if model == 0 and position == 6:
                went_on.set()
                coordinator.config.codistill_timeout = 20.0
                while not any(peer.state is PeerState.PRESENT for peer in coordinator.peers.values()):
                    coordinator.poll()
        coordinator.close()
        return received

    punctual, late = run_models([lambda: job(0, 0.3), lambda: job(1, 20.0)])
    assert late == [1] * last
    assert punctual == [1] * 5 + [0] * 2 + [1] * (last - 7)


def test_nothing_is_sent_to_a_peer_that_has_finished():
    addresses = addresses_for(2)

    def leaving():
        coordinator = Coordinator(config(1, addresses))
        coordinator.meet(identity(1))
        coordinator.close()

    def staying():
        coordinator = Coordinator(config(0, addresses))
        coordinator.meet(identity(0))
        while coordinator.peers[1].state is not PeerState.FINISHED:
            coordinator.poll()
        coordinator.post(BatchKey(1, 0), BATCH, torch.zeros(3, 4))
        exchange = coordinator.collect()
        coordinator.close()
        return exchange

    exchange, _ = run_models([staying, leaving])
    assert (exchange.sent_bytes, exchange.num_skipped) == (0, 1)


@pytest.mark.parametrize("fits", [True, False])
def test_a_late_joiner_is_met_while_training_and_never_ends_the_run(fits):
    addresses = addresses_for(2)
    alone, joined = threading.Event(), threading.Event()

    def early():
        coordinator = Coordinator(config(0, addresses, codistill_start_timeout=0.1, codistill_require_peers="never"))
        coordinator.meet(identity(0))
        coordinator.post(BatchKey(1, 0), BATCH, predictions_of(0, 0))
        assert coordinator.collect().predictions == {}
        alone.set()
        while not joined.is_set() or (fits and coordinator.peers[1].newest is None):
            coordinator.poll()
        coordinator.post(BatchKey(1, 1), BATCH, predictions_of(0, 1))
        exchange = coordinator.collect()
        coordinator.close()
        return exchange

    def late():
        assert alone.wait(20)
        coordinator = Coordinator(config(1, addresses))
        try:
            coordinator.meet(identity(1) if fits else identity(1, settings={"--max-tokens": 8}))
            coordinator.post(BatchKey(1, 1), BATCH, predictions_of(1, 1))
        finally:
            joined.set()
        return coordinator.collect()

    ours, theirs = run_models([early, late])
    if fits:
        assert torch.equal(ours.predictions[1], predictions_of(1, 1))
        assert torch.equal(theirs.predictions[0], predictions_of(0, 1))
    else:
        assert ours.predictions == {}
        assert isinstance(theirs, ConfigError)


def test_a_message_over_the_limit_is_an_error_before_it_is_sent():
    addresses = addresses_for(2)
    coordinator = Coordinator(config(0, addresses, codistill_max_message_mb=1))
    with pytest.raises(ConfigError, match="--codistill-max-message-mb is 1"):
        coordinator.post(BatchKey(1, 0), BATCH, torch.zeros(600, 600))
    coordinator.close()


@pytest.mark.parametrize("codec", ["bf16", "int8", "columns:2", "tokens:5", "topk:2"])
def test_every_codec_brings_what_the_peer_encoded(codec):
    addresses = addresses_for(2)
    divergence = "kl" if codec.startswith("tokens") else "mse"

    def job(model):
        coordinator = Coordinator(
            config(model, addresses, codistill_codec=codec, codistill_divergence=divergence, codistill_data_seed=5)
        )
        coordinator.meet(identity(model))
        received = []
        for position in range(3):
            predictions = torch.arange(12.0).view(3, 4) * (model + 1) + position
            coordinator.post(BatchKey(1, position), BATCH, predictions)
            received.append(coordinator.collect())
        coordinator.close()
        return received

    exchanges = run_models([lambda model=model: job(model) for model in range(2)])
    for mine, theirs in ((0, 1), (1, 0)):
        for position, exchange in enumerate(exchanges[mine]):
            assert exchange.num_skipped == 0, exchange
            got, sent = exchange.predictions[theirs], torch.arange(12.0).view(3, 4) * (theirs + 1) + position
            if codec == "int8":
                got = got.logits()
            if isinstance(got, torch.Tensor):
                torch.testing.assert_close(got.float(), sent, atol=0.1, rtol=0.01)
            elif codec == "tokens:5":
                assert got.classes.shape == (3, 5)
            else:
                rows = torch.arange(3).unsqueeze(1)
                torch.testing.assert_close(got.values.float(), sent[rows, got.classes.expand(3, -1)])


def test_a_process_refused_for_its_batches_stays_so_whatever_it_says_of_itself_later():
    settings = config(0, "127.0.0.1:1,127.0.0.1:2", codistill_max_mismatches=1)
    judge, peer = Judge(settings, 0, make_codec("fp32"), TrafficMeter()), Peer(1)
    judge.introduce(Introduction(settings, identity(0), 1))
    judge.on_start({1: peer})  # which joins later
    for is_another_process in (False, True):
        peer.on_hello(Introduction(settings, identity(1), 1).hello)
        judge.check_hello(peer)
        assert judge.refused == set()
        message = Message(Kind.PREDICTIONS, 1, 0, bytes(8), bytes(48), BatchKey(1, 0), bytes(16), 3, 4)
        assert judge.verified(peer, message, BATCH, (3, 4)) is None
        peer.on_hello({**peer.hello, "validation": 3.0})
        judge.check_hello(peer)
        assert judge.refused == {1}, is_another_process


def test_settings_that_are_equal_fit_together_whatever_json_makes_of_them():
    addresses = addresses_for(2)
    settings = {"image size": (32, 32), "labels": {1: "a"}, "least": float("nan"), "rate": 1}

    def job(model):
        coordinator = Coordinator(config(model, addresses))
        coordinator.meet(identity(model, settings={**settings, "rate": [1, 1.0][model]}))
        coordinator.close()

    assert run_models([lambda model=model: job(model) for model in range(2)]) == [None, None]


def test_two_runs_at_one_address_do_not_flood_each_other_while_they_wait():
    """Every hello is refused, and each in answer to another would be thousands a second."""
    addresses = addresses_for(2)

    def job(model):
        coordinator = Coordinator(
            config(model, addresses, codistill_run_id=str(model), codistill_start_timeout=3.0,
                   codistill_require_peers="never")
        )  # fmt: skip
        coordinator.meet(identity(model))
        coordinator.close()
        return coordinator.meter.rejected_messages

    for refused in run_models([lambda model=model: job(model) for model in range(2)]):
        assert 1 <= refused < 40  # four a second


def test_a_model_with_more_to_say_than_others_listen_to_is_told():
    coordinator = Coordinator(config(0, addresses_for(2)))
    with pytest.raises(ConfigError, match="give shorter settings=, batch_settings= and remarks="):
        coordinator.meet(identity(0, settings={"classes": ["name"] * 10_000}))
