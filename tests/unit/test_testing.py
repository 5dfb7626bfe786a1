"""Scripted peers against a real coordinator: what each fault costs, without sockets and over them."""

import threading

import pytest
import torch
from helpers import free_ports

from fairseq_codistill import Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import AlignmentError, Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.peers import PeerState
from fairseq_codistill.testing import Fault, Script, ScriptedPeer, ScriptedTransport

BATCH = bytes(range(16))
NOBODY = "127.0.0.1:1,127.0.0.1:2"  # never opened: these tests use no sockets
AT_1 = BatchKey(1, 1, 0)


def another(key, logits):
    """What the scripted peer predicts: never what the job predicts."""
    return -logits - 1000 * key.position


def ours(position):
    return torch.arange(6.0).view(2, 3) + position


def met(addresses, transport=None, **changes):
    """Model 0's coordinator, acquainted with the scripted peers."""
    values = {"codistill_timeout": 20.0, "codistill_start_timeout": 20.0, "codistill_codec": "fp32", **changes}
    num_models = len(addresses.split(","))
    coordinator = Coordinator(
        CodistillationConfig(codistill_num_models=num_models, codistill_addresses=addresses, **values),
        transport=transport,
    )
    try:
        coordinator.meet(Identity(settings={"--max-tokens": 9}, remarks={}, parameters_digest="ours", seed=1))
    except ConfigError:
        coordinator.close()
        raise
    return coordinator


def exchange(coordinator, num_positions):
    exchanges = []
    for position in range(num_positions):
        coordinator.post(BatchKey(1, position), BATCH, ours(position))
        exchanges.append(coordinator.collect())
    return exchanges


def with_fault(fault, num_positions=4, **changes):
    script = Script(1, NOBODY, another, {AT_1: fault} if fault else {})
    coordinator = met(NOBODY, ScriptedTransport(script), codistill_timeout=0.01, **changes)
    exchanges = exchange(coordinator, num_positions)
    for position, one in enumerate(exchanges):
        for values in one.predictions.values():
            assert torch.equal(values, another(BatchKey(1, position), ours(position)))
    return coordinator, script, [len(one.predictions) for one in exchanges]


class TestWithoutSockets:
    def test_answers_every_position_with_other_predictions_and_keeps_ours(self):
        coordinator, script, answered = with_fault(None)
        assert answered == [1, 1, 1, 1]
        assert list(script.received[0]) == [BatchKey(1, position) for position in range(4)]
        assert torch.equal(script.received[0][AT_1], ours(1))
        coordinator.close("enough")
        assert script.goodbyes == {0: "enough"}

    @pytest.mark.parametrize("fault", [Fault.DROP, Fault.LATE])
    def test_a_late_peer_is_missed_once_and_taken_back(self, fault):
        coordinator, _, answered = with_fault(fault)
        assert answered == [1, 0, 1, 1]
        assert coordinator.peers[1].state is PeerState.PRESENT
        assert coordinator.meter.stale_messages == (1 if fault is Fault.LATE else 0)

    def test_after_a_goodbye_nothing_is_sent_to_the_peer(self):
        coordinator, script, answered = with_fault(Fault.GOODBYE)
        assert answered == [1, 0, 0, 0]
        assert coordinator.peers[1].state is PeerState.FINISHED
        assert list(script.received[0]) == [BatchKey(1, 0), AT_1]

    def test_a_peer_that_vanishes_is_away(self):
        coordinator, script, answered = with_fault(Fault.VANISH)
        assert answered == [1, 0, 0, 0]
        assert coordinator.peers[1].state is PeerState.AWAY
        assert len(script.received[0]) == 4

    def test_a_restart_between_two_batches_costs_nothing(self):
        coordinator, _, answered = with_fault(Fault.RESTART)
        assert answered == [1, 1, 1, 1]
        assert coordinator.peers[1].hello["incarnation"] == "scripted 1"

    def test_garbage_is_refused_and_counted_and_the_answer_behind_it_taken(self):
        coordinator, _, answered = with_fault(Fault.GARBAGE)
        assert answered == [1, 1, 1, 1]
        assert coordinator.meter.rejected_messages == 3

    def test_one_misaligned_batch_is_left_out_and_the_next_is_taken(self):
        coordinator, _, answered = with_fault(Fault.MISALIGNED, codistill_max_mismatches=2)
        assert answered == [1, 0, 1, 1]
        assert coordinator.meter.mismatched_messages == 1

    @pytest.mark.parametrize("parts", ["1", "4"])
    def test_the_parts_of_a_batch_are_one_misaligned_batch(self, parts):
        addresses = "127.0.0.1:29600,127.0.0.1:29700"
        faults = {(1, 0, slot): Fault.MISALIGNED for slot in range(int(parts))}
        script = Script(1, addresses, lambda key, logits: logits + 1, faults)
        model = torch.nn.Linear(2, 5)
        peers = Codistiller(
            num_models=2, addresses=addresses, codec="fp32", parts=parts, transport=ScriptedTransport(script)
        )
        peers.meet(model)
        for _ in range(3):
            peers.forward_backward(model, torch.randn(8, 2), torch.arange(8) % 5, range(8))
        assert peers.coordinator.peers[1].mismatches_in_a_row == 0
        assert peers.coordinator.meter.mismatched_messages == int(parts)
        peers.close()

    def test_as_many_misaligned_batches_as_allowed_are_an_error(self):
        with pytest.raises(AlignmentError, match="1 batches in a row"):
            with_fault(Fault.MISALIGNED, codistill_max_mismatches=1)

    @pytest.mark.parametrize(
        ("hello", "named"),
        [
            ({"settings": {"--max-tokens": 8}}, "--max-tokens: 9 here, 8 on model 1"),
            ({"settings": None}, "--max-tokens: 9 here, None on model 1"),
            ({"settings": ["--max-tokens", 9]}, "--max-tokens: 9 here, None on model 1"),
            ({"parameters_digest": "ours"}, "identical parameters"),
        ],
    )
    def test_a_hello_that_does_not_fit_is_refused_by_name(self, hello, named):
        with pytest.raises(ConfigError, match=named):
            met(NOBODY, ScriptedTransport(Script(1, NOBODY, another, hello=hello)))

    def test_another_run_is_never_met(self):
        transport = ScriptedTransport(Script(1, NOBODY, another, run_id="another"))
        coordinator = met(NOBODY, transport, codistill_start_timeout=0.01, codistill_require_peers="never")
        assert coordinator.peers[1].state is PeerState.AWAY
        assert coordinator.meter.rejected_messages > 0


class TestOverSockets:
    @pytest.mark.parametrize("codec", ["fp32", "fp16"])
    def test_two_scripted_peers_teach_one_job_through_garbage_until_one_leaves(self, codec):
        addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(3))
        first = Script(1, addresses, another, {(1, 1, 0): Fault.GARBAGE, (1, 3, 0): Fault.GOODBYE}, codec=codec)
        second = Script(2, addresses, lambda key, logits: logits * 2, codec=codec)
        with ScriptedPeer(first), ScriptedPeer(second):
            coordinator = met(addresses, codistill_codec=codec)
            exchanges = exchange(coordinator, 5)
            coordinator.close()
        assert [sorted(one.predictions) for one in exchanges] == [[1, 2], [1, 2], [1, 2], [2], [2]]
        for position, one in enumerate(exchanges):
            assert torch.equal(one.predictions[2].float(), 2 * ours(position))
            if 1 in one.predictions:
                assert torch.equal(one.predictions[1].float(), another(BatchKey(1, position), ours(position)))
        assert coordinator.meter.rejected_messages == 3

    def test_an_empty_batch_is_exchanged_like_any_other(self):
        addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        with ScriptedPeer(Script(1, addresses, another)):
            coordinator = met(addresses)
            coordinator.post(BatchKey(1, 0), BATCH, torch.empty(0, 3))
            assert coordinator.collect().predictions[1].shape == (0, 3)
            coordinator.close()

    def test_an_error_in_the_script_is_raised_at_the_end_of_its_block(self):
        asked = threading.Event()

        def broken(key, logits):
            asked.set()
            raise KeyError("no such prediction")

        addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))

        def run():
            with ScriptedPeer(Script(1, addresses, broken)):
                coordinator = met(addresses, codistill_timeout=0.1)
                exchange(coordinator, 1)
                assert asked.wait(20)
                coordinator.close()

        with pytest.raises(KeyError, match="no such prediction"):
            run()
