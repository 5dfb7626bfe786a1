"""What a broken or hostile peer may send: never a crash, never distilled from, all of it counted, memory bounded."""

import dataclasses
import json
import random

import pytest
import torch

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity, Introduction
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.mailbox import CAPACITY
from fairseq_codistill.coordinator.peers import PeerState
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import Kind, Message, WireError, run_id_from

ADDRESSES = "127.0.0.1:29600,127.0.0.1:29700"
RUN = run_id_from(ADDRESSES)
ROWS, CLASSES = 3, 4
FP32 = 1  # code of the codec on the wire
SETTINGS = {"--max-tokens": 9}


class Feed(Transport):
    """Hands out whatever frames it is given."""

    def __init__(self):
        self.frames = []

    def send(self, peer_model, header, payload):
        return True

    def receive(self, timeout_s):
        if not self.frames:
            return None
        frames = self.frames.pop()
        if isinstance(frames, Exception):
            raise frames
        return frames

    def close(self, linger_s):
        pass


def batch_of(position):
    return bytes([position % 256]) * 16


def good(key, values=1.0):
    payload = torch.full((ROWS, CLASSES), values).numpy().tobytes()
    return Message(Kind.PREDICTIONS, 1, 0, RUN, payload, key, batch_of(key.position), ROWS, CLASSES, FP32)


def frames_of(message):
    return message.header(), message.payload


def hello(**changes):
    content = {"incarnation": "a", "seen": [0], "parameters_digest": "theirs", "seed": 2, "elapsed": 0, **changes}
    return frames_of(Message(Kind.HELLO, 1, 0, RUN, json.dumps(content).encode()))


@pytest.fixture
def met():
    """A coordinator that has met model 1, and what feeds it."""
    feed = Feed()
    config = CodistillationConfig(
        codistill_num_models=2, codistill_addresses=ADDRESSES, codistill_codec="fp32", codistill_timeout=0.0,
        codistill_max_mismatches=10**9,
    )  # fmt: skip
    coordinator = Coordinator(config, transport=feed)
    settings = Introduction(config, Identity({}, {}, "", 0), world_size=1).hello["settings"]
    feed.frames.append(hello(settings=settings))
    coordinator.meet(Identity({}, {}, "ours", 1), DataOrder(10**6))
    return coordinator, feed


def mutate(generator, message):
    """A message that passes the checksums, with one or two fields that are not what they should be."""
    fields = {
        "kind": generator.choice(list(Kind)),
        "model": generator.choice([0, 1, 2, 65535]),
        "rank": generator.choice([0, 1, 65535]),
        "run_id": generator.choice([RUN, b"another!"]),
        "payload": generator.randbytes(generator.choice([0, 1, 47, 48, 49, 96])),
        "key": BatchKey(*(generator.choice([0, 1, 2**32 - 1]) for _ in range(3))),
        "fingerprint": generator.randbytes(16),
        "num_rows": generator.choice([0, ROWS, 2**32 - 1]),
        "num_classes": generator.choice([0, CLASSES, 2**32 - 1]),
        "codec": generator.choice([0, 2, 3, 255]),
        "is_checked": False,
    }
    chosen = generator.sample(list(fields), generator.choice([1, 2]))
    return dataclasses.replace(message, **{name: fields[name] for name in chosen})


def test_100_000_hostile_messages_are_counted_and_only_the_good_ones_distilled_from(met):
    coordinator, feed = met
    generator = random.Random(1)
    num_good = 0
    for position in range(1, 2001):  # the first has something before it to replay
        key = BatchKey(1, position)
        message = good(key)
        hostile = []
        for _ in range(50):
            kind = generator.randrange(5)
            header, payload = frames_of(message)
            if kind == 0:  # a damaged header or payload
                damaged = bytearray(header)
                damaged[generator.randrange(len(header))] ^= 1 << generator.randrange(8)
                hostile.append((bytes(damaged), payload))
            elif kind == 1:  # truncated
                hostile.append((header, payload[: generator.randrange(len(payload))]))
            elif kind == 2:  # replayed
                hostile.append(frames_of(good(BatchKey(1, max(0, position - 1 - generator.randrange(5))), 7.0)))
            elif kind == 3:
                hostile.append(WireError("message of 3 frames, expected 2"))
            else:
                mutated = mutate(generator, message)
                if mutated.kind is Kind.GOODBYE or mutated == message:
                    continue
                is_fit = (mutated.fingerprint, mutated.codec) == (message.fingerprint, FP32)
                if is_fit and len(mutated.payload) == len(message.payload) and mutated.payload != message.payload:
                    continue  # other logits of this very batch by its rightful sender: what a peer is for
                hostile.append(frames_of(mutated))
        # The transport hands out the last one first: the good one comes after all that is hostile.
        feed.frames = [frames_of(message), *hostile]
        coordinator.post(key, batch_of(position), torch.zeros(ROWS, CLASSES))
        exchange = coordinator.collect()
        for predictions in exchange.predictions.values():
            assert torch.equal(predictions, torch.ones(ROWS, CLASSES)), position
            num_good += 1
        assert all(len(box) <= CAPACITY for box in coordinator._mailbox._shelf.boxes.values())
    assert num_good > 1000
    meter = coordinator.meter
    assert meter.received_messages > 70_000
    kept = sum(len(box) for box in coordinator._mailbox._shelf.boxes.values())
    assert meter.rejected_messages > 30_000
    assert meter.stale_messages > 5000
    assert kept <= CAPACITY


def test_a_message_without_a_checksum_is_distilled_from_only_where_the_transport_authenticates(met):
    coordinator, feed = met
    for position, authenticates in enumerate([False, True, False]):
        key, before = BatchKey(1, position), coordinator.meter.rejected_messages
        feed.authenticates = authenticates
        feed.frames = [frames_of(dataclasses.replace(good(key), is_checked=False))]
        coordinator.post(key, batch_of(position), torch.zeros(ROWS, CLASSES))
        assert list(coordinator.collect().predictions) == ([1] if authenticates else [])
        assert coordinator.meter.rejected_messages == before + (not authenticates)


@pytest.mark.parametrize(
    "content",
    [
        {"settings": [1, 2]}, {"settings": None}, {"seen": "0"}, {"seen": {"0": 1}}, {"elapsed": "9"},
        {"elapsed": None}, {"elapsed": -5}, {"elapsed": 1e300}, {"elapsed": True}, {"away": 3}, {"incarnation": []},
        {"parameters_digest": {}}, {"seed": {}}, {"is_training": 1},
    ],
)  # fmt: skip
def test_a_hello_of_strange_content_is_no_crash(met, content):
    coordinator, feed = met
    feed.frames.append(hello(**{"incarnation": "b", **content}))
    coordinator.poll(0)
    assert coordinator.num_behind(3, within_reach=False) in (0, 1)


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 70_000, b"null", b"{}" + b" " * 70_000])
@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.GOODBYE])
def test_a_hello_or_goodbye_that_is_none_is_refused(met, payload, kind):
    coordinator, feed = met
    before = coordinator.meter.rejected_messages
    feed.frames.append(frames_of(Message(kind, 1, 0, RUN, payload)))
    coordinator.poll(0)
    assert coordinator.meter.rejected_messages == before + 1
    assert [peer.state for peer in coordinator.peers.values()] == [PeerState.PRESENT]
