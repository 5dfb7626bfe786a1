"""Owns the page as one HTML document: what stands in it, in which order, and what makes it move.

The page that is written to a file and the one that is served while training goes on are this one. It must never fetch
anything but, where it is served, its own next state.
"""

import dataclasses
import datetime
import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from fairseq_codistill.report import tables
from fairseq_codistill.report.charts import Chart, comparison_charts, run_charts
from fairseq_codistill.report.runs import Run
from fairseq_codistill.report.standing import Standing, standing
from fairseq_codistill.report.summary import Summary, summarise

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"  # the browser refuses to fetch
LIVE_POLICY = f"{POLICY}; connect-src 'self'"


@dataclasses.dataclass(frozen=True)
class Content:
    """What a page shows of some runs at one moment.

    Attributes:
        title: of the page.
        made: seconds since 1970.
        body: HTML, with a place for each chart.
        charts: in the order of their places' numbers.
        pictures: file name -> charts, for those who want them as files.
        summaries: of all models, by run.
        standings: of all runs.
    """

    title: str
    made: float
    body: str
    charts: list[Chart]
    pictures: dict[str, list[Chart]]
    summaries: list[Summary]
    standings: list[Standing]

    def chart_data(self) -> list[dict[str, Any]]:
        """The charts for the page's script."""
        return [dataclasses.asdict(chart) for chart in self.charts]


def compose(title: str, runs: list[Run], now: float, link: Callable[[Path], str]) -> Content:
    """The content of a page of ``runs``, each of which has a model at least.

    Args:
        title: of the page.
        runs: none is a page that says so.
        now: seconds since 1970 to judge by what is live.
        link: a log's file -> where the page links to.
    """
    by_run = [summarise(run, now) for run in runs]
    charts: list[Chart] = []
    body: list[str] = []
    pictures: dict[str, list[Chart]] = {}
    for metric in dict.fromkeys(run.models[0].metric for run in runs):
        alike = [number for number, run in enumerate(runs) if run.models[0].metric == metric]
        body.append(tables.results([summary for number in alike for summary in by_run[number]]))
        if len(alike) > 1:
            compared = comparison_charts([runs[number] for number in alike])
            pictures[f"comparison_{metric.key}.png"] = compared
            body.append(_placeholders(compared, charts, metric.key, "charts wide"))
    standings = [standing(run, now) for run in runs]
    for number, (run, stands) in enumerate(zip(runs, standings, strict=True)):
        drawn = run_charts(run)
        pictures["curves.png" if len(runs) == 1 else f"run_{number}.png"] = drawn
        body += [tables.heading(run, stands.state, link), tables.side_by_side(stands), tables.last_warnings(stands)]
        body += [_placeholders(drawn, charts, f"run-{run.name}", "charts") if drawn else "<p>No figures yet.</p>"]
        body += [tables.incidents(run), tables.settings(run)]
    if not runs:
        body.append('<p class="empty">No log of a training is here yet.</p>')
    summaries = [summary for of_run in by_run for summary in of_run]
    return Content(title, now, "".join(body), charts, pictures, summaries, standings)


def _placeholders(drawn: list[Chart], charts: list[Chart], group: str, style: str) -> str:
    """Where the script will draw; ``charts`` gets what."""
    first = len(charts)
    charts += drawn
    figures = "".join(
        f'<figure data-chart="{number}" data-group="{tables.text(group)}" data-key="{chart.key}"><figcaption>'
        f"{tables.text(chart.title)}</figcaption></figure>"
        for number, chart in enumerate(drawn, start=first)
    )
    return f'<div class="{style}">{figures}</div>'


def document(content: Content, every_s: float | None = None) -> str:
    """The whole page.

    Args:
        content: what it shows.
        every_s: seconds between two questions for its next state, where it is served; None: it is a file.
    """
    data = json.dumps(content.chart_data(), separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")  # nothing in it ends the script
    made = datetime.datetime.fromtimestamp(content.made).astimezone()
    title = tables.text(content.title)
    is_live = every_s is not None
    link = f'<span id="link" data-every="{every_s:g}" role="status"></span>' if is_live else ""
    live = f"<script>{_asset('assets', 'live.js')}</script>" if is_live else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{LIVE_POLICY if is_live else POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_asset('vendor', 'uPlot.min.css')}{_asset('assets', 'page.css')}</style>"
        f"<script>{_asset('assets', 'theme.js')}</script></head><body>"
        f"<h1>{title}</h1>"
        f'<header><span class="made">{"Read" if is_live else "Made"} <time datetime="{iso(content.made)}">'
        f'{made:%Y-%m-%d %H:%M:%S %Z}</time>, <span id="age"></span></span>{link}'
        '<span class="choice">Over <button data-axis="updates">updates</button> <button data-axis="time">time</button>'
        '</span><button id="reset" title="also: double-click a chart">Reset zoom</button>'
        '<button id="theme">Dark</button></header>'
        "<noscript><p>The curves need JavaScript. codistill-report --figures writes them as PNG files.</p></noscript>"
        f'<main id="report">{content.body}</main><p class="quiet">Drag over a chart to zoom, all charts of its run '
        "with it; double-click to go back; click a name in a legend to hide its curve.</p>"
        f'<script type="application/json" id="curves">{data}</script><script>{_asset("vendor", "uPlot.iife.min.js")}'
        f"</script><script>{_asset('assets', 'page.js')}</script>{live}</body></html>\n"
    )


def finite(value: Any) -> Any:
    """What JSON can hold: a number that is none, or infinite, is None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def iso(moment: float) -> str:
    """Seconds since 1970 as local time with its zone."""
    return datetime.datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


def _asset(folder: str, name: str) -> str:
    return (resources.files("fairseq_codistill.report") / folder / name).read_text(encoding="utf-8")
