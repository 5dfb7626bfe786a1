"""Owns how a run stands at this moment: each model's last figures, what it says of its peers, and the last warnings.

The page, the terminal and ``/metrics`` show what is here. It reads no file and asks no process: it goes by the logs.
"""

import dataclasses
import math
import re
import time
from typing import Any

from fairseq_codistill.report.model import ModelLog
from fairseq_codistill.report.runs import Run
from fairseq_codistill.report.state import State, model_state, run_state

MAX_WARNINGS = 8
PEER_STATES = ("present", "finished", "expected", "away")  # of several ranks' views the one furthest right is shown
STATE_CHANGE = re.compile(r"^(?:rank (\d+): )?model (\d+) is (\w+) \(was \w+\)(?:: (.*))?$")
THROUGHPUT = (("wps", "tokens/s"), ("images_per_s", "images/s"))


@dataclasses.dataclass(frozen=True)
class PeerView:
    """What one model says of another.

    Attributes:
        model: the other.
        state: one of ``PEER_STATES``.
        why: in the words of the log; empty where nothing was said.
        when: stamp of the line; empty where nothing was said.
    """

    model: int
    state: str
    why: str = ""
    when: str = ""


@dataclasses.dataclass(frozen=True)
class Warned:
    """A line of a log that a person should see: of which model, when, how grave, what."""

    model: str
    when: str
    level: str
    what: str


@dataclasses.dataclass(frozen=True)
class ModelStanding:
    """One model. Figures are the last that its log holds; None where it holds none.

    Attributes:
        log: all that is known of it.
        state: live, finished, failed, stopped or silent.
        epoch: in which it is.
        updates_per_s: of the whole model.
        throughput: of the whole model, a second, and its unit.
        train_loss: supervised, per target token or image, in the unit of the log.
        valid: last validation by the metric of the model; ``best`` likewise.
        agreement: share of equal predictions; None of codecs that cannot tell.
        divergence: from the peers.
        weight: α.
        wait_ms: for the peers, an update.
        sent_megabits_per_update: by a device, in the last stretch that was logged.
        sent_megabits: by a device since training began.
        num_peers: that taught, on average over the exchanges of that stretch.
        peers: what it says of the others.
    """

    log: ModelLog
    state: State
    epoch: float | None
    updates_per_s: float | None
    throughput: tuple[float, str] | None
    train_loss: float | None
    valid: float | None
    best: float | None
    agreement: float | None
    divergence: float | None
    weight: float | None
    wait_ms: float | None
    sent_megabits_per_update: float | None
    sent_megabits: float
    num_peers: float | None
    peers: list[PeerView]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "log"}
        flat |= {"state": self.state.word, "why": self.state.why, "model": self.log.index, "name": self.log.name}
        flat |= {"num_updates": self.log.num_updates, "metric": self.log.metric.label}
        flat["peers"] = [dataclasses.asdict(peer) for peer in self.peers]
        # A loss that is no number is no number in JSON either.
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in flat.items()
        }


@dataclasses.dataclass(frozen=True)
class Standing:
    """A run: its state, its models side by side, and its last warnings, the newest first."""

    run: Run
    state: State
    models: list[ModelStanding]
    warnings: list[Warned]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run.name,
            "state": self.state.word,
            "why": self.state.why,
            "models": [model.record() for model in self.models],
            "warnings": [dataclasses.asdict(warning) for warning in self.warnings],
        }


def standing(run: Run, now: float) -> Standing:
    """How ``run`` stands at ``now`` (seconds since 1970)."""
    warned = [
        Warned(model.label, when or _stamp(model.last_seen), level, what)  # the launcher's lines have no stamp
        for model in run.models
        for when, level, what in model.incidents
        if level != "INFO"
    ]
    warned.sort(key=lambda one: one.when, reverse=True)
    models = [_model_standing(model, len(run.models), now) for model in run.models]
    return Standing(run, run_state(run.models, now), models, warned[:MAX_WARNINGS])


def _stamp(moment: float | None) -> str:
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _model_standing(log: ModelLog, num_found: int, now: float) -> ModelStanding:
    exchanged = any(log.curve("train", "codistill_peers")[1])  # without exchanges these figures are all 0

    def of_exchange(key: str) -> float | None:
        return log.last("train", key) if exchanged else None

    fast = ((log.last("train", key), unit) for key, unit in THROUGHPUT)
    return ModelStanding(
        log=log,
        state=model_state(log, now),
        epoch=log.last("train", "epoch"),
        updates_per_s=log.last("train", "ups"),
        throughput=next(((value, unit) for value, unit in fast if value is not None), None),
        train_loss=log.last("train", "nll_loss"),
        valid=log.last("valid", log.metric.key),
        best=log.best(),
        agreement=log.last_agreement,
        divergence=of_exchange("codistill_mse"),
        weight=of_exchange("codistill_weight"),
        wait_ms=of_exchange("codistill_wait_ms"),
        sent_megabits_per_update=of_exchange("codistill_mbit"),
        sent_megabits=log.sent_megabits()[1][-1],
        num_peers=of_exchange("codistill_peers"),
        peers=peer_views(log, num_found),
    )


def peer_views(log: ModelLog, num_found: int) -> list[PeerView]:
    """What a model last said of each of the others; of several ranks the gravest.

    Args:
        log: of the model, with what its other ranks say.
        num_found: models of the run, where the settings name no number.
    """
    views: dict[tuple[int, int], PeerView] = {}
    for when, _, what in log.incidents:
        if (match := STATE_CHANGE.match(what)) is not None and match.group(3) in PEER_STATES:
            rank, model = int(match.group(1) or 0), int(match.group(2))
            why = (f"rank {rank}: " if rank else "") + (match.group(4) or "")
            views[rank, model] = PeerView(model, match.group(3), why, when)
    try:
        num_models = int(log.settings.get("codistill_num_models", num_found))
    except ValueError:
        num_models = num_found
    found = []
    for model in sorted({*range(num_models), *(model for _, model in views)} - {log.index}):
        of_ranks = [view for (_, other), view in views.items() if other == model]
        found.append(max(of_ranks, key=lambda view: PEER_STATES.index(view.state), default=PeerView(model, "expected")))
    # A run that never spoke of peers, or a model that trains alone, has none to show.
    return found if views or "codistill_num_models" in log.settings else []
