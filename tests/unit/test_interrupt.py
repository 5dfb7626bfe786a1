"""A host that is asked to end does not sit out a wait: real sockets, a real signal, and 300 s to wait."""

import os
import signal
import threading

import pytest
import torch
from helpers import free_ports
from torch import nn

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.peers import PeerState
from fairseq_codistill.coordinator.replicas import Replicas

pytestmark = pytest.mark.timeout(60)  # far below the waits, far above what a loaded machine needs
LONG_S = 300.0


def make_coordinator(model, addresses, transport):
    return Coordinator(
        CodistillationConfig(
            codistill_num_models=2, codistill_model_index=model, codistill_addresses=addresses,
            codistill_transport=transport, codistill_codec="fp32", codistill_timeout=LONG_S,
            codistill_start_timeout=LONG_S, codistill_replica_wait=True,
        )
    )  # fmt: skip


def meet(coordinator):
    model = coordinator.config.codistill_model_index
    coordinator.meet(Identity({}, {}, str(model), model), DataOrder(10))


def collect(coordinator, position=0):
    coordinator.post(BatchKey(1, position), bytes(16), torch.zeros(2, 3))
    return coordinator.collect()


def wait_for_checkpoint(coordinator, position=0):
    replicas = Replicas(nn.Linear(2, 2))
    return coordinator.ask_replicas(BatchKey(1, position), replicas, lambda replica: replica(torch.zeros(1, 2)))


@pytest.fixture(params=["zmq", "gloo"])
def network(request):
    """Makes the coordinators of models 0 and 1; closes them at the end."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    opened = []

    def make(model):
        opened.append(make_coordinator(model, addresses, request.param))
        return opened[-1]

    yield make
    for coordinator in opened:
        coordinator.interrupt("the test is over")
        coordinator.close()


@pytest.fixture
def on_signal():
    """A host's handler: interrupts a coordinator. The signal comes from another thread, while the main one waits."""
    previous, timers = signal.getsignal(signal.SIGTERM), []

    def send_soon(coordinator):
        signal.signal(signal.SIGTERM, lambda *_: coordinator.interrupt("SIGTERM"))
        timers.append(threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)))
        timers[-1].start()

    yield send_soon
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGTERM, previous)


def met_pair(network):
    pair = [network(model) for model in (0, 1)]
    threads = [threading.Thread(target=meet, args=(one,)) for one in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return pair


@pytest.mark.parametrize("model", [0, 1])
def test_meeting_a_peer_that_never_comes(network, on_signal, model, caplog):
    alone = network(model)
    on_signal(alone)
    with caplog.at_level("INFO"):
        meet(alone)
    assert alone.interruption
    assert f"not waiting for models [{1 - model}]: SIGTERM" in caplog.text
    assert alone.peers[1 - model].state is PeerState.EXPECTED


@pytest.mark.parametrize("wait", [collect, wait_for_checkpoint])
def test_waiting_for_a_peer_that_says_nothing_more(network, on_signal, wait):
    waiting, silent = met_pair(network)
    on_signal(waiting)
    assert wait(waiting).predictions == {}
    for position in range(1, 4):  # nor are there later waits
        assert wait(waiting, position).predictions == {}
    assert waiting.interruption
    assert waiting.peers[1].state is PeerState.PRESENT  # not away: it was given no time
    assert not silent.interruption


def test_what_has_arrived_is_used_after_an_interrupt(network):
    waiting, peer = met_pair(network)
    peer.post(BatchKey(1, 0), bytes(16), torch.ones(2, 3))
    while waiting.peers[1].newest is None:
        waiting.poll()
    waiting.interrupt("enough")
    assert torch.equal(collect(waiting).predictions[1], torch.ones(2, 3))


def test_who_was_interrupted_says_goodbye(network):
    leaving, staying = met_pair(network)
    leaving.interrupt("SIGTERM")
    leaving.close("interrupted")
    assert collect(staying).predictions == {}
    assert staying.peers[0].state is PeerState.FINISHED


def test_the_first_reason_is_the_one_that_is_told(network, caplog):
    alone = network(0)
    alone.interrupt("SIGTERM")
    alone.interrupt("SIGINT")
    with caplog.at_level("INFO"):
        meet(alone)
    assert "not waiting for models [1]: SIGTERM" in caplog.text
