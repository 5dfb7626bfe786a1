"""What a relay does not take, and what others at its address cost: a real process, real sockets on loopback."""

import contextlib
import logging
import tracemalloc
import types

import pytest
import torch
import zmq
from coordinating import run_models
from helpers import free_ports
from relaying import Relay, config, key_set, resident_bytes, running_relay, until
from test_curve_keys import web_server
from test_relay import HEADER, keys, open_transport, pass_over, silent_guest  # noqa: F401 - fixtures

pytest.importorskip("nacl")

from fairseq_codistill import Codistiller
from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.herald import announce_death_through_relay
from fairseq_codistill.coordinator.transports import relay_frames
from fairseq_codistill.coordinator.transports.choice import make_transport
from fairseq_codistill.coordinator.wire import WireError
from fairseq_codistill.relay import server
from fairseq_codistill.relay.keyrings import Member
from fairseq_codistill.relay.lobby import Guest, Lobby


class TestLargeMessages:
    def test_one_that_the_relay_does_not_take_is_not_sent(self, tmp_path, keys, open_transport, caplog):  # noqa: F811
        with running_relay(tmp_path, keys, options=("--max-message-mb", "1")) as relay:
            zero, one = (open_transport(relay.address, keys, model) for model in range(2))
            pass_over(zero, one, 1, b"there")
            for _ in range(3):
                assert not zero.send(1, HEADER, bytes(2 * 2**20))
                pass_over(zero, one, 1, bytes(2**20 - 40))
            assert zero._line.num_joins == 1
        (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert "2.0 MiB" in said
        assert "codistill-relay --max-message-mb" in said

    def test_nor_is_one_that_is_more_than_a_share_of_its_memory(self, tmp_path, keys, open_transport, caplog):  # noqa: F811
        with running_relay(tmp_path, keys, options=("--memory-mb", "4")) as relay:
            zero, one = (open_transport(relay.address, keys, model) for model in range(2))
            pass_over(zero, one, 1, b"there")
            assert not zero.send(1, HEADER, bytes(2**20))
            pass_over(zero, one, 1, bytes(2**20 - 2**11))
            assert "dropped" not in relay.said()
        (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert "codistill-relay --max-message-mb and --memory-mb" in said

    def test_checkpoints_that_it_never_takes_are_an_error_and_not_a_slow_link(self, tmp_path, keys, caplog):  # noqa: F811
        def train(index):
            settings = {"num_models": 2, "model_index": index, "relay": relay.address, "keys": str(keys)}
            model = torch.nn.Linear(1000, 700)
            torch.nn.init.constant_(model.bias, index)
            with Codistiller(exchange="checkpoints", interval=1, timeout=5, **settings) as peers:
                peers.meet(model, 10)
                inputs, targets = torch.ones(4, 1000), torch.zeros(4).long()
                for first in range(0, 12, 4):
                    peers.loss(model(inputs), targets, ids=range(first, first + 4), forward=lambda copy: copy(inputs))

        with running_relay(tmp_path, keys, options=("--memory-mb", "4")) as relay:
            outcomes = run_models([lambda index=index: train(index) for index in (0, 1)])
        for outcome in outcomes:
            assert isinstance(outcome, ConfigError)
            assert "a checkpoint has" in str(outcome)
            assert "codistill-relay --max-message-mb and --memory-mb" in str(outcome)
        assert "link is too slow" not in caplog.text

    @pytest.mark.parametrize("parts", [1, 2, 4])
    def test_what_all_peers_send_at_once_has_room(self, tmp_path, keys, open_transport, parts):  # noqa: F811
        keys = key_set(tmp_path / "four", 4)
        with running_relay(tmp_path, keys, options=("--memory-mb", "24")) as relay:  # 6 MiB for each, 2 for each of 3
            models = [open_transport(relay.address, keys, model, 4) for model in range(4)]
            until(lambda: all(len(model._standing) == 3 for model in models))
            assert not models[0].send(1, HEADER, bytes(2 * 2**20))
            payload = bytes((2 * 2**20 - 2**12) // parts)
            for _ in range(3):
                for number, model in enumerate(models):
                    peers = [peer for peer in range(4) if peer != number]
                    for _ in range(parts):
                        assert len(model.send_to_all(dict.fromkeys(peers, HEADER), payload)) == 3
                for model in models:
                    assert [model.receive(30.0) is not None for _ in range(3 * parts)] == [True] * 3 * parts
            assert "dropped" not in relay.said()

    def test_a_guest_that_names_more_senders_than_there_is_room_for_ends_nobody(self, tmp_path, keys, open_transport):  # noqa: F811
        with running_relay(tmp_path, keys, options=("--memory-mb", "1")) as relay:
            zero, one = (open_transport(relay.address, keys, model, 3) for model in range(2))
            pass_over(zero, one, 1, b"there")
            with silent_guest(relay, keys, 2) as guest:
                guest.send_multipart(relay_frames.join(0, b"silent!!", 2**16 - 1))
                until(lambda: relay.said().count("model 2 rank 0") > 1)
                pass_over(zero, one, 1, b"still there")

    def test_where_one_peer_sends_at_a_time_its_message_may_fill_the_share(self):
        lobby = Lobby(80 * 2**20)
        guests = [Guest(bytes([n]), Member("run", n), 0, bytes(8), num_senders=1) for n in range(8)]
        for guest in guests:
            lobby.enter(guest)
        assert lobby.message_bytes(guests[0]) == lobby.share_bytes() == 10 * 2**20
        waiting = types.SimpleNamespace(done=False)
        assert lobby.fits(guests[0], 6 * 2**20, 1)
        guests[0].note(waiting, 6 * 2**20, 1)
        assert not lobby.is_short_of_room(guests[0], 2)
        assert not lobby.fits(guests[0], 6 * 2**20, 2)
        guests[0].full_for.add(2)  # its message was dropped
        assert lobby.is_short_of_room(guests[0], 2)
        waiting.done = True
        assert not lobby.is_short_of_room(guests[0], 2)

    def test_a_part_that_became_smaller_than_the_largest_message_lets_smaller_ones_pass(self):
        lobby = Lobby(32 * 2**20)
        one, two = (Guest(bytes([n]), Member("run", n), 0, bytes(8), num_senders=1) for n in range(2))
        for guest in (one, two):
            lobby.enter(guest)
        waiting = types.SimpleNamespace(done=False)
        one.note(waiting, 6 * 2**20, 1)
        for number in range(14):
            lobby.enter(Guest(bytes([9, number]), Member(f"other {number}", 0), 0, bytes(8), num_senders=1))
        assert not lobby.fits(one, 6 * 2**20, 1)
        one.full_for.add(1)
        assert lobby.is_short_of_room(one, 1)
        waiting.done = True
        assert not lobby.is_short_of_room(one, 1)
        assert lobby.fits(one, 2**20, 1)

    def test_all_are_told_of_a_smaller_share_at_once_and_the_launcher_makes_none(self, tmp_path, keys, open_transport):  # noqa: F811
        runs = [keys, key_set(tmp_path / "four", 4, str(keys / "relay.key"))]
        with running_relay(tmp_path, *runs, options=("--memory-mb", "8")) as relay:
            zero, one = (open_transport(relay.address, keys, model) for model in range(2))
            pass_over(zero, one, 1, bytes(2**20))
            assert zero._limit_bytes > 1.9 * 2**20
            others = [open_transport(relay.address, runs[1], model, 4) for model in range(4)]
            until(lambda: zero._limit_bytes < 1.4 * 2**20, seconds=10)
            pass_over(zero, one, 1, bytes(2**20))
            until(lambda: len(others[0]._standing) == 3)
            before = others[0]._limit_bytes
            assert announce_death_through_relay(relay.address, 4, 1, 3, "", str(runs[1]), "killed") == 3
            assert until(lambda: others[0].receive(1.0))
            assert others[0]._limit_bytes == before

    def test_the_largest_that_the_models_take_arrives(self, tmp_path, keys):  # noqa: F811
        with running_relay(tmp_path, keys) as relay:
            settings = [config(relay.address, keys, model, codistill_max_message_mb=1) for model in range(2)]
            zero, one = (make_transport(each, 0, 1) for each in settings)
            pass_over(zero, one, 1, bytes(2**20))
            assert one._line.num_joins == 1
            zero.close(0)
            one.close(0)

    def test_one_that_a_new_relay_does_not_take_is_given_up(self, tmp_path, keys, open_transport, caplog):  # noqa: F811
        with running_relay(tmp_path, keys) as relay:
            zero, one = (open_transport(relay.address, keys, model) for model in range(2))
            pass_over(zero, one, 1, bytes(2 * 2**20))
            relay.kill()
            relay.options = ("--max-message-mb", "1")
            relay.start()
            until(lambda: zero._line.num_joins == 2 and 1 in zero._standing)
            pass_over(zero, one, 1, b"small")
            assert (zero._line.num_joins, one._line.num_joins) == (2, 2)
        assert "codistill-relay --max-message-mb" in caplog.text


class TestGreedyGuests:
    @pytest.mark.parametrize("connections", ["one", "many"])
    def test_who_joins_again_and_again_has_one_share(self, tmp_path, keys, open_transport, connections):  # noqa: F811
        with running_relay(tmp_path, keys, options=("--memory-mb", "64")) as relay, contextlib.ExitStack() as opened:
            zero, one = (open_transport(relay.address, keys, model, 3) for model in range(2))
            pass_over(zero, one, 1, b"there")
            before = resident_bytes(relay.process.pid)
            guest = opened.enter_context(silent_guest(relay, keys, 2))
            for number in range(40):
                payload = bytes(2**20)
                for _ in range(8):
                    zero.send(2, HEADER, payload)
                    pass_over(zero, one, 1, payload)
                if connections == "one":
                    guest.send_multipart(relay_frames.join(0, b"silent!!"))
                else:
                    opened.enter_context(silent_guest(relay, keys, 2))
                until(lambda number=number: relay.said().count("model 2 rank 0") > number + 1)
            assert resident_bytes(relay.process.pid) - before < 128 * 2**20
            pass_over(zero, one, 1, b"fine")

    def test_a_message_for_more_models_than_there_can_be_takes_no_memory(self):
        frame = relay_frames.DATA + bytes(range(256)) * 2**12
        tracemalloc.start()
        with pytest.raises(WireError, match="more than 1024 models"):
            relay_frames.read_targets(frame, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**16
        tracemalloc.stop()


def test_a_web_server_where_the_relay_will_be_keeps_nobody_from_it(tmp_path, keys, open_transport):  # noqa: F811
    relay = Relay(free_ports(1)[0], [keys], tmp_path / "relay.log")
    with web_server(relay.port) as has_answered:
        zero = open_transport(relay.address, keys, 0)
        until(has_answered.is_set)
    relay.start()
    try:
        pass_over(zero, open_transport(relay.address, keys, 1), 1, b"here at last")
    finally:
        relay.kill()


def test_guests_that_left_take_no_room_from_the_others():
    """Nobody sends to the last model of a run, so nothing else finds out that it is gone."""

    class Router:
        def __init__(self):
            self.gone, self.told = set(), []

        def send_multipart(self, frames, flags):
            if frames[0] in self.gone:
                raise zmq.ZMQError(zmq.EHOSTUNREACH)
            self.told.append(frames[0])

    relay = server.Relay.__new__(server.Relay)
    relay._lobby, relay._router, relay._max_message_bytes = Lobby(100 * 2**20), Router(), 2**20
    for number in range(8):
        relay._lobby.enter(Guest(bytes([number]), Member(f"run {number // 2}", number % 2), 0, bytes(16)))
    relay._router.gone = {bytes([number]) for number in range(6)}
    relay.look_around()
    assert set(relay._lobby.by_identity) == {bytes([6]), bytes([7])}
    assert relay._lobby.share_bytes() == 25 * 2**20
