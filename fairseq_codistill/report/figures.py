"""Owns the figures of a report: what is drawn, and how. Matplotlib draws; nothing here reads a file."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend has to be chosen first

from fairseq_codistill.report.runs import ModelLog, Run  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for colour blindness
WIDTH, HEIGHT, DPI = 4.4, 3.2, 110


def draw_run(run: Run, path: Path) -> None:
    """Panels of one run, a line a model: how well, how they differ, what it cost; panels without data are left out."""
    metric = run.models[0].metric
    panels: list[tuple[str, str, str, str]] = [  # kind, key, title, unit
        ("valid", metric.key, "Validation", metric.label.removeprefix("validation ")),
        ("train", "nll_loss", "Training, supervised loss", "per target token or image"),
        ("train", "codistill_mse", "Divergence from the peers", "codistill_mse"),
        ("train", "codistill_agreement", "Agreement with the peers", "share of equal predictions"),
        ("train", "codistill_peers", "Peers that taught", "mean over exchanges"),
        ("train", "codistill_wait_ms", "Wait for the peers", "ms an update"),
        ("train", "codistill_mbit", "Sent by a device", "Mbit an update"),
        ("train", "codistill_staleness", "Age of the copies", "updates"),
    ]
    drawn = [panel for panel in panels if any(_has_data(model, *panel[:2]) for model in run.models)]
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained", squeeze=False
    )
    for axis, (kind, key, title, unit) in zip(axes.flat, drawn, strict=False):
        for number, model in enumerate(run.models):
            axis.plot(*model.curve(kind, key), **_style(number), label=f"model {model.index}")
        axis.set(title=title, xlabel="updates", ylabel=unit)
        if key.startswith("codistill"):
            axis.set_ylim(bottom=0)
        _dress(axis)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    axes.flat[0].legend(frameon=False)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def draw_comparison(runs: list[Run], path: Path) -> None:
    """All runs in one figure: their metric over updates, and over what a device had sent (those that sent anything)."""
    metric = runs[0].models[0].metric
    figure, (over_updates, over_bits) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, run in enumerate(runs):
        for model in run.models:
            label = run.name if model is run.models[0] else None
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":", "-.")[model.index % 4]}
            updates, values = model.curve("valid", metric.key)
            over_updates.plot(updates, values, label=label, **style)
            sent = [_at(model.sent_megabits(), update) for update in updates]
            if any(sent):
                over_bits.plot(sent, values, label=label, **style)
    over_updates.set(xlabel="updates", ylabel=metric.label)
    over_bits.set(xlabel="sent by a device (Mbit)", xscale="log", ylabel=metric.label)
    for axis in (over_updates, over_bits):
        _dress(axis)
    over_updates.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _has_data(model: ModelLog, kind: str, key: str) -> bool:
    values = model.curve(kind, key)[1]
    return bool(values) and (not key.startswith("codistill") or any(values))


def _at(curve: tuple[list[float], list[float]], update: float) -> float:
    """The last value of a curve up to ``update``."""
    return [value for then, value in zip(*curve, strict=True) if then <= update][-1]


def _style(number: int) -> dict[str, Any]:
    # Peers see the same divergence: dashes let the first curve show through the others.
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linewidth": 2.2 if number == 0 else 1.4,
        "linestyle": "-" if number == 0 else (number, (4, 3)),
    }


def _dress(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
