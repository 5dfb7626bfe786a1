"""Owns whether a training is live, finished, failed, stopped or silent. It goes by the logs, asks no process for it."""

import dataclasses
import itertools
import time
from pathlib import Path

from fairseq_codistill.report.model import ModelLog

QUIET_S = 600.0  # a log that grew within this time belongs to a live training
NUM_GAPS = 5  # and so does one that has been still for no longer than this many of its longest gaps
DAY_S = 86_400.0  # a stamp may be of another time zone; a log whose last stamp is older was copied, not written, lately


@dataclasses.dataclass(frozen=True)
class State:
    """What a training is doing.

    Attributes:
        word: ``live``, ``finished``, ``failed``, ``stopped`` or ``silent`` (the log breaks off).
        why: in a sentence; empty where the word says it all.
    """

    word: str
    why: str = ""


def _modified(file: Path) -> float:
    """When it was written last, in seconds since 1970; 0 where it has gone since it was read."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def model_state(model: ModelLog, now: float) -> State:
    """Of one model, at ``now`` (seconds since 1970)."""
    if model.ending is not None:
        return State(model.ending.state, model.ending.why)
    grew = max(map(_modified, model.files), default=0.0)
    times = sorted(record["time"] for record in [*model.train, *model.valid] if "time" in record)
    gaps = [  # but for pauses before a start: a queue is no measure of how slow training is
        after - before
        for before, after in itertools.pairwise(times)
        if not any(before < start <= after for start in model.starts)
    ]
    longest = max(gaps, default=0.0)
    last = grew if model.last_seen is None or model.is_starting else model.last_seen
    if now - grew <= max(QUIET_S, NUM_GAPS * longest) and now - last <= DAY_S:
        return State("live")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(min(last, grew)))
    return State("silent", f"its log breaks off at {when} and says nothing of an end")


def run_state(models: list[ModelLog], now: float) -> State:
    """Of a run: live while any model is; else the worst end of a model. ``why`` names models that ended otherwise."""
    states = {model.label: model_state(model, now) for model in models}
    words = {state.word for state in states.values()}
    word = next(word for word in ("live", "failed", "silent", "stopped", "finished") if word in words)
    tell = [
        f"model {label} {'is' if state.word in ('live', 'silent') else 'has'} {state.word}"
        + (f": {state.why}" if state.why else "")
        for label, state in states.items()
        if state.word != word or state.why
    ]
    return State(word, "; ".join(tell))
