"""The relay: a real process, real sockets on loopback. What it forwards, to whom, and what it never can."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
import zmq
from relaying import config, key_set, resident_bytes, running_relay, transport, until

pytest.importorskip("nacl")

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.herald import announce_death_through_relay
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.transports import relay_frames
from fairseq_codistill.coordinator.transports.curve_keys import load_keys, load_launcher_keys, make_keys
from fairseq_codistill.coordinator.transports.relay import RelayTransport, parse_relay
from fairseq_codistill.coordinator.transports.relay_keys import RUN_KEY, load_run_key, public_key
from fairseq_codistill.coordinator.transports.sealing import HEADER_OVERHEAD, PAYLOAD_OVERHEAD
from fairseq_codistill.coordinator.wire import LAUNCHER, Kind, Message, WireError, parse, run_id_from
from fairseq_codistill.relay.keyrings import Keyrings, Member

HEADER = b"header"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return key_set(tmp_path_factory.mktemp("run") / "keys", 3)


@pytest.fixture
def relay(tmp_path, keys):
    with running_relay(tmp_path, keys) as running:
        yield running


@pytest.fixture
def open_transport():
    opened = []

    def make(*args, **kwargs):
        opened.append(transport(*args, **kwargs))
        return opened[-1]

    yield make
    for one in opened:
        one.close(0)


def pass_over(sender, receiver, model, payload):
    until(lambda: sender.send(model, HEADER, payload))
    header, found = until(lambda: receiver.receive(1.0))
    assert bytes(header) == HEADER
    return bytes(found)


class TestForwarding:
    def test_a_message_for_all_leaves_once_and_comes_to_each(self, relay, keys, open_transport):
        ends = [open_transport(relay.address, keys, model, 3) for model in range(3)]
        for peer in (1, 2):
            pass_over(ends[0], ends[peer], peer, b"there")
        payload = os.urandom(100_000)
        sent = ends[0].send_to_all({1: b"to one", 2: b"to two"}, payload)
        sealed_header = len(b"to one") + HEADER_OVERHEAD
        assert sent == {1: sealed_header + len(payload) + PAYLOAD_OVERHEAD, 2: sealed_header}
        for peer, header in ((1, b"to one"), (2, b"to two")):
            assert until(lambda peer=peer: ends[peer].receive(1.0)) == (header, payload)
            assert ends[peer].sender == 0

    def test_ranks_meet_those_of_their_own_number_only(self, relay, keys, open_transport):
        zero = open_transport(relay.address, keys, 0, rank=0)
        other_rank = open_transport(relay.address, keys, 1, rank=1)
        relay.wait_for("model 1 rank 1")
        relay.wait_for("model 0 rank 0")
        assert not zero.send(1, HEADER, b"x")
        same_rank = open_transport(relay.address, keys, 1, rank=0)
        assert pass_over(zero, same_rank, 1, b"for rank 0") == b"for rank 0"
        assert other_rank.receive(0.1) is None

    def test_hundreds_of_exchanges_lose_nothing(self, relay, keys):
        def predictions(model, position):
            return torch.full((2, 3), float(1000 * model + position))

        def job(model, outcomes):
            coordinator = Coordinator(config(relay.address, keys, model))
            coordinator.meet(Identity(settings={}, remarks={}, parameters_digest=str(model), seed=model))
            for position in range(200):
                coordinator.post(BatchKey(1, position), bytes(16), predictions(model, position))
                found = coordinator.collect().predictions
                assert torch.equal(found[1 - model], predictions(1 - model, position))
            coordinator.close()
            outcomes[model] = coordinator.meter

        outcomes = {}
        threads = [threading.Thread(target=job, args=(model, outcomes), daemon=True) for model in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert {model: meter.delivered_messages for model, meter in outcomes.items()} == {0: 200, 1: 200}
        assert all(meter.lost_messages == meter.rejected_messages == 0 for meter in outcomes.values())


class TestBrokenConnections:
    def test_a_relay_that_is_killed_and_started_again_loses_and_repeats_nothing(self, relay, keys, open_transport):
        ends = [open_transport(relay.address, keys, model) for model in range(2)]
        pass_over(ends[0], ends[1], 1, b"there")
        assert ends[0].send(1, HEADER, b"before")
        relay.kill()
        assert ends[0].send(1, HEADER, b"while it is down")
        relay.start()
        came = [bytes(until(lambda: ends[1].receive(1.0))[1]) for _ in range(2)]
        assert came == [b"before", b"while it is down"]
        assert pass_over(ends[1], ends[0], 0, b"and back") == b"and back"
        assert ends[1].receive(0.2) is None

    def test_what_is_sent_late_in_a_long_outage_arrives_after_it(self, relay, keys, open_transport, monkeypatch):
        monkeypatch.setattr("fairseq_codistill.coordinator.transports.relay.LIMBO_S", 0.3)
        ends = [open_transport(relay.address, keys, model) for model in range(2)]
        pass_over(ends[0], ends[1], 1, b"there")
        relay.kill()
        until(lambda: not ends[0]._line.is_joined)
        time.sleep(1.0)
        assert ends[0].send(1, HEADER, b"late in the outage")
        relay.start()
        assert bytes(until(lambda: ends[1].receive(1.0))[1]) == b"late in the outage"
        ends[1].close(0)
        until(lambda: not ends[0].send(1, HEADER, b"to one that is gone, by a relay that is there"))

    def test_a_new_process_is_not_sent_what_was_for_the_old_one(self, relay, keys, open_transport):
        zero, one = (open_transport(relay.address, keys, model) for model in range(2))
        pass_over(zero, one, 1, b"there")
        one.close(0)
        until(lambda: zero.send(1, HEADER, b"for the old one") and 1 not in zero._standing)
        again = open_transport(relay.address, keys, 1)
        until(lambda: 1 in zero._standing)
        assert pass_over(zero, again, 1, b"for the new one") == b"for the new one"
        assert again.receive(0.2) is None

    def test_of_two_processes_of_one_place_the_first_is_told_and_gives_way(self, relay, keys, open_transport):
        first = open_transport(relay.address, keys, 0)
        relay.wait_for("model 0 rank 0")
        second = open_transport(relay.address, keys, 0)
        lost = until(first.lost_peers)
        assert "two jobs of one --codistill-model-index" in lost[1]
        one = open_transport(relay.address, keys, 1)
        assert pass_over(one, second, 0, b"for the second") == b"for the second"


class TestSlowReaders:
    def test_one_that_does_not_read_costs_only_itself_and_bounded_memory(self, tmp_path, keys, open_transport):
        with running_relay(tmp_path, keys, options=("--memory-mb", "64")) as relay:
            zero, one = (open_transport(relay.address, keys, model, 3) for model in range(2))
            pass_over(zero, one, 1, b"there")
            before = resident_bytes(relay.process.pid)
            with silent_guest(relay, keys, 2):
                until(lambda: 2 in zero._standing)
                payload, num_for_silent = os.urandom(2**20), 0
                for _ in range(200):
                    sent = until(lambda: zero.send_to_all({1: HEADER, 2: HEADER}, payload))
                    num_for_silent += 2 in sent
                    assert 1 in sent
                    assert until(lambda: one.receive(1.0))[1] == payload
                assert 0 < num_for_silent < 100
                assert not zero._standing[2].has_room
                assert resident_bytes(relay.process.pid) - before < 128 * 2**20


@contextlib.contextmanager
def silent_guest(relay, keys, model):
    """A model that joins and reads nothing."""
    found = load_keys(str(keys), model, 3)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.curve_publickey, socket.curve_secretkey = found.public[model], found.secret
    socket.curve_serverkey = public_key(os.path.join(keys, "relay.key"))
    socket.set_hwm(1)
    socket.connect(f"tcp://{relay.address}")
    socket.send_multipart(relay_frames.join(0, b"silent!!"))
    yield socket
    context.destroy(linger=0)


class TestWhoIsLetIn:
    def test_runs_that_share_a_relay_do_not_see_each_other(self, tmp_path, keys, open_transport):
        other = key_set(tmp_path / "other", 2, os.path.join(keys, "relay.key"))
        with running_relay(tmp_path, keys, other) as relay:
            ends = {
                (run, model): open_transport(relay.address, run, model) for run in (keys, other) for model in (0, 1)
            }
            for run in (keys, other):
                assert pass_over(ends[run, 0], ends[run, 1], 1, str(run).encode()) == str(run).encode()
            assert all(end.receive(0.1) is None for end in ends.values())

    def test_a_run_can_be_added_while_others_go_on(self, tmp_path, keys, open_transport):
        folder = tmp_path / "runs"
        folder.mkdir()
        (folder / "first").symlink_to(keys)
        with running_relay(tmp_path, folder) as relay:
            key_set(folder / "second", 2, os.path.join(keys, "relay.key"))
            ends = [open_transport(relay.address, folder / "second", model) for model in range(2)]
            assert pass_over(ends[0], ends[1], 1, b"new") == b"new"

    def test_another_key_set_is_refused_and_the_reason_found(self, tmp_path, relay, keys, open_transport):
        stranger = key_set(tmp_path / "stranger", 2, os.path.join(keys, "relay.key"))
        zero = open_transport(relay.address, stranger, 0)
        until(lambda: "the relay has not the keys of this run" in zero.describe(1))
        relay.wait_for("refused a connection")
        assert not zero.send(1, HEADER, b"x")

    def test_what_is_wrong_on_the_way_is_said(self, relay, keys, open_transport):
        zero = open_transport(relay.address, keys, 0)
        until(lambda: "where that model is not" in zero.describe(1))
        relay.kill()
        until(lambda: "was lost; nobody listens" in zero.describe(1))
        nowhere = open_transport(relay.address, keys, 1)
        assert "nobody listens" in nowhere.describe(0)

    def test_who_sends_nonsense_harms_nobody(self, relay, keys, open_transport):
        ends = [open_transport(relay.address, keys, model, 3) for model in range(2)]
        pass_over(ends[0], ends[1], 1, b"there")
        with silent_guest(relay, keys, 2) as guest:
            for frames in ([b""], [b"D"], [b"D\0"], [b"D\1\0", b"x"], [b"?"], [b"D\1\0\1\0", b"", b"", b""], [b"J"]):
                guest.send_multipart(frames)
            guest.send_multipart([*relay_frames.upload({1: b"not sealed"}, b"neither")])
            with pytest.raises(WireError, match="not sealed with this run's key"):
                until(lambda: ends[1].receive(1.0))
        assert pass_over(ends[0], ends[1], 1, b"fine") == b"fine"

    def test_the_launcher_can_say_that_a_model_has_died(self, relay, keys, open_transport):
        zero = open_transport(relay.address, keys, 0, 3)
        told = announce_death_through_relay(relay.address, 3, 1, 2, "", str(keys), "exit code 3", timeout_s=3.0)
        assert told == 1
        message = parse(*until(lambda: zero.receive(1.0)))
        assert (message.kind, message.model, zero.sender) == (Kind.GOODBYE, LAUNCHER, LAUNCHER)
        assert message.run_id == run_id_from("relay")

    def test_the_launcher_can_speak_of_several_deaths_at_a_time(self, relay, keys, open_transport, caplog):
        is_over = threading.Event()

        def announce(model):
            announce_death_through_relay(relay.address, 3, 1, model, "", str(keys), "gone", 300.0, is_over.is_set)

        threads = [threading.Thread(target=announce, args=(model,), daemon=True) for model in (1, 2)]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda number=number: relay.said().count("the launcher rank 0") == number)
        zero = open_transport(relay.address, keys, 0, 3)
        notices = [json.loads(bytes(until(lambda: zero.receive(1.0))[1])) for _ in threads]
        assert {notice["model"] for notice in notices} == {1, 2}
        assert "another process has joined" not in caplog.text
        is_over.set()
        for thread in threads:
            thread.join()


class TestKeys:
    def test_a_relay_knows_whose_keys_are_whose_without_any_private_key_of_a_model(self, tmp_path, keys):
        host = tmp_path / "host"
        host.mkdir()
        for name in os.listdir(keys):
            if name.endswith(".key") or name == "relay.key_secret":
                (host / name).write_bytes((keys / name).read_bytes())
        (host / "relay.key_secret").chmod(0o600)
        found = Keyrings([str(host)])
        assert found.find(public_key(str(keys / "model-1.key")).decode()) == Member(str(host), 1)
        assert found.find(public_key(str(keys / "launcher.key")).decode()) == Member(str(host), LAUNCHER)
        assert found.find(public_key(str(keys / "relay.key")).decode()) is None

    def test_key_sets_of_two_relays_and_folders_without_one_are_refused(self, tmp_path, keys):
        other = key_set(tmp_path / "other")
        with pytest.raises(ConfigError, match="a relay has one key pair.*codistill-keys --relay"):
            Keyrings([str(keys), str(other)])
        (other / "relay.key_secret").unlink()
        with pytest.raises(ConfigError, match="is the key of another relay"):
            Keyrings([str(keys), str(other)])
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(ConfigError, match="no key set is there"):
            Keyrings([str(empty)])

    def test_a_key_set_that_cannot_be_used_keeps_no_other_run_away(self, tmp_path, keys, caplog):
        shutil.copytree(keys, tmp_path / "runs/first")
        (tmp_path / "runs/first/relay.key_secret").chmod(0o600)
        broken = key_set(tmp_path / "runs/broken")
        (broken / "relay.key").unlink()
        (broken / "relay.key_secret").unlink()
        found = Keyrings([str(tmp_path / "runs")])
        assert found.runs() == [str(tmp_path / "runs/first")]
        assert "runs/broken is left out" in caplog.text

        shutil.copytree(keys, tmp_path / "runs/a-copy")
        make_keys(str(tmp_path / "runs/third"), 2, str(keys / "relay.key"))
        found._read_at = -10.0
        assert found.find(public_key(str(tmp_path / "runs/third/model-0.key")).decode())
        own = public_key(str(keys / "model-0.key")).decode()
        assert found.find(own) == Member(str(tmp_path / "runs/first"), 0)
        assert "runs/a-copy is left out" in caplog.text
        assert caplog.text.count("is left out") == 2

    def test_a_misspelt_relay_leaves_nothing_behind(self, tmp_path, keys):
        with pytest.raises(ConfigError, match=r"cannot read the public key .*realy\.key"):
            make_keys(str(tmp_path / "more"), 2, str(keys / "realy.key"))
        make_keys(str(tmp_path / "more"), 2, str(keys / "relay.key"))

    def test_the_key_of_the_run_is_private_and_its_absence_named(self, tmp_path):
        folder = key_set(tmp_path / "keys")
        assert (folder / RUN_KEY).stat().st_mode & 0o077 == 0
        assert len(load_run_key(str(folder))) == 32
        (folder / RUN_KEY).chmod(0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            load_run_key(str(folder))
        (folder / RUN_KEY).unlink()
        with pytest.raises(ConfigError, match=r"cannot read .*run.key_secret"):
            load_run_key(str(folder))

    def test_a_key_set_for_a_relay_that_is_there_has_its_public_key_only(self, tmp_path, keys):
        make_keys(str(tmp_path / "more"), 2, str(keys / "relay.key"))
        assert public_key(str(tmp_path / "more/relay.key")) == public_key(str(keys / "relay.key"))
        assert not (tmp_path / "more/relay.key_secret").exists()


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"codistill_addresses": "a:1,b:2"}, "--codistill-addresses 'a:1,b:2': through a relay nobody listens"),
            ({"codistill_bind": "eth0"}, "--codistill-bind 'eth0'"),
            ({"codistill_transport": "gloo"}, "--codistill-transport 'gloo'"),
            ({"codistill_keys": ""}, "--codistill-keys is ''; it must be a folder"),
            ({"codistill_keys": "none"}, "--codistill-keys is 'none'"),
        ],
    )
    def test_what_does_not_go_with_a_relay_is_refused(self, changes, message):
        values = {"codistill_num_models": 2, "codistill_relay": "host:29700", "codistill_keys": "keys", **changes}
        with pytest.raises(ConfigError, match=message):
            CodistillationConfig(**values).validate()

    @pytest.mark.parametrize("relay", ["host", "host:0", ":29700", "host:http", "host:70000"])
    def test_an_address_that_is_none_is_named(self, relay, keys):
        with pytest.raises(ConfigError, match=f"--codistill-relay is '{relay}'; it must be HOST:PORT"):
            transport(relay, keys, 0)

    @pytest.mark.parametrize("relay", ["tcp://relay:29700", "re lay:29700", "relé:29700", "relay", "relay:0"])
    def test_so_is_one_that_zeromq_would_choke_on(self, relay):
        with pytest.raises(ConfigError, match=f"--codistill-relay is '{relay}'; it must be HOST:PORT"):
            parse_relay(relay)

    def test_blanks_around_it_are_no_part_of_it(self):
        assert parse_relay(" relay.lan:29700\n") == ("relay.lan", 29700)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--port", "0"], "--port is 0"),
            (["--port", "29700", "--memory-mb", "0"], "--memory-mb is 0"),
            (["--port", "29700", "--keys", "nowhere"], "--keys nowhere"),
        ],
    )
    def test_the_command_refuses_what_cannot_work(self, tmp_path, options, message):
        ended = subprocess.run(
            [sys.executable, "-m", "fairseq_codistill.relay.command", "--keys", str(tmp_path), *options],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert ended.returncode == 2
        assert message in ended.stderr


def test_a_message_of_the_launcher_is_its_only_right(relay, keys, open_transport):
    """What comes over its connection in a model's name is refused, as over a direct one."""
    coordinator = Coordinator(config(relay.address, keys, 0))
    forged = Message(Kind.PREDICTIONS, 1, 0, run_id_from("relay"), b"x", BatchKey(1, 0))
    launcher = RelayTransport(
        parse_relay(relay.address), LAUNCHER, [0, 1], 0, load_launcher_keys(str(keys), 2),
        public_key(str(keys / "relay.key")), load_run_key(str(keys)),
    )  # fmt: skip
    until(lambda: launcher.send(0, forged.header(), forged.payload))
    until(lambda: coordinator.poll() or coordinator.meter.rejected_messages == 1)
    launcher.close(0)
    coordinator.close()
