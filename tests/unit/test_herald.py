"""Goodbye on behalf of the dead: who may say it, what it does to whoever waits, and how a restart undoes it."""

import json
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import environment, free_ports
from test_attendance import exchange, make, meet, meet_all  # noqa: F401 - make is a fixture
from test_zmq_transport import until

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.coordinator import NoPeersError
from fairseq_codistill.coordinator.herald import announce_death
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.mailbox import Mailbox
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import PROCESS_ENDED, SAID, Peer, PeerState
from fairseq_codistill.coordinator.transports.curve_keys import KeySet, load_keys, load_launcher_keys, make_keys
from fairseq_codistill.coordinator.transports.zeromq import ZeroMqTransport
from fairseq_codistill.coordinator.wire import LAUNCHER, Kind, Message

pytestmark = pytest.mark.timeout(60)  # all waits below are longer
RUN = b"the-run!"


@pytest.fixture(params=["keys", "loopback"])
def keys(request, tmp_path):
    """``--codistill-keys`` of three models, or none."""
    if request.param == "loopback":
        return ""
    make_keys(str(tmp_path / "keys"), 3)
    return str(tmp_path / "keys")


def addresses_for(num_models):
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))


def in_thread(function, *args):
    """Runs it; gives the thread, and a list that gets what it returned or raised."""
    outcome = []

    def run():
        try:
            outcome.append(function(*args))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def announce(addresses, model, keys, reason="killed by SIGKILL", **more):
    return announce_death(addresses, len(addresses.split(",")), 1, model, "", keys, reason, **more)


def vanish(coordinator):
    """As a killed process does: without a goodbye."""
    coordinator._mailbox._closed = True
    coordinator._mailbox._transport.close(0)


def test_survivors_that_wait_for_the_dead_go_on_and_take_it_back_after_its_restart(make, keys):  # noqa: F811
    addresses = addresses_for(3)
    settings = {"codistill_keys": keys, "codistill_timeout": 300.0}
    models = [make(model, addresses, **settings) for model in range(3)]
    assert meet_all(*models) == [None] * 3
    vanish(models[2])
    waits = [in_thread(exchange, model) for model in models[:2]]
    assert announce(addresses, 2, keys) == 2
    for number, (thread, outcome) in enumerate(waits):
        thread.join()
        assert set(outcome[0].predictions) == {1 - number}
        assert models[number].peers[2].state is PeerState.FINISHED
        assert "the launcher says that it has ended: killed by SIGKILL" in models[number].peers[2].reason
    again = make(2, addresses, **settings)
    thread, _ = in_thread(meet, again)
    while thread.is_alive():
        for model in models[:2]:
            model.poll()
    again.post(BatchKey(1, 1), bytes(16), torch.ones(2, 3))
    until(lambda: all(model.poll() or model.peers[2].newest for model in models[:2]))
    waits = [in_thread(exchange, model, 1) for model in models[:2]]
    for number, (thread, outcome) in enumerate(waits):
        thread.join()
        assert set(outcome[0].predictions) == {1 - number, 2}
        assert models[number].summary()["peers_found"] == 1


def test_a_model_that_dies_before_it_was_met_is_not_waited_for(make, keys):  # noqa: F811
    addresses = addresses_for(2)
    alone = make(0, addresses, codistill_keys=keys, codistill_start_timeout=300.0)
    thread, outcome = in_thread(meet, alone)
    assert announce(addresses, 1, keys, "exit code 2", timeout_s=20.0) == 1
    thread.join()
    assert isinstance(outcome[0], NoPeersError)
    assert "model 1: the launcher says that it has ended: exit code 2; nobody listens at" in str(outcome[0])


def test_a_model_that_dies_before_training_and_is_started_again_is_still_waited_for(make):  # noqa: F811
    addresses = addresses_for(2)
    waiting = make(0, addresses, codistill_start_timeout=300.0)
    thread, outcome = in_thread(meet, waiting)
    assert announce(addresses, 1, None, returns=True, timeout_s=20.0) == 1
    meet(make(1, addresses))
    thread.join()
    assert outcome == [None]
    assert waiting.peers[1].state is PeerState.PRESENT


def test_a_model_that_had_finished_when_another_was_restarted_is_no_reason_for_an_error(make):  # noqa: F811
    addresses = addresses_for(2)
    restarted = make(1, addresses, codistill_start_timeout=300.0)
    thread, outcome = in_thread(meet, restarted)
    assert announce(addresses, 0, None, "finished", timeout_s=20.0) == 1
    thread.join()
    assert outcome == [None]


def test_a_survivor_that_opens_its_port_late_is_told_then_unless_that_is_called_off(make, keys):  # noqa: F811
    addresses = addresses_for(3)
    early = make(0, addresses, codistill_keys=keys)
    telling, told = in_thread(lambda: announce(addresses, 2, keys, timeout_s=300.0))
    until(lambda: early.poll() or early.peers[2].state is PeerState.FINISHED)
    late = make(1, addresses, codistill_keys=keys)
    until(lambda: late.poll() or late.peers[2].state is PeerState.FINISHED)
    telling.join()
    assert told == [2]
    called_off = threading.Event()
    vanish(late)
    telling, told = in_thread(lambda: announce(addresses, 2, keys, timeout_s=300.0, stop=called_off.is_set))
    called_off.set()
    telling.join()
    assert told[0] <= 1


def test_every_rank_is_told_and_nobody_who_is_not_there_is_waited_for_long():
    first, second = free_ports(2, 2)
    addresses = f"127.0.0.1:{first},127.0.0.1:{second}"
    ranks = [ZeroMqTransport(("127.0.0.1", first + rank), {1: ("127.0.0.1", second + rank)}) for rank in range(2)]
    try:
        assert announce_death(addresses, 2, 2, 1, "", None, "gone", timeout_s=20.0) == 2
        for rank, transport in enumerate(ranks):
            header, payload = until(lambda transport=transport: transport.receive(1.0))
            assert header[10:12] == rank.to_bytes(2, "little")
            assert json.loads(bytes(payload)) == {"model": 1, "reason": "gone", "returns": False}
    finally:
        for transport in ranks:
            transport.close(0)
    assert announce_death(addresses, 2, 2, 1, "", None, "gone", timeout_s=0.2) == 0


class TestWhoMaySpeak:
    """A mailbox of model 0 with keys, and connections that are opened with one key or another."""

    @pytest.fixture
    def folder(self, tmp_path):
        make_keys(str(tmp_path / "keys"), 2)
        return str(tmp_path / "keys")

    @pytest.fixture
    def mailbox(self, folder):
        self.ports = free_ports(2)
        transport = ZeroMqTransport(
            ("127.0.0.1", self.ports[0]), {1: ("127.0.0.1", self.ports[1])}, model=0, keys=load_keys(folder, 0, 2)
        )
        yield Mailbox(transport, 0, 0, 2, RUN, TrafficMeter())
        transport.close(0)

    def send(self, mailbox, keys, message):
        """With the key pair of ``keys`` as if it were model 1's; returns once the message was taken in."""
        sender = ZeroMqTransport(
            ("127.0.0.1", self.ports[1]), {0: ("127.0.0.1", self.ports[0])}, model=1, keys=keys
        )  # fmt: skip
        before = mailbox._meter.received_messages
        try:
            until(lambda: sender.send(0, message.header(), message.payload))
            until(lambda: mailbox.poll() or mailbox._meter.received_messages > before)
        finally:
            sender.close(0)

    def as_launcher(self, folder):
        keys = load_launcher_keys(folder, 2)
        return KeySet({0: keys.public[0], 1: keys.launcher}, keys.secret)

    def notice(self, model=1, sender=LAUNCHER, kind=Kind.GOODBYE):
        return Message(kind, sender, 0, RUN, json.dumps({"model": model, "reason": "gone"}).encode())

    def test_the_launcher_may_say_that_a_model_has_ended(self, mailbox, folder):
        self.send(mailbox, self.as_launcher(folder), self.notice())
        assert mailbox.peers[1].state is PeerState.FINISHED
        assert mailbox._meter.rejected_messages == 0

    @pytest.mark.parametrize("kind", [Kind.HELLO, Kind.PREDICTIONS, Kind.CHECKPOINT, Kind.RECEIVED])
    @pytest.mark.parametrize("sender", [LAUNCHER, 1])
    def test_the_launcher_may_say_nothing_else(self, mailbox, folder, kind, sender):
        self.send(mailbox, self.as_launcher(folder), self.notice(sender=sender, kind=kind))
        assert mailbox._meter.rejected_messages == 1
        assert mailbox.peers[1].state is PeerState.EXPECTED

    @pytest.mark.parametrize("model", [0, 2, -1, None, "1", [1]])
    def test_a_notice_of_no_peer_is_refused(self, mailbox, folder, model):
        self.send(mailbox, self.as_launcher(folder), self.notice(model))
        assert mailbox._meter.rejected_messages == 1

    def test_a_model_may_not_speak_for_the_launcher(self, mailbox, folder):
        self.send(mailbox, load_keys(folder, 1, 2), self.notice())
        assert mailbox._meter.rejected_messages == 1
        assert mailbox.peers[1].state is PeerState.EXPECTED

    def test_without_keys_the_launcher_is_believed_on_loopback_only(self):
        (port,) = free_ports(1)
        for bind, is_heard in (("127.0.0.1", True), ("0.0.0.0", False)):
            transport = ZeroMqTransport(("127.0.0.1", port), {1: ("127.0.0.1", 1)}, bind_host=bind)
            assert transport.hears_launcher == is_heard
            transport.close(0)

    def test_without_keys_only_loopback_is_told(self):
        assert announce_death("192.0.2.1:29600,192.0.2.2:29600", 2, 1, 1, "", "none", "gone", timeout_s=300.0) == 0


def test_a_key_set_without_a_launcher_still_serves_the_models(tmp_path, caplog):
    folder = tmp_path / "keys"
    make_keys(str(folder), 2)
    for path in folder.glob("launcher.*"):
        path.unlink()
    assert load_keys(str(folder), 0, 2).launcher is None
    assert announce("127.0.0.1:1,127.0.0.1:2", 1, str(folder), timeout_s=300.0) == 0
    assert "launcher.key" in caplog.text


def test_addresses_that_are_none_are_an_error():
    with pytest.raises(ConfigError, match="3 models need 3"):
        announce_death("127.0.0.1:1,127.0.0.1:2", 3, 1, 1, "", None, "gone")


class TestOldNews:
    def test_a_notice_that_the_next_process_has_overtaken_is_not_about_it(self):
        peer = Peer(1)
        peer.on_hello({"incarnation": "a"})
        peer.on_hello({"incarnation": "b"})
        peer.on_notice("gone")
        assert peer.state is PeerState.AWAY
        peer.on_posted(BatchKey(1, 0), None)
        assert peer.state is PeerState.PRESENT
        peer.on_notice("gone again")
        assert peer.state is PeerState.FINISHED

    def test_what_the_dead_sent_before_does_not_bring_it_back(self):
        peer = Peer(1)
        peer.on_hello({"incarnation": "a"})
        peer.on_notice("gone")
        peer.on_posted(BatchKey(1, 0), None)
        assert peer.state is PeerState.FINISHED

    def test_what_a_model_said_of_its_end_itself_stands_whatever_its_exit_code(self):
        peer = Peer(1)
        peer.on_hello({"incarnation": "a"})
        peer.on_goodbye(f"{SAID}stopped by SIGTERM")
        peer.on_notice("the launcher says that it has ended: finished", is_done=True)
        assert not peer.is_done
        assert peer.was_stopped
        silent = Peer(1)  # a script that ends without a word of how: its exit code says
        silent.on_goodbye(f"{SAID}{PROCESS_ENDED}")
        silent.on_notice("the launcher says that it has ended: finished", is_done=True)
        assert silent.is_done
        other = Peer(2)
        other.on_notice("the launcher says that it has ended: finished", is_done=True)
        assert other.is_done


def test_a_launcher_that_announces_loads_no_torch():
    code = "import sys, fairseq_codistill.coordinator.herald; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_an_announcement_without_anybody_to_tell_takes_no_longer_than_it_may():
    started = time.monotonic()
    assert announce(addresses_for(3), 1, None, timeout_s=0.3) == 0
    assert time.monotonic() - started >= 0.3  # it did try
