"""The seal of what a relay forwards: what it refuses, of others and after restarts."""

import os

import pytest
from relaying import until
from test_relay import HEADER, keys, open_transport, pass_over, relay, silent_guest  # noqa: F401 - fixtures

pytest.importorskip("nacl")

from fairseq_codistill.coordinator.transports import relay_frames
from fairseq_codistill.coordinator.transports.sealing import Seal
from fairseq_codistill.coordinator.wire import WireError


@pytest.fixture
def seals():
    key = os.urandom(32)
    return [Seal(key, model) for model in range(2)]


def test_what_was_changed_mixed_repeated_or_misdirected_is_refused(seals):
    zero, one = seals
    headers, payload = zero.seal({1: HEADER, 2: b"for two"}, b"secret " * 10, {1: one.session, 2: bytes(8)})
    assert HEADER not in headers[1]
    assert b"secret" not in payload
    later, other = zero.seal({1: HEADER}, b"another", {1: one.session})
    with pytest.raises(WireError, match="for model 2 came to model 1"):
        one.open(0, headers[2], payload)
    with pytest.raises(WireError, match="not of one message"):
        one.open(0, headers[1], other)
    for broken in (payload[:-1] + bytes([payload[-1] ^ 1]), payload[:30], b""):
        with pytest.raises(WireError):
            one.open(0, headers[1], broken)
    for broken in (headers[1][:-1], b"", b"x" * 30):
        with pytest.raises(WireError, match="not sealed"):
            one.open(0, broken, payload)
    assert one.open(0, headers[1], payload) == (HEADER, b"secret " * 10)
    assert one.open(0, headers[1], payload) is None
    assert one.open(0, later[1], other) == (HEADER, b"another")
    assert one.open(0, headers[1], payload) is None


def test_another_run_cannot_open_it(seals):
    headers, payload = seals[0].seal({1: HEADER}, b"x", {1: seals[1].session})
    with pytest.raises(WireError, match="not sealed with this run's key"):
        Seal(os.urandom(32), 1).open(0, headers[1], payload)


def test_a_process_that_was_restarted_is_heard_and_its_old_messages_are_not(seals):
    zero, one = seals
    headers, payload = zero.seal({1: HEADER}, b"old", {1: one.session})
    again = Seal(bytes(zero._box), 0)
    new_headers, new_payload = again.seal({1: HEADER}, b"new", {1: one.session})
    assert one.open(0, headers[1], payload) == (HEADER, b"old")
    assert one.open(0, new_headers[1], new_payload) == (HEADER, b"new")
    later, old_payload = zero.seal({1: HEADER}, b"old again", {1: one.session})
    assert one.open(0, later[1], old_payload) is None


def test_what_is_repeated_to_a_receiver_that_was_restarted_is_refused_and_silences_nobody(seals):
    zero, one = seals
    old = zero.seal({1: HEADER}, b"old", {1: one.session})
    zero, one = (Seal(bytes(seal._box), model) for model, seal in enumerate(seals))
    for payload in (b"first", b"second"):
        headers, sealed = zero.seal({1: HEADER}, payload, {1: one.session})
        assert one.open(0, headers[1], sealed) == (HEADER, payload)
        with pytest.raises(WireError, match="sealed for another process of model 1"):
            one.open(0, old[0][1], old[1])


def test_what_a_relay_recorded_before_a_restart_of_the_receiver_is_refused(relay, keys, open_transport):  # noqa: F811
    zero = open_transport(relay.address, keys, 0)
    with silent_guest(relay, keys, 1) as recorder:
        until(lambda: zero.send(1, HEADER, b"old"))
        frames = recorder.recv_multipart()
        while not frames[0].startswith(relay_frames.DATA):
            frames = recorder.recv_multipart()
    zero.close(0)
    one = open_transport(relay.address, keys, 1)
    until(lambda: relay.said().count("model 1 rank 0") > 1)
    with silent_guest(relay, keys, 0) as repeater:
        repeater.send_multipart(relay_frames.upload({1: frames[1]}, frames[2]))
        with pytest.raises(WireError, match="sealed for another process of model 1"):
            until(lambda: one.receive(1.0))
    zero = open_transport(relay.address, keys, 0)
    assert pass_over(zero, one, 1, b"new") == b"new"
