"""Who must be there, what is said when nobody is, and what is counted in the end. Real sockets on loopback."""

import contextlib
import logging
import socket
import threading
import time

import pytest
import torch
import zmq
from helpers import free_ports

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import Coordinator, NoPeersError
from fairseq_codistill.coordinator.herald import announce_death
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.peers import PeerState
from fairseq_codistill.coordinator.transports.curve_keys import make_keys

SOON = {"codistill_start_timeout": 1.0, "codistill_timeout": 0.3}


@pytest.fixture
def make():
    """Makes coordinators; closes them at the end."""
    opened = []

    def make_one(model, addresses, **changes):
        values = {"codistill_start_timeout": 20.0, "codistill_timeout": 20.0, "codistill_codec": "fp32", **changes}
        config = CodistillationConfig(
            codistill_num_models=len(addresses.split(",")), codistill_model_index=model,
            codistill_addresses=addresses, **values,
        )  # fmt: skip
        opened.append(Coordinator(config))
        return opened[-1]

    yield make_one
    for coordinator in opened:
        coordinator.interrupt("the test is over")
        coordinator.close()


def addresses_for(num_models=2):
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))


def meet(coordinator, **identity):
    model = coordinator.config.codistill_model_index
    coordinator.meet(Identity({}, {}, str(model), model, **identity), DataOrder(100))


def meet_all(*coordinators):
    """All at once, each in its thread; what each raised, None where it met."""
    outcomes = [None] * len(coordinators)

    def run(index):
        try:
            meet(coordinators[index])
        except (ConfigError, NoPeersError) as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(coordinators))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def exchange(coordinator, position=0):
    coordinator.post(BatchKey(1, position), bytes(16), torch.zeros(2, 3))
    return coordinator.collect()


def poll_for(coordinator, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        coordinator.poll(1)
        time.sleep(0.02)


def until_finished(coordinator, peer):
    while coordinator.peers[peer].state is not PeerState.FINISHED:
        coordinator.poll()


class TestWhatWasSeen:
    @pytest.mark.parametrize("transport", ["zmq", "gloo"])
    def test_nobody_is_there(self, make, transport):
        addresses = addresses_for()
        alone = make(1, addresses, **SOON, codistill_transport=transport)
        with pytest.raises(NoPeersError) as error:
            meet(alone)
        assert f"model 0: nobody listens at {addresses.split(',')[0]} (connection refused)" in str(error.value).replace(
            "its connection was lost: no contact within --codistill-start-timeout; ", ""
        )
        assert "--codistill-require-peers never" in str(error.value)

    def test_a_name_does_not_resolve(self, make):
        port = free_ports(1)[0]
        alone = make(0, f"127.0.0.1:{port},no-such-host.invalid:29600", **SOON, codistill_keys="none")
        with pytest.raises(NoPeersError, match=r"model 1: the name 'no-such-host.invalid' does not resolve"):
            meet(alone)

    @pytest.mark.parametrize("theirs", ["others", "none"])
    def test_the_handshake_is_refused(self, make, tmp_path, theirs):
        for folder in ("ours", "others"):
            make_keys(str(tmp_path / folder), 2)
        addresses = addresses_for()
        keys = [str(tmp_path / "ours"), "none" if theirs == "none" else str(tmp_path / theirs)]
        pair = [make(model, addresses, **SOON, codistill_keys=keys[model]) for model in (0, 1)]
        for model, error in enumerate(meet_all(*pair)):
            assert isinstance(error, NoPeersError)
            assert f"model {1 - model}: something listens at {addresses.split(',')[1 - model]}" in str(error)
            assert "same --codistill-keys" in str(error)
        assert "connections to this rank had not the right key" in str(error) or theirs == "none"

    def test_the_other_is_of_another_run(self, make):
        addresses = addresses_for()
        pair = [make(model, addresses, **SOON, codistill_run_id=f"run {model}") for model in (0, 1)]
        for error in meet_all(*pair):
            assert "its messages are of another run: give all jobs the same --codistill-run-id" in str(error)

    def test_something_is_connected_and_silent(self, make):
        addresses = addresses_for()
        context = zmq.Context()
        try:
            pull = context.socket(zmq.PULL)
            pull.bind(f"tcp://{addresses.split(',')[1]}")
            with pytest.raises(NoPeersError, match=r"model 1: connected to \S+, and heard nothing from there"):
                meet(make(0, addresses, **SOON))
        finally:
            context.destroy(linger=0)

    def test_something_else_listens_there(self, make):
        addresses = addresses_for()
        server = socket.create_server(("127.0.0.1", int(addresses.rpartition(":")[2])))
        with server, pytest.raises(NoPeersError, match=r"model 1: something listens at"):
            meet(make(0, addresses, **SOON))

    def test_a_peer_that_cannot_hear_us_was_not_met(self, make):
        """Its hello comes, ours does not reach it: it ends, so to go on would be to train alone without a word."""
        addresses = addresses_for()
        elsewhere = addresses.split(",")[0] + f",127.0.0.1:{free_ports(1)[0]}"
        deaf, heard = make(0, elsewhere, **SOON, codistill_run_id="r"), make(1, addresses, **SOON, codistill_run_id="r")
        errors = meet_all(deaf, heard)
        assert isinstance(errors[0], NoPeersError)
        assert "connection refused" in str(errors[0])


class TestAtTheStart:
    def test_alone_on_request(self, make):
        alone = make(0, addresses_for(), codistill_start_timeout=0.1, codistill_require_peers="never")
        meet(alone)
        assert exchange(alone).predictions == {}

    def test_one_of_two_peers_is_enough(self, make):
        addresses = addresses_for(3)
        assert meet_all(*(make(model, addresses, **SOON) for model in (0, 2))) == [None, None]

    def test_a_peer_that_has_finished_is_nobody_to_wait_for_and_no_error(self, make):
        addresses = addresses_for()
        waiting, done = make(0, addresses), make(1, addresses)
        meeting = threading.Thread(target=meet, args=(waiting,))
        meeting.start()
        while not done._mailbox._transport.send(0, b"", b""):  # connected
            done.poll()
        done.close("finished")
        meeting.join()
        assert waiting.peers[1].is_done

    @pytest.mark.parametrize("was_there", [True, False])
    def test_who_goes_on_from_a_checkpoint_may_miss_a_peer_that_was_stopped_but_not_one_that_failed(
        self, make, was_there
    ):
        addresses = addresses_for()
        waiting, other, outcome = make(0, addresses), make(1, addresses), []

        def go_on():
            try:
                waiting.meet(Identity({}, {}, "0", 0), DataOrder(100), elapsed=50)
            except NoPeersError as error:
                outcome.append(error)

        meeting = threading.Thread(target=go_on)
        meeting.start()
        while not other._mailbox._transport.send(0, b"", b""):  # connected
            other.poll()
        if was_there:
            other.close("stopped by SIGTERM")
        else:
            announce_death(addresses, 2, 1, 1, "", None, "it ended with exit code 1")
        meeting.join()
        assert bool(outcome) is not was_there
        assert waiting.peers[1].state is PeerState.FINISHED

    def test_alpha_above_0_on_one_side_only_is_refused_by_name(self, make):
        addresses = addresses_for()
        for error in meet_all(*(make(model, addresses, codistill_weight=float(model)) for model in (0, 1))):
            assert isinstance(error, ConfigError)
            assert "--codistill-weight above 0: " in str(error)

    def test_alpha_0_everywhere_meets_and_exchanges_nothing(self, make, caplog):
        addresses = addresses_for()
        pair = [make(model, addresses, codistill_weight=0.0) for model in (0, 1)]
        with caplog.at_level(logging.WARNING):
            assert meet_all(*pair) == [None, None]
        assert caplog.text.count("nothing will be exchanged or distilled") == 2
        assert not pair[0].is_due(0)
        assert pair[0].num_behind(0, within_reach=False) == 0

    def test_what_will_hardly_be_exchanged_is_told_once(self, make, caplog):
        pair = [make(model, addresses, codistill_interval=50) for addresses in [addresses_for()] for model in (0, 1)]
        threads = [threading.Thread(target=meet, args=(one,), kwargs={"num_updates": 20}) for one in pair]
        with caplog.at_level(logging.WARNING):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert caplog.text.count("--codistill-interval is 50, and the run has 20 updates: one exchange") == 2

    def test_a_codec_that_sends_everything_is_told_once(self, make, caplog):
        alone = make(0, addresses_for(), codistill_codec="columns:3", codistill_require_peers="never", **SOON)
        meet(alone)
        with caplog.at_level(logging.WARNING):
            for position in range(3):
                exchange(alone, position)
        assert caplog.text.count("--codistill-codec is 'columns:3', and there are 3 classes") == 1


class TestWhileTraining:
    @pytest.mark.parametrize(("requirement", "raises"), [("always", True), ("start", False)])
    def test_a_run_that_always_needs_a_peer_ends_when_the_last_one_is_lost(self, make, requirement, raises):
        addresses = addresses_for()
        pair = [make(model, addresses, codistill_require_peers=requirement) for model in (0, 1)]
        assert meet_all(*pair) == [None, None]
        pair[0].config.codistill_timeout = 0.2
        expected = pytest.raises(NoPeersError, match=r"no model is left.*model 1: away, nothing for epoch 1 position 0")
        with expected if raises else contextlib.nullcontext():
            exchange(pair[0])

    def test_a_peer_that_has_finished_leaves_nobody_in_want(self, make):
        addresses = addresses_for()
        pair = [make(model, addresses, codistill_require_peers="always") for model in (0, 1)]
        meet_all(*pair)
        pair[1].close("finished")
        until_finished(pair[0], 1)
        pair[0].config.codistill_timeout = 0.0
        assert exchange(pair[0]).predictions == {}

    def test_one_that_left_early_is_missed_once_its_time_to_come_back_is_over(self, make):
        addresses = addresses_for()
        pair = [make(model, addresses, codistill_require_peers="always") for model in (0, 1)]
        meet_all(*pair)
        pair[1].close("SIGTERM")
        until_finished(pair[0], 1)
        assert exchange(pair[0]).predictions == {}  # it may be started again
        pair[0].config.codistill_timeout = 0.0
        with pytest.raises(NoPeersError, match="model 1: finished, it said goodbye: SIGTERM"):
            exchange(pair[0], 1)

    def test_a_peer_that_was_restarted_and_exchanges_nothing_yet_is_there(self, make):
        addresses = addresses_for()
        more = {"codistill_timeout": 1.0, "codistill_burn_in": 10**6}  # only one of them requires the other
        first, second = make(0, addresses, codistill_require_peers="always", **more), make(1, addresses, **more)
        assert meet_all(first, second) == [None, None]
        second._mailbox._transport.close(0)  # killed, and started again
        second._is_closed = True
        again = make(1, addresses, **more)
        thread = threading.Thread(target=meet, args=(again,))
        thread.start()
        until = time.monotonic() + 3.0  # three timeouts, in which both train on
        while time.monotonic() < until or thread.is_alive():
            first.poll(1)
            if not thread.is_alive():
                again.poll(1)
            time.sleep(0.02)
        assert first.peers[1].state is PeerState.AWAY  # nothing was exchanged
        with pytest.raises(NoPeersError):  # and one that shows no sign is missed
            poll_for(first, 20.0)

    @pytest.mark.parametrize(
        ("more", "silent_s"),
        [
            ({"codistill_burn_in": 10**6, "codistill_timeout": 0.5}, 1),
            ({"codistill_exchange": "checkpoints", "codistill_timeout": 0.2}, 2),  # one may be on a slow line
        ],
    )
    def test_one_that_dies_without_a_word_is_missed_though_nobody_waits_for_it(self, make, more, silent_s):
        addresses = addresses_for()
        more = {**more, "codistill_require_peers": "always"}
        pair = [make(model, addresses, **more) for model in (0, 1)]
        assert meet_all(*pair) == [None, None]
        until = time.monotonic() + 3.0
        while time.monotonic() < until:  # in which nothing is exchanged
            for one in pair:
                one.poll(1)
            time.sleep(0.02)
        pair[1]._mailbox._transport.close(0)
        pair[1]._is_closed = True
        began = time.monotonic()
        with pytest.raises(NoPeersError, match=f"model 1: present, first contact, nothing heard for {silent_s} s"):
            poll_for(pair[0], 20.0)
        assert 0.8 * silent_s < time.monotonic() - began < 5.0

    def test_the_others_are_not_blamed_for_the_time_that_this_rank_was_away_itself(self, make):
        addresses = addresses_for()
        more = {"codistill_burn_in": 10**6, "codistill_timeout": 0.5, "codistill_require_peers": "always"}
        pair = [make(model, addresses, **more) for model in (0, 1)]
        assert meet_all(*pair) == [None, None]
        for one in pair:
            one.poll(1)
        time.sleep(1.5)  # both validate
        pair[0].poll(1)
        time.sleep(0.2)  # the other a little longer
        pair[0].poll(1)
        pair[1].poll(1)
        poll_for(pair[0], 0.3)

    def test_nothing_is_raised_in_a_step_after_an_interrupt(self, make):
        addresses = addresses_for()
        pair = [make(model, addresses, codistill_require_peers="always") for model in (0, 1)]
        meet_all(*pair)
        pair[1].close("SIGTERM")
        until_finished(pair[0], 1)
        pair[0].config.codistill_timeout = 0.0
        pair[0].interrupt("SIGTERM")
        assert exchange(pair[0]).predictions == {}


class TestSummary:
    def test_counts_what_was_exchanged_and_who_was_lost_and_found(self, make, caplog):
        addresses = addresses_for()
        pair = [make(model, addresses, codistill_interval=2) for model in (0, 1)]
        meet_all(*pair)
        ours, theirs = pair
        for position in range(10):
            if position % 2:
                ours.poll(position)
                continue
            if position != 4:
                theirs.post(BatchKey(1, position), bytes(16), torch.zeros(2, 3))
            ours.config.codistill_timeout = 0.1 if position == 4 else 20.0
            if position == 6:
                while ours.peers[1].state is not PeerState.PRESENT:
                    ours.poll()
            exchange(ours, position)
            exchange(ours, position)  # fed again: no other batch
        expected = {
            "updates": 10, "exchanges": 5, "batches_due": 5, "batches_distilled": 4, "share_distilled": 0.8,
            "peers_met": [1], "peers_lost": 1, "peers_found": 1,
        }  # fmt: skip
        assert ours.summary() == expected
        with caplog.at_level(logging.INFO):
            ours.close()
        assert (
            "10 updates, 5 exchanges, distilled on 4 of 5 batches due; met models [1]; lost 1, found 1" in caplog.text
        )

    def test_who_joins_late_counts_the_updates_it_made_and_not_those_before_it(self, make):
        alone = make(0, addresses_for(), codistill_require_peers="never", codistill_start_timeout=0.0)
        order = DataOrder(100)
        alone.meet(Identity({}, {}, "0", 0), order, elapsed=730)
        for elapsed in range(730, 735):
            alone.post(order.key(elapsed), bytes(16), torch.zeros(2, 3))
            alone.collect()
            alone.poll()  # in a validation
        assert alone.summary()["updates"] == 5

    def test_a_peer_that_finished_was_not_lost(self, make):
        pair = [make(model, addresses) for addresses in [addresses_for()] for model in (0, 1)]
        meet_all(*pair)
        pair[1].close("finished")
        until_finished(pair[0], 1)
        assert pair[0].summary()["peers_lost"] == 0
