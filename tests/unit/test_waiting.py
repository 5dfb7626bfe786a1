"""The one loop that all waits for peers go through: what counts as having waited."""

from fairseq_codistill.coordinator import waiting
from fairseq_codistill.coordinator.waiting import Waiting


class Clock:
    """Of the machine, which a suspended process does not hear tick."""

    now = 100.0

    def monotonic(self):
        return self.now


def waited(monkeypatch, timeout_s, looks):
    """Seconds by the clock that a wait for somebody who never comes takes, and those it counted.

    Args:
        looks: seconds that each look takes; the last one again and again.
    """
    clock, left = Clock(), list(looks)
    monkeypatch.setattr(waiting, "time", clock)

    def pump(seconds):
        clock.now += left.pop(0) if len(left) > 1 else left[0]

    still, counted = Waiting(pump).wait(lambda: ["somebody"], timeout_s)
    assert still == ["somebody"]
    return clock.now - 100.0, counted


def test_a_wait_ends_with_its_timeout(monkeypatch):
    assert waited(monkeypatch, 4.0, [0.25]) == (4.0, 4.0)


def test_the_time_that_a_process_was_suspended_for_hardly_counts_as_waited(monkeypatch):
    """Else every peer would be away at once, whose messages lie in the socket."""
    by_the_clock, counted = waited(monkeypatch, 300.0, [0.25, 3600.0, 0.25])
    assert by_the_clock > 3890.0
    assert 300.0 <= counted < 300.5


def test_slow_looks_count(monkeypatch):
    by_the_clock, counted = waited(monkeypatch, 10.0, [1.5])
    assert by_the_clock == counted == 10.5
