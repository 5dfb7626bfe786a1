"""Copies of the peers: what travels comes back, whole or not at all, and nothing of the own model is disturbed."""

import copy
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coordinating import addresses_for, config, identity, run_models
from coordinating import open_coordinators as open_coordinators  # an autouse fixture
from torch import nn

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.checkpoint_box import PATIENCE, CheckpointBox
from fairseq_codistill.coordinator.checkpoint_exchange import CheckpointExchange
from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import IN_ORDER, STOPPED, Peer, PeerState
from fairseq_codistill.coordinator.replicas import Layout, Replicas, tensors_of
from fairseq_codistill.coordinator.wire import Kind, Message


def model(seed, width=5):
    """With a shared parameter, BatchNorm (float and integer buffers), and dropout."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 4))
    net.add_module("tied", nn.Linear(4, width))
    net.tied.weight = net[0].weight
    net.register_buffer("constant", torch.ones(1000), persistent=False)
    net(torch.randn(8, 4)) if width == 4 else net[1](torch.randn(8, width))
    return net


def forward(net, batch):
    return net[3](net[2](net[1](net[0](batch))))


@pytest.mark.parametrize(("codec", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("fp16", 2**-11)])
def test_a_copy_predicts_as_the_peer_did_when_it_was_made(codec, tolerance):
    peer, mine, batch = model(1), model(2), torch.randn(6, 4)
    expected = copy.deepcopy(peer).eval()
    payload = Replicas(peer, codec).encode()
    with torch.no_grad():
        for tensor in tensors_of(peer).values():  # training goes on while the checkpoint is on its way
            tensor.mul_(3)
    replicas = Replicas(mine, codec, mode="eval")
    replicas.swap_in(7, payload, elapsed=40)
    [copied] = replicas._copies.values()
    for name, tensor in tensors_of(expected).items():
        assert torch.allclose(tensors_of(copied)[name], tensor, rtol=tolerance, atol=1e-6)
    assert copied.tied.weight is copied[0].weight
    found = replicas.predict(lambda net: forward(net, batch))
    assert found.keys() == {7}
    assert torch.allclose(found[7], forward(expected, batch), atol=20 * tolerance + 1e-6)
    assert not found[7].requires_grad
    assert replicas.staleness(45) == [5]


def test_what_is_shared_travels_once_constants_never_and_integers_keep_their_dtype():
    net = model(1)
    assert Layout(net, "fp32").num_bytes == 4 * (4 * 5 + 5 + 5 + 5 + 5 + 5 + 5 * 4 + 4 + 5) + 8
    found = Layout(net, "fp16").decode(Layout(net, "fp16").encode(net))
    assert found["1.num_batches_tracked"].dtype is torch.int64
    assert int(found["1.num_batches_tracked"]) == 1


def test_layouts_differ_where_names_shapes_or_dtypes_do():
    digests = {
        Layout(net, codec).digest for net in (model(1), model(1, 4), nn.Linear(4, 5)) for codec in ("fp32", "fp16")
    }
    assert len(digests) == 6
    assert Layout(model(1), "fp32").digest == Layout(model(2), "fp32").digest


@pytest.mark.parametrize("damage", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b"", lambda p: b"\xff" * len(p)])
def test_a_checkpoint_that_does_not_fit_leaves_the_copy_as_it_was(damage):
    replicas = Replicas(model(1))
    replicas.swap_in(1, Replicas(model(2)).encode(), 3)
    before = {name: tensor.clone() for name, tensor in tensors_of(replicas._copies[1]).items()}
    with pytest.raises(CodecError):
        replicas.swap_in(1, damage(bytes(Replicas(model(3)).encode())), 9)
    assert replicas.elapsed == {1: 3}
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(replicas._copies[1]).items())


def test_a_value_that_fp16_cannot_hold_is_not_sent():
    net = model(1)
    net[1].running_var.fill_(1e6)
    with pytest.raises(CodecError, match=r"1.running_var .* --codistill-codec fp32 or bf16"):
        Replicas(net, "fp16").encode()
    Replicas(net, "bf16").encode()


@pytest.mark.parametrize(("mode", "uses_batch_statistics"), [("auto", True), ("train", True), ("eval", False)])
def test_copies_of_a_model_with_batch_normalisation_do_not_predict_from_statistics_that_lag(
    mode, uses_batch_statistics
):
    """In an early update the parameters are far ahead of the running statistics; eval has to be asked for."""
    torch.manual_seed(1)
    peer = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with torch.no_grad():
        peer[0].weight.mul_(100)
    batch = torch.randn(16, 4)
    with torch.no_grad():
        in_training = copy.deepcopy(peer)(batch)
    replicas = Replicas(copy.deepcopy(peer), mode=mode)
    replicas.swap_in(1, Replicas(peer).encode(), 0)
    predicted = replicas.predict(lambda net: net(batch))[1]
    assert torch.allclose(predicted, in_training, atol=1e-5) is uses_batch_statistics


@pytest.mark.parametrize("frozen", [(1,), (1, 4)])
def test_what_is_frozen_in_a_model_is_frozen_in_its_copies(frozen):
    torch.manual_seed(1)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.0), nn.Linear(8, 3), nn.BatchNorm1d(3)]
    net, batch = nn.Sequential(*layers), torch.randn(16, 4)
    replicas = Replicas(net)
    net.train()  # after the copies have a mode
    for index in frozen:
        net[index].eval()
    replicas.swap_in(1, Replicas(net).encode(), 0)
    with torch.no_grad():
        expected = copy.deepcopy(net)(batch)
    assert torch.allclose(replicas.predict(lambda copied: copied(batch))[1], expected, atol=1e-6)


def test_copies_of_other_models_predict_without_dropout():
    net, batch = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5)), torch.randn(6, 4)
    replicas = Replicas(net)
    replicas.swap_in(1, Replicas(net).encode(), 0)
    assert torch.equal(replicas.predict(lambda copied: copied(batch))[1], copy.deepcopy(net).eval()(batch))


def test_copies_that_mask_at_random_leave_the_numbers_of_the_job_alone():
    replicas = Replicas(model(1), mode="train")
    replicas.swap_in(1, Replicas(model(2)).encode(), 0)

    def forward_of_a_masking_model(net):
        return torch.full((1, 3), random.random() + np.random.random())  # noqa: NPY002

    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    replicas.predict(forward_of_a_masking_model)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


@pytest.mark.parametrize("in_train_mode", [False, True])
def test_asking_the_copies_disturbs_neither_random_numbers_nor_the_own_model(in_train_mode):
    mine, batch = model(1).train(), torch.randn(6, 4)
    before = {name: tensor.clone() for name, tensor in tensors_of(mine).items()}
    replicas = Replicas(mine, mode="train" if in_train_mode else "eval")
    replicas.swap_in(1, Replicas(model(2)).encode(), 0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = replicas.predict(lambda net: forward(net, batch))[1]
    assert torch.equal(torch.rand(3), expected)
    second = replicas.predict(lambda net: forward(net, batch))[1]
    assert torch.equal(first, second) is not in_train_mode  # dropout drew other units
    assert mine.training
    assert all(parameter.requires_grad for parameter in mine.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(mine).items())


def test_copies_survive_a_restart_and_those_of_another_architecture_are_left_out(caplog):
    replicas = Replicas(model(1))
    replicas.swap_in(1, Replicas(model(2)).encode(), 12)
    state = replicas.state_dict()
    restarted = Replicas(model(1))
    restarted.load_state_dict(state)
    batch = torch.randn(3, 4)
    before, after = (r.predict(lambda net: forward(net, batch))[1] for r in (replicas, restarted))
    assert torch.equal(before, after)
    assert restarted.elapsed == {1: 12}
    other = Replicas(model(1, 4))
    other.load_state_dict(state)
    assert other.elapsed == {}
    assert "does not fit" in caplog.text


def test_one_checkpoint_at_a_time_is_on_its_way_to_a_peer():
    box = CheckpointBox()
    assert box.may_send(1)
    box.on_sent(1)
    assert box.may_send(2)
    assert [box.may_send(1) for _ in range(PATIENCE)] == [False] * PATIENCE
    assert box.may_send(1)  # the confirmation must have been lost
    box.on_sent(1)
    assert not box.may_send(1)
    box.on_confirmed(1)
    assert box.may_send(1)


def test_the_newest_checkpoint_is_taken_once_and_not_before_its_time():
    box = CheckpointBox()
    first, second, third, fourth = (
        Message(Kind.CHECKPOINT, 1, 0, b"run-id-8", b"", BatchKey(1, p)) for p in (5, 10, 15, 20)
    )
    assert not box.put(first)
    assert not box.put(second)  # its model is one exchange ahead: the first one is still due
    assert box.take([2]) == {}
    assert box.take([1, 2], until=BatchKey(1, 4)) == {}
    assert box.take([1, 2], until=BatchKey(1, 9)) == {1: first}
    assert box.take([1, 2], until=BatchKey(1, 9)) == {}
    assert not box.put(third)
    assert box.put(fourth)
    assert box.take([1, 2], until=BatchKey(1, 10)) == {}
    assert box.take([1, 2]) == {1: fourth}
    assert box.take([1, 2]) == {}


def test_a_checkpoint_larger_than_a_message_may_be_is_refused_by_name():
    replicas = Replicas(model(1), "bf16")
    assert list(replicas.settings(max_message_mb=1)) == [
        "architecture (checkpoints need the same; --codistill-exchange predictions does not)"
    ]
    with pytest.raises(ConfigError, match="--codistill-max-message-mb is 1e-05, but a checkpoint .* MiB as bf16"):
        replicas.settings(max_message_mb=1e-5)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
def test_a_mask_of_minus_infinity_travels_and_damage_elsewhere_is_still_refused(codec):
    def masked(seed):
        torch.manual_seed(seed)
        net = nn.Linear(4, 4)
        net.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        return net

    replicas = Replicas(masked(1), codec)
    replicas.swap_in(1, Replicas(masked(2), codec).encode(), 3)
    assert torch.equal(replicas._copies[1].mask, masked(2).mask)
    broken = masked(2)
    with torch.no_grad():
        broken.weight[0, 0] = torch.inf
    with pytest.raises(CodecError, match="weight of the checkpoint is not finite"):
        replicas.swap_in(1, Replicas(broken, "fp32" if codec == "fp32" else codec).encode(), 4)


@pytest.mark.parametrize(
    ("reason", "is_kept"),
    [
        (IN_ORDER, True),
        ("failed: OSError", False),
        ("stopped by SIGTERM", True),
        ("stopped by a signal to another rank", True),
    ],
)
def test_the_copy_of_a_model_teaches_on_after_its_training_but_not_after_its_death(reason, is_kept, caplog):
    addresses, met = addresses_for(2), threading.Event()
    settings = {"codistill_exchange": "checkpoints"}

    def other():
        coordinator, replicas = Coordinator(config(1, addresses, **settings)), Replicas(nn.Linear(4, 4))
        coordinator.meet(identity(1), DataOrder(10))
        coordinator.ask_replicas(BatchKey(1, 0), replicas, lambda net: net(torch.ones(2, 4)))
        assert met.wait(20)
        coordinator.close(reason)

    def mine():
        coordinator, replicas = Coordinator(config(0, addresses, **settings)), Replicas(nn.Linear(4, 4))
        coordinator.meet(identity(0), DataOrder(10))
        taught = []
        for position in range(1500):
            found = coordinator.ask_replicas(BatchKey(1, position), replicas, lambda net: net(torch.ones(2, 4)))
            taught.append(bool(found.predictions))
            if taught[-1]:
                met.set()
            if coordinator.peers[1].state is PeerState.FINISHED and position:
                break
            time.sleep(0.02)
        found = coordinator.ask_replicas(BatchKey(2, 0), replicas, lambda net: net(torch.ones(2, 4)))
        return any(taught), bool(found.predictions), replicas.staleness(0) != []

    assert run_models([mine, other])[0] == (True, is_kept, is_kept)
    assert ("teaches no more" in caplog.text) is not is_kept


class Silent:
    """A mailbox in which nothing comes."""

    def __init__(self, peer, is_interrupted=False):
        self.peers, self.is_interrupted = {peer.model: peer}, is_interrupted

    def take_checkpoints(self, wanted, until=None):
        return {}


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_the_copy_of_a_model_that_died_without_a_word_is_dropped_after_a_while(is_interrupted, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fairseq_codistill.coordinator.checkpoint_exchange.time.monotonic", lambda: now[0])
    settings = {"codistill_exchange": "checkpoints", "codistill_interval": 5, "codistill_timeout": 60.0}
    silent = Silent(Peer(1), is_interrupted)
    exchange = CheckpointExchange(silent, TrafficMeter(), config(0, "a:1,b:2", **settings))
    replicas = Replicas(nn.Linear(2, 2))
    replicas.swap_in(1, Replicas(nn.Linear(2, 2)).encode(), 20)
    kept = []
    # The first checkpoint is given ten timeouts, for nobody knows how long one takes; later ones twice what that took.
    for elapsed, seconds in ((20, 0), (69, 700), (71, 599), (71, 601)):
        now[0] = 100.0 + seconds
        exchange.refresh(replicas, [1], DataOrder(10), BatchKey(1, 0), elapsed)
        kept.append(bool(replicas.elapsed))
    assert kept == [True, True, True, is_interrupted]


def test_on_a_slow_link_a_copy_is_kept_between_two_checkpoints(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fairseq_codistill.coordinator.checkpoint_exchange.time.monotonic", lambda: now[0])
    settings = {"codistill_exchange": "checkpoints", "codistill_interval": 5, "codistill_timeout": 60.0}
    mailbox, replicas = Silent(Peer(1)), Replicas(nn.Linear(2, 2))
    exchange = CheckpointExchange(mailbox, TrafficMeter(), config(0, "a:1,b:2", **settings))
    message = SimpleNamespace(
        fingerprint=replicas.layout.digest, payload=Replicas(nn.Linear(2, 2)).encode(), key=BatchKey(1, 0)
    )
    kept = []
    for round_number in range(3):  # one comes every 800 seconds
        mailbox.take_checkpoints = lambda wanted, until=None: {1: message}
        exchange.refresh(replicas, [1], DataOrder(10), BatchKey(1, 0), 1600 * round_number)
        mailbox.take_checkpoints = lambda wanted, until=None: {}
        now[0] += 799
        exchange.refresh(replicas, [1], DataOrder(10), BatchKey(1, 0), 1600 * round_number + 1599)
        kept.append(bool(replicas.elapsed))
        now[0] += 1
    assert kept == [False, True, True], "once it is known how long one takes"
    now[0] += 801
    exchange.refresh(replicas, [1], DataOrder(10), BatchKey(1, 0), 9999)
    assert not replicas.elapsed


def test_a_checkpoint_of_another_model_brings_no_copy_of_oneself():
    other, mine = Replicas(nn.Linear(2, 2)), Replicas(nn.Linear(2, 2))
    for model in (1, 2):
        other.swap_in(model, Replicas(nn.Linear(2, 2)).encode(), 7)
    mine.load_state_dict(other.state_dict(), own=1)
    assert mine.elapsed == {2: 7}


def test_a_goodbye_after_an_error_is_not_that_of_a_model_that_was_stopped():
    """Whose copy teaches on, for it may come back."""
    assert STOPPED.search("it said goodbye: stopped by SIGTERM")
    assert not STOPPED.search("it said goodbye: ended by an error of another rank")
