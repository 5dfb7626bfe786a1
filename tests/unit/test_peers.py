"""The states of a peer, one transition at a time."""

import pytest

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.peers import Peer, PeerState

NOW, LATER, EARLIER = BatchKey(1, 5), BatchKey(1, 6), BatchKey(1, 4)


def peer_in(state: PeerState) -> Peer:
    peer = Peer(1)
    if state is not PeerState.EXPECTED:
        peer.on_hello({"incarnation": "a"})
    if state is PeerState.AWAY:
        peer.on_missed(NOW, 1.0)
    if state is PeerState.FINISHED:
        peer.on_goodbye("done")
    assert peer.state is state
    return peer


@pytest.mark.parametrize(
    ("state", "event", "expected"),
    [
        (PeerState.EXPECTED, lambda p: p.on_hello({"incarnation": "a"}), PeerState.PRESENT),
        (PeerState.EXPECTED, lambda p: p.on_start_timeout(9.0), PeerState.AWAY),
        (PeerState.EXPECTED, lambda p: p.on_missed(NOW, 1.0), PeerState.EXPECTED),
        (PeerState.PRESENT, lambda p: p.on_hello({"incarnation": "a"}), PeerState.PRESENT),
        (PeerState.PRESENT, lambda p: p.on_hello({"incarnation": "b"}), PeerState.AWAY),
        (PeerState.PRESENT, lambda p: p.on_missed(NOW, 1.0), PeerState.AWAY),
        (PeerState.PRESENT, lambda p: p.on_start_timeout(9.0), PeerState.PRESENT),
        (PeerState.PRESENT, lambda p: p.on_goodbye("done"), PeerState.FINISHED),
        (PeerState.AWAY, lambda p: p.on_posted(EARLIER, NOW), PeerState.AWAY),
        (PeerState.AWAY, lambda p: p.on_posted(NOW, NOW), PeerState.PRESENT),
        (PeerState.AWAY, lambda p: p.on_posted(LATER, NOW), PeerState.PRESENT),
        (PeerState.AWAY, lambda p: p.on_posted(NOW, None), PeerState.PRESENT),
        (PeerState.AWAY, lambda p: p.on_goodbye("done"), PeerState.FINISHED),
        (PeerState.FINISHED, lambda p: p.on_hello({"incarnation": "b"}), PeerState.AWAY),
        (PeerState.FINISHED, lambda p: p.on_hello({"incarnation": "a"}), PeerState.FINISHED),
        (PeerState.FINISHED, lambda p: p.on_posted(LATER, NOW), PeerState.FINISHED),
    ],
)
def test_each_event_leads_where_the_diagram_says(state, event, expected):
    peer = peer_in(state)
    event(peer)
    assert peer.state is expected
    assert peer.is_waited_for == (expected is PeerState.PRESENT)


def test_a_goodbye_before_any_hello_does_not_outlive_the_next_start():
    peer = Peer(1)
    peer.on_goodbye("done")
    peer.on_hello({"incarnation": "b"})
    assert peer.state is PeerState.AWAY


def test_a_peer_beyond_a_position_will_not_post_it_any_more():
    peer = peer_in(PeerState.PRESENT)
    assert not peer.is_past(NOW)
    peer.on_posted(LATER, NOW)
    assert peer.is_past(NOW)
    assert not peer.is_past(LATER)
    peer.on_posted(NOW, NOW)  # out of order: the newest stays
    assert peer.newest == LATER


def test_a_restart_forgets_what_the_old_process_posted():
    peer = peer_in(PeerState.PRESENT)
    peer.on_posted(LATER, NOW)
    peer.mismatches_in_a_row = 2
    peer.on_hello({"incarnation": "b"})
    assert peer.newest is None
    assert peer.mismatches_in_a_row == 0


def test_every_change_is_logged_with_its_reason(caplog):
    peer = peer_in(PeerState.PRESENT)
    with caplog.at_level("INFO"):
        peer.on_missed(NOW, 12.3)
    assert "model 1 is away (was present)" in caplog.text
    assert "epoch 1 position 5" in caplog.text
    assert "12.3 s" in caplog.text
