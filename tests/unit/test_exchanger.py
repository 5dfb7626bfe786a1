"""An exchange in two calls: what goes out at the first, and what belongs to which batch when several are in flight."""

import pytest
import torch

from fairseq_codistill.codistiller import Batch, Codistiller
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.testing import Script, ScriptedTransport

NOBODY = "127.0.0.1:1,127.0.0.1:2"  # never opened
PARTS = [Batch((1, 0, 0), 0, b"a" * 16), Batch((1, 0, 1), 0, b"b" * 16)]
ROWS = torch.tensor([0, 2])


def exchanger(**settings):
    script = Script(1, NOBODY, lambda key, logits: logits * (2 + key.micro_batch))
    peers = Codistiller(
        num_models=2,
        addresses=NOBODY,
        codec="fp32",
        parts="1",
        transport=ScriptedTransport(script),
        update_freq=2,
        **settings,
    )
    peers.meet(torch.nn.Linear(2, 2))
    return peers, script


def logits_of(part):
    return torch.arange(9.0).view(3, 3).add(part * part).requires_grad_()


def test_two_batches_in_flight_are_what_one_after_the_other_is():
    peers, _ = exchanger()
    expected = []
    for part, batch in enumerate(PARTS):
        logits = logits_of(part)
        peers.step(batch, logits, ROWS).total.backward()
        expected.append((logits.grad, {name: float(value) for name, value in peers.sums.items()}))
    peers, script = exchanger()
    logits = [logits_of(part) for part in range(2)]
    pending = [peers.begin(batch, mine, ROWS) for batch, mine in zip(PARTS, logits, strict=True)]
    assert list(script.received[0]) == [BatchKey(1, 0, 0), BatchKey(1, 0, 1)]  # both are out before anyone waits
    for part in (0, 1):
        peers.finish(pending[part], logits[part], ROWS).total.backward()
        gradient, sums = expected[part]
        assert torch.equal(logits[part].grad, gradient)
        found = {name: float(value) for name, value in peers.sums.items()}
        assert found == sums | {"codistill_wait_ms": found["codistill_wait_ms"]}
    assert not torch.equal(expected[0][0], expected[1][0])


@pytest.mark.parametrize("settings", [{"burn_in": 1}, {"weight": 0.0}])
def test_where_nothing_is_due_there_is_nothing_to_finish(settings):
    peers, script = exchanger(**settings)
    assert peers.begin(PARTS[0], logits_of(0)) is None
    assert peers.finish(None, logits_of(0)) is None
    assert script.received[0] == {}
