"""Owns which curves a report shows, and their points. Both the page and the figures draw these; nothing here draws."""

import dataclasses
import math

from fairseq_codistill.report.model import Record
from fairseq_codistill.report.runs import Run

MAX_POINTS = 1500  # of a curve; a long training logs more than a page should hold

Point = tuple[float, float | None, float]  # updates (or Mbit), time in seconds since the run's start, value


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: for the legend.
        number: of its colour.
        points: in the order of training.
        dash: 0 for a solid line, 1 and on for kinds of dashes.
    """

    label: str
    number: int
    points: list[Point]
    dash: int = 0


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        key: of what is shown, for names and tests.
        title: a few words.
        unit: of the values.
        curves: at least one.
        from_zero: whether the axis of values begins at 0.
        over: what the first number of a point is: ``updates``, or ``Mbit`` on a logarithmic axis.
    """

    key: str
    title: str
    unit: str
    curves: list[Curve]
    from_zero: bool = False
    over: str = "updates"


PANELS = (  # kind of record, key, title, unit
    ("train", "nll_loss", "Training, supervised loss", "per target token or image"),
    ("train", "codistill_mse", "Divergence from the peers", "codistill_mse"),
    ("train", "codistill_agreement", "Agreement with the peers", "share of equal predictions"),
    ("valid", "codistill_mse", "Divergence in validation", "codistill_mse"),
    ("valid", "codistill_agreement", "Agreement in validation", "share of equal predictions"),
    ("train", "codistill_peers", "Peers that taught", "mean over exchanges"),
    ("train", "codistill_wait_ms", "Wait for the peers", "ms an update"),
    ("train", "codistill_mbit", "Sent by a device", "Mbit an update"),
    ("train", "codistill_staleness", "Age of the copies", "updates"),
    ("train", "lr", "Learning rate", "lr"),
    ("train", "wps", "Throughput", "target tokens a second"),
    ("train", "images_per_s", "Throughput", "images a second"),
    ("train", "ups", "Updates a second", "1/s"),
)
FROM_ZERO = ("wps", "images_per_s", "ups", "lr")


def run_charts(run: Run) -> list[Chart]:
    """Those of one run, a curve a model: how well, how they differ, what it cost; without data there is none."""
    metric = run.models[0].metric
    unit = metric.label.removeprefix("validation ")
    start = min((model.started for model in run.models if model.started is not None), default=None)
    charts = []
    for kind, key, title, its_unit in (("valid", metric.key, "Validation", unit), *PANELS):
        curves = [
            Curve(f"model {model.label}", number, points)
            for number, model in enumerate(run.models)
            if (points := _points(getattr(model, kind), key, start))
        ]
        # Figures of an exchange that never was are all 0.
        if curves and (not key.startswith("codistill") or any(point[2] for curve in curves for point in curve.points)):
            from_zero = key.startswith("codistill") or key in FROM_ZERO
            charts.append(Chart(f"{kind}_{key.removeprefix('valid_')}", title, its_unit, curves, from_zero))
    return charts


def comparison_charts(runs: list[Run]) -> list[Chart]:
    """All runs together: their metric over updates, and over what a device had sent (those that sent anything)."""
    metric = runs[0].models[0].metric
    unit = metric.label.removeprefix("validation ")
    over_updates, over_bits = [], []
    for number, run in enumerate(runs):
        for model in run.models:
            label = run.name + (f", model {model.label}" if len(run.models) > 1 else "")
            points = _points(model.valid, metric.key, model.started)
            if points:
                over_updates.append(Curve(label, number, points, model.index))
            megabits = model.sent_megabits()
            sent = [(_at(megabits, update), time, value) for update, time, value in points]
            if any(point[0] for point in sent):
                over_bits.append(Curve(label, number, [point for point in sent if point[0]], model.index))
    charts = [Chart(f"all_{metric.key}", "All runs, validation", unit, over_updates)] if over_updates else []
    if over_bits:
        charts.append(Chart(f"all_{metric.key}_bits", "All runs, validation by bits", unit, over_bits, over="Mbit"))
    return charts


def _points(records: list[Record], key: str, start: float | None) -> list[Point]:
    points: list[Point] = []
    for record in records:
        if math.isfinite(record.get(key, math.nan)):
            time = record["time"] - start if start is not None and "time" in record else None
            points.append((record["num_updates"], time, record[key]))
    return _thinned(points)


def _thinned(points: list[Point]) -> list[Point]:
    """At most ``MAX_POINTS``: of each stretch the lowest and the highest, so that no spike is lost, and the last."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = -(-2 * len(points) // (MAX_POINTS - 2))
    kept: list[int] = []
    for first in range(0, len(points), stretch):
        numbers = range(first, min(first + stretch, len(points)))
        ends = {min(numbers, key=lambda i: points[i][2]), max(numbers, key=lambda i: points[i][2])}
        kept += sorted(ends)
    if kept[-1] != len(points) - 1:
        kept.append(len(points) - 1)
    return [points[i] for i in kept]


def _at(curve: tuple[list[float], list[float]], update: float) -> float:
    """The last value of a curve up to ``update``."""
    return [value for then, value in zip(*curve, strict=True) if then <= update][-1]
