"""Owns the charts of a report as PNG files, for papers and READMEs. Matplotlib draws; nothing here reads a log."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend has to be chosen first

from fairseq_codistill.report.charts import Chart  # noqa: E402

# The first six are Okabe and Ito's, safe for colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a4fb3", "#7d7a00")
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT, DPI = 4.4, 3.2, 110


def draw(charts: list[Chart], path: Path) -> None:
    """All charts in one figure, up to four side by side; the legend is in the first."""
    columns = max(1, min(4, len(charts)))
    rows = max(1, -(-len(charts) // columns))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained", squeeze=False
    )
    for axis, chart in zip(axes.flat, charts, strict=False):
        for curve in chart.curves:
            updates, _, values = zip(*curve.points, strict=True)
            marker = {"marker": "o", "markersize": 3} if len(curve.points) < 40 else {}
            axis.plot(updates, values, label=curve.label, **_style(curve.number, curve.dash), **marker)
        if chart.over == "Mbit":
            axis.set_xscale("log")
        axis.set(title=chart.title, xlabel="updates" if chart.over == "updates" else "sent (Mbit)", ylabel=chart.unit)
        if chart.from_zero:
            highest = max(value for curve in chart.curves for _, _, value in curve.points)
            axis.set_ylim(0, 1.06 * highest if highest > 0 else 1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    if charts:
        axes.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _style(number: int, dash: int) -> dict[str, Any]:
    # Peers see the same divergence: the first curve is wide, and shows on both sides of the others.
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linewidth": 3.0 if number == 0 else 1.4,
        "linestyle": DASHES[(dash + number // len(COLOURS)) % len(DASHES)],
    }
