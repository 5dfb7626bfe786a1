"""The mailbox against a scripted transport: what is kept, what is refused, and for whom it waits."""

import json

import pytest

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.mailbox import CAPACITY, Mailbox
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import PeerState
from fairseq_codistill.coordinator.shelf import Shelf
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import Kind, Message, WireError, parse

RUN = b"the-run!"


class Script(Transport):
    """Hands out queued messages; keeps what was sent; can be told that peers cannot be reached."""

    def __init__(self):
        self.inbox, self.sent, self.reachable, self.polls = [], [], True, 0

    def send(self, peer_model, header, payload):
        if self.reachable:
            self.sent.append((peer_model, parse(header, payload)))
        return self.reachable

    def receive(self, timeout_s):
        self.polls += 1
        if self.inbox:
            item = self.inbox.pop(0)
            if isinstance(item, Exception):
                raise item
            return item
        return None

    def close(self, linger_s):
        self.closed = True

    def deliver(self, kind, model=1, key=(0, 0), payload=b"x", rank=0, run=RUN):
        message = Message(kind, model, rank, run, payload, BatchKey(*key))
        self.inbox.append((message.header(), message.payload))

    def hello(self, model=1, incarnation="a", seen=(0,)):
        self.deliver(Kind.HELLO, model, payload=json.dumps({"incarnation": incarnation, "seen": list(seen)}).encode())


@pytest.fixture
def script():
    return Script()


def met_mailbox(script, num_models=2, **kwargs):
    mailbox = Mailbox(script, 0, 0, num_models, RUN, TrafficMeter(), **kwargs)
    for model in range(1, num_models):
        script.hello(model)
    mailbox.meet({"incarnation": "mine"}, timeout_s=5.0)
    assert all(peer.state is PeerState.PRESENT for peer in mailbox.peers.values())
    return mailbox


def test_collects_the_message_of_the_position_and_nothing_else(script):
    mailbox = met_mailbox(script)
    script.deliver(Kind.PREDICTIONS, key=(1, 0), payload=b"old")
    script.deliver(Kind.PREDICTIONS, key=(1, 1), payload=b"right")
    script.deliver(Kind.PREDICTIONS, key=(1, 2), payload=b"next")
    found = mailbox.collect(BatchKey(1, 1), [1], timeout_s=1.0)
    assert bytes(found[1].payload) == b"right"
    assert bytes(mailbox.collect(BatchKey(1, 2), [1], timeout_s=1.0)[1].payload) == b"next"
    assert mailbox._meter.stale_messages == 1
    assert mailbox._meter.delivered_messages == 2


def test_a_late_peer_costs_its_timeout_once(script):
    mailbox = met_mailbox(script)
    assert mailbox.collect(BatchKey(1, 0), [1], timeout_s=0.01) == {}
    assert mailbox.peers[1].state is PeerState.AWAY
    script.polls = 0
    assert mailbox.collect(BatchKey(1, 1), [1], timeout_s=1e9) == {}  # would never end if it waited
    assert script.polls == 1
    script.deliver(Kind.PREDICTIONS, key=(1, 2))
    assert set(mailbox.collect(BatchKey(1, 2), [1], timeout_s=1.0)) == {1}
    assert mailbox.peers[1].state is PeerState.PRESENT


def test_a_peer_that_skipped_the_position_is_not_waited_for(script):
    mailbox = met_mailbox(script)
    script.deliver(Kind.PREDICTIONS, key=(1, 3))
    assert mailbox.collect(BatchKey(1, 2), [1], timeout_s=1e9) == {}
    assert mailbox.peers[1].state is PeerState.PRESENT


def test_a_goodbye_ends_the_waiting(script):
    mailbox = met_mailbox(script)
    script.deliver(Kind.GOODBYE, payload=b'{"reason": "enough"}')
    assert mailbox.collect(BatchKey(1, 0), [1], timeout_s=1e9) == {}
    assert mailbox.peers[1].state is PeerState.FINISHED


def test_a_peer_a_few_positions_behind_is_waited_for_again(script):
    mailbox = met_mailbox(script)
    for position in range(20):
        mailbox.post(BatchKey(1, position), bytes(16), 1, 1, 1, b"abcd", [1])
        mailbox.collect(BatchKey(1, position), [1], timeout_s=0.0)
    assert mailbox.peers[1].state is PeerState.AWAY
    script.deliver(Kind.PREDICTIONS, key=(1, 19 - CAPACITY))
    mailbox.poll()
    assert mailbox.peers[1].state is PeerState.AWAY  # what it needs next has left its mailbox
    script.deliver(Kind.PREDICTIONS, key=(1, 20 - CAPACITY))
    mailbox.poll()
    assert mailbox.peers[1].state is PeerState.PRESENT


def test_one_peer_away_does_not_keep_the_others_apart(script):
    mailbox = met_mailbox(script, num_models=3)
    script.deliver(Kind.PREDICTIONS, model=2, key=(1, 0), payload=b"two")
    assert set(mailbox.collect(BatchKey(1, 0), [1, 2], timeout_s=0.01)) == {2}
    assert mailbox.peers[1].state is PeerState.AWAY
    assert mailbox.peers[2].state is PeerState.PRESENT


def test_memory_of_a_peer_that_runs_ahead_is_bounded(script):
    mailbox = met_mailbox(script)
    for position in range(1, 4 * CAPACITY):
        script.deliver(Kind.PREDICTIONS, key=(1, position))
    mailbox.collect(BatchKey(1, 0), [1], timeout_s=0.0)
    assert len(mailbox._shelf.boxes[1]) == CAPACITY
    assert set(mailbox._shelf.boxes[1]) == {BatchKey(1, position) for position in range(1, 1 + CAPACITY)}


def test_memory_of_a_peer_that_runs_ahead_is_bounded_in_bytes_but_for_what_is_to_be_collected():
    shelf = Shelf([1], max_bytes=100)

    def put(position, size=40):
        key = BatchKey(1, position)
        return shelf.put(Message(Kind.PREDICTIONS, 1, 0, bytes(8), bytes(size), key))

    assert [put(position) for position in (2, 3, 4, 1)] == [0, 0, 1, 1]
    assert set(shelf.boxes[1]) == {BatchKey(1, 1), BatchKey(1, 2)}, "the oldest are needed first"
    shelf.open(BatchKey(1, 1))
    shelf.open(BatchKey(1, 2))
    assert put(2, size=500) == 0, "it is to be collected"
    assert [put(3), put(4)] == [0, 1], "one beyond those to be collected"
    assert set(shelf.take(BatchKey(1, 2), [1])) == {1}
    assert put(4, size=500) == 1


def test_the_parts_of_a_batch_that_is_ahead_are_kept_however_large_they_are():
    shelf = Shelf([1], keys_per_update=2, max_bytes=100, at_once=2)
    keys = [BatchKey(1, position, part) for position in (1, 2) for part in (0, 1)]
    dropped = [shelf.put(Message(Kind.PREDICTIONS, 1, 0, bytes(8), bytes(500), key)) for key in keys]
    assert dropped == [0, 0, 1, 1]
    assert set(shelf.boxes[1]) == set(keys[:2])
    shelf.open(keys[1])  # what is still to be collected takes no room from the batch after it
    assert [shelf.put(Message(Kind.PREDICTIONS, 1, 0, bytes(8), bytes(500), key)) for key in keys[2:]] == [0, 1]


@pytest.mark.parametrize(
    "wrong", [{"run": b"other-rn"}, {"rank": 1}, {"model": 0}, {"model": 7}], ids=lambda wrong: next(iter(wrong))
)
def test_foreign_messages_are_counted_and_change_nothing(script, wrong):
    mailbox = met_mailbox(script)
    script.deliver(Kind.PREDICTIONS, key=(1, 0), **wrong)
    script.deliver(Kind.GOODBYE, payload=b"{}", **wrong)
    assert mailbox.collect(BatchKey(1, 0), [1], timeout_s=0.01) == {}
    assert mailbox._meter.rejected_messages == 2
    assert mailbox.peers[1].state is PeerState.AWAY  # it was waited for: the goodbye was not believed


@pytest.mark.parametrize(
    "payload",
    [b"", b"not json", b"[1]", b"\xff\xfe", b'"' + b"x" * 100_000 + b'"', b"[" * 60_000],
    ids=["empty", "text", "list", "not-unicode", "too-long", "too-deep"],
)
def test_garbage_instead_of_a_hello_is_refused(script, payload):
    mailbox = met_mailbox(script)
    script.deliver(Kind.HELLO, payload=payload)
    script.inbox.append(WireError("message of 3 frames"))
    script.inbox.append((b"garbage", b""))
    mailbox.collect(BatchKey(1, 0), [], timeout_s=0.0)
    assert mailbox._meter.rejected_messages == 3
    assert mailbox.peers[1].hello == {"incarnation": "a", "seen": [0]}


def test_nobody_is_left_untold(script):
    mailbox = Mailbox(script, 0, 0, 2, RUN, TrafficMeter())
    script.reachable = False
    script.hello(seen=[])
    mailbox.meet({"incarnation": "mine"}, timeout_s=0.01)
    assert mailbox.peers[1].state is PeerState.PRESENT
    assert mailbox.meeting.told == set()
    script.reachable = True
    script.hello(seen=[])  # it still asks: answered while training
    mailbox.collect(BatchKey(1, 0), [], timeout_s=0.0)
    assert [message.kind for _, message in script.sent] == [Kind.HELLO]


@pytest.mark.parametrize("seen", [None, 5, "0", {}, [None]])
def test_a_hello_with_an_odd_list_of_the_seen_is_answered(script, seen):
    mailbox = met_mailbox(script)
    script.sent.clear()
    script.deliver(Kind.HELLO, payload=json.dumps({"incarnation": "a", "seen": seen}).encode())
    mailbox.collect(BatchKey(1, 0), [], timeout_s=0.0)
    assert [message.kind for _, message in script.sent] == [Kind.HELLO]


def test_a_restarted_peer_is_heard_again_from_its_first_current_position(script):
    mailbox = met_mailbox(script)
    script.hello(incarnation="b")
    assert mailbox.collect(BatchKey(1, 5), [1], timeout_s=1e9) == {}  # restarted, perhaps far behind: nobody waits
    assert mailbox.peers[1].state is PeerState.AWAY
    script.deliver(Kind.PREDICTIONS, key=(1, 2))
    assert mailbox.collect(BatchKey(1, 6), [1], timeout_s=1e9) == {}
    script.deliver(Kind.PREDICTIONS, key=(1, 7))
    assert set(mailbox.collect(BatchKey(1, 7), [1], timeout_s=1e9)) == {1}
    assert mailbox.peers[1].state is PeerState.PRESENT


def test_the_goodbye_of_the_old_process_does_not_end_the_restarted_one(script):
    mailbox = met_mailbox(script)
    script.hello(incarnation="b")
    script.deliver(Kind.GOODBYE, payload=b'{"reason": "killed", "incarnation": "a"}')
    script.deliver(Kind.PREDICTIONS, key=(1, 1))
    assert set(mailbox.collect(BatchKey(1, 1), [1], timeout_s=1e9)) == {1}
    assert mailbox.peers[1].state is PeerState.PRESENT
    script.deliver(Kind.GOODBYE, payload=b'{"reason": "finished", "incarnation": "b"}')
    assert mailbox.collect(BatchKey(1, 2), [1], timeout_s=1e9) == {}
    assert mailbox.peers[1].state is PeerState.FINISHED


def test_meeting_ends_early_when_given_up_but_not_before_those_met_are_told(script):
    mailbox = Mailbox(script, 0, 0, 3, RUN, TrafficMeter())
    script.hello(1, seen=[0])
    mailbox.meet({"incarnation": "mine"}, timeout_s=1e9, give_up=lambda: mailbox.peers[1].hello is not None)
    assert 1 in mailbox.meeting.told
    assert mailbox.peers[2].hello is None


def test_a_peer_not_met_in_time_is_away_and_nobody_waits_for_it(script):
    mailbox = Mailbox(script, 0, 0, 2, RUN, TrafficMeter())
    mailbox.meet({"incarnation": "mine"}, timeout_s=0.01)
    assert mailbox.peers[1].state is PeerState.AWAY
    assert mailbox.collect(BatchKey(1, 0), [1], timeout_s=1e9) == {}


def test_closing_twice_says_goodbye_once(script):
    mailbox = met_mailbox(script)
    script.sent.clear()
    mailbox.close("enough")
    mailbox.close("again")
    assert [message.kind for _, message in script.sent] == [Kind.GOODBYE]
    assert script.closed


def test_who_joins_a_run_does_not_wait_for_a_peer_that_the_run_goes_on_without(script):
    mailbox = Mailbox(script, 0, 0, 3, RUN, TrafficMeter())
    hello = {"incarnation": "a", "seen": [0], "is_training": True, "away": [2]}
    script.deliver(Kind.HELLO, payload=json.dumps(hello).encode())
    mailbox.meet({"incarnation": "mine"}, timeout_s=1e9)
    assert mailbox.peers[1].state is PeerState.PRESENT
    assert mailbox.peers[2].state is PeerState.AWAY


@pytest.mark.parametrize("hello", [{"is_training": False, "away": [2]}, {"is_training": True, "away": "2"}, {}])
def test_who_starts_with_others_waits_for_all(script, hello):
    mailbox = Mailbox(script, 0, 0, 3, RUN, TrafficMeter())
    script.deliver(Kind.HELLO, payload=json.dumps({"incarnation": "a", "seen": [0], **hello}).encode())
    polls = []
    mailbox.meet({"incarnation": "mine"}, timeout_s=1e9, give_up=lambda: len(polls) == 5 or polls.append(1))
    assert len(polls) == 5


def test_every_hello_says_how_things_stand_then(script):
    elapsed = iter([4, 9])
    mailbox = Mailbox(script, 0, 0, 2, RUN, TrafficMeter(), status=lambda: {"elapsed": next(elapsed)})
    script.hello(1)
    mailbox.meet({"incarnation": "mine"}, timeout_s=5.0)
    script.hello(1, incarnation="restarted", seen=())
    mailbox.poll()
    said = [json.loads(bytes(message.payload)) for _, message in script.sent if message.kind is Kind.HELLO]
    assert [hello["elapsed"] for hello in said] == [4, 9]
    assert [hello["away"] for hello in said] == [[], [1]]


def test_messages_are_numbered_for_each_peer_and_those_that_could_not_be_sent_have_no_number(script):
    mailbox = met_mailbox(script, num_models=3)
    script.sent.clear()
    for position, audience in enumerate([[1], [1, 2], [2]]):
        script.reachable = position != 1
        mailbox.post(BatchKey(1, position), bytes(16), 1, 1, 1, b"x", audience)
    numbers = [(peer, message.key.position, message.number) for peer, message in script.sent]
    assert numbers == [(1, 0, 2), (2, 2, 2)]  # 1 was the hello


def checkpoints_sent(script):
    return [message.key for _, message in script.sent if message.kind is Kind.CHECKPOINT]


@pytest.mark.parametrize("waits", [True, False])
def test_a_late_confirmation_passes_over_a_peer_only_where_nobody_waits(script, waits):
    """A peer that waits for this very checkpoint and is passed over would wait for its whole timeout."""
    mailbox = met_mailbox(script)
    first, second = BatchKey(1, 0), BatchKey(1, 20)
    assert mailbox.post_checkpoint(first, b"", b"x", [1], waits)[1] == []
    assert mailbox.post_checkpoint(second, b"", b"x", [1], waits)[1] == ([] if waits else [1])
    assert checkpoints_sent(script) == ([first, second] if waits else [first])


def test_an_absent_peer_is_passed_over_also_where_models_wait(script):
    mailbox = met_mailbox(script)
    keys = [BatchKey(1, position) for position in (0, 20)]
    mailbox.post_checkpoint(keys[0], b"", b"x", [1], waits=True)
    mailbox.wait_for_checkpoints(keys[0], timeout_s=0.0)
    assert mailbox.peers[1].state is PeerState.AWAY
    assert mailbox.post_checkpoint(keys[1], b"", b"x", [1], waits=True)[1] == [1]


def test_the_checkpoint_that_is_due_outlives_the_next_one(script):
    """A peer may make its next checkpoint before this model has taken the one that both exchange now."""
    mailbox = met_mailbox(script)
    for position in (0, 20):
        script.deliver(Kind.CHECKPOINT, key=(1, position), payload=b"%d" % position)
    mailbox.wait_for_checkpoints(BatchKey(1, 0), timeout_s=5.0)
    assert bytes(mailbox.take_checkpoints([1], until=BatchKey(1, 0))[1].payload) == b"0"
    assert mailbox.take_checkpoints([1], until=BatchKey(1, 19)) == {}
    assert bytes(mailbox.take_checkpoints([1], until=BatchKey(1, 20))[1].payload) == b"20"


A, B, NEXT = BatchKey(1, 4, 0), BatchKey(1, 4, 1), BatchKey(1, 5, 0)


def posted(script, *keys, num_models=2):
    mailbox = met_mailbox(script, num_models)
    for key in keys:
        mailbox.post(key, bytes(16), 1, 1, 1, b"ours", [1])
    return mailbox


@pytest.mark.parametrize("arrival", [(A, B), (B, A)])
@pytest.mark.parametrize("order", [(A, B), (B, A)])
def test_positions_that_are_pending_together_are_collected_in_any_order(script, arrival, order):
    mailbox = posted(script, A, B)
    for key in arrival:
        script.deliver(Kind.PREDICTIONS, key=key, payload=str(key).encode())
    mailbox.poll()
    for key in order:
        assert bytes(mailbox.collect(key, [1], timeout_s=1.0)[1].payload) == str(key).encode()
    assert mailbox._meter.stale_messages == 0


def test_a_peer_that_went_on_without_the_first_position_costs_no_wait(script):
    mailbox = posted(script, A, B)
    script.deliver(Kind.PREDICTIONS, key=B)
    assert mailbox.collect(A, [1], timeout_s=1e9) == {}  # would never end if it waited
    assert set(mailbox.collect(B, [1], timeout_s=1e9)) == {1}
    assert mailbox.peers[1].state is PeerState.PRESENT


def test_a_message_for_a_pending_position_is_kept_until_its_update_is_over(script):
    mailbox = posted(script, A, B, NEXT)  # the next update's first position is posted ahead
    mailbox.collect(B, [], timeout_s=0.0)
    script.deliver(Kind.PREDICTIONS, key=A)
    mailbox.poll()
    assert set(mailbox._shelf.boxes[1]) == {A}
    mailbox.collect(NEXT, [], timeout_s=0.0)  # the batch of A was given up, as after an out-of-memory error
    assert mailbox._shelf.boxes[1] == {}
    script.deliver(Kind.PREDICTIONS, key=A)
    mailbox.poll()
    assert mailbox._shelf.boxes[1] == {}
    assert mailbox._meter.stale_messages == 2


def test_pending_positions_leave_as_much_room_for_those_ahead_as_one_alone(script):
    mailbox = posted(script, A, B)
    for position in range(5, 25):
        script.deliver(Kind.PREDICTIONS, key=(1, position))
    mailbox.poll()
    assert len(mailbox._shelf.boxes[1]) == CAPACITY + 1
    mailbox.collect(A, [], timeout_s=0.0)
    script.deliver(Kind.PREDICTIONS, key=B)
    assert set(mailbox.collect(B, [1], timeout_s=0.0)) == {1}


def test_what_is_left_out_for_a_peer_that_is_there_is_told(script, caplog):
    mailbox = met_mailbox(script)
    script.reachable = False
    for position in range(4):
        assert mailbox.post(BatchKey(1, position), bytes(16), 1, 1, 1, b"ours", [1]) == 0
    told = [record.message for record in caplog.records if "left out" in record.message]
    assert [line.split("(")[1].split(")")[0] for line in told] == ["1 so far", "2 so far", "4 so far"]
    assert "model 1" in told[0]
    assert "--codistill-interval" in told[0]

    caplog.clear()
    mailbox.collect(BatchKey(1, 4), [1], timeout_s=0.01)  # the peer is away: nothing else is to be expected
    mailbox.post(BatchKey(1, 5), bytes(16), 1, 1, 1, b"ours", [1])
    assert not [record for record in caplog.records if "left out" in record.message]
