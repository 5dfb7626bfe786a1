"""Owns ``codistill-report``: from the logs of runs, one self-contained HTML page, ``report.json``, and figures.

It must never change a log, nor make a page that fetches anything when it is opened.
"""

import argparse
import dataclasses
import datetime
import json
import math
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from fairseq_codistill import __version__
from fairseq_codistill.report import tables
from fairseq_codistill.report.charts import Chart, comparison_charts, run_charts
from fairseq_codistill.report.runs import find_runs
from fairseq_codistill.report.state import run_state
from fairseq_codistill.report.summary import Summary, markdown, summarise

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"  # the browser refuses to fetch


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        files: the page first, then ``report.json``, then figures.
        summaries: of all models, by run.
    """

    files: list[Path]
    summaries: list[Summary]


def write_report(folder: Path, out: Path, with_figures: bool = False, now: float | None = None) -> Report:
    """Write ``report.html`` and ``report.json``, and with figures the charts of each run as PNG.

    Args:
        folder: a run, a folder of runs, or one log.
        out: folder for the files; made if need be.
        with_figures: ``curves.png`` of one run; of several ``run_0.png`` and so on, and ``comparison_METRIC.png``.
        now: seconds since 1970 to judge by what is live; this moment if None.

    Raises:
        ValueError: ``folder`` holds no run.
    """
    now = time.time() if now is None else now
    runs = find_runs(folder)
    out.mkdir(parents=True, exist_ok=True)
    page, record = out / "report.html", out / "report.json"
    title = folder.resolve().name
    by_run = [summarise(run, now) for run in runs]
    charts: list[Chart] = []
    body, pictures = [], {}
    for metric in dict.fromkeys(run.models[0].metric for run in runs):
        alike = [number for number, run in enumerate(runs) if run.models[0].metric == metric]
        body.append(tables.results([summary for number in alike for summary in by_run[number]]))
        if len(alike) > 1:
            compared = comparison_charts([runs[number] for number in alike])
            pictures[f"comparison_{metric.key}.png"] = compared
            body.append(_placeholders(compared, charts, metric.key, "charts wide"))
    for number, run in enumerate(runs):
        drawn = run_charts(run)
        pictures["curves.png" if len(runs) == 1 else f"run_{number}.png"] = drawn
        body += [tables.heading(run, run_state(run.models, now), out)]
        body += [_placeholders(drawn, charts, f"run-{number}", "charts") if drawn else "<p>No figures yet.</p>"]
        body += [tables.incidents(run), tables.settings(run)]
    page.write_text(_document(title, now, "".join(body), charts), encoding="utf-8")
    summaries = [summary for of_run in by_run for summary in of_run]
    models = [summary.record() for summary in summaries]
    record.write_text(json.dumps({"made": _iso(now), "models": models}, indent=2) + "\n", encoding="utf-8")
    files = [page, record]
    if with_figures:
        from fairseq_codistill.report.figures import draw  # matplotlib is an extra

        for name, drawn in pictures.items():
            draw(drawn, out / name)
            files.append(out / name)
    return Report(files, summaries)


def _placeholders(drawn: list[Chart], charts: list[Chart], group: str, style: str) -> str:
    """Where the script will draw; ``charts`` gets what."""
    first = len(charts)
    charts += drawn
    figures = "".join(
        f'<figure data-chart="{number}" data-group="{group}" data-key="{chart.key}"><figcaption>'
        f"{tables.text(chart.title)}</figcaption></figure>"
        for number, chart in enumerate(drawn, start=first)
    )
    return f'<div class="{style}">{figures}</div>'


def _document(title: str, now: float, body: str, charts: list[Chart]) -> str:
    data = json.dumps([dataclasses.asdict(chart) for chart in charts], separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c")  # nothing in it ends the script
    made = datetime.datetime.fromtimestamp(now).astimezone()
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{tables.text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_asset('vendor', 'uPlot.min.css')}{_asset('assets', 'page.css')}</style>"
        f"<script>{_asset('assets', 'theme.js')}</script></head><body>"
        f"<h1>{tables.text(title)}</h1>"
        f'<header><span class="made">Made <time datetime="{made.isoformat(timespec="seconds")}">'
        f'{made:%Y-%m-%d %H:%M %Z}</time>, <span id="age"></span></span>'
        '<span class="choice">Over <button data-axis="updates">updates</button> <button data-axis="time">time</button>'
        '</span><button id="reset" title="also: double-click a chart">Reset zoom</button>'
        '<button id="theme">Dark</button></header>'
        "<noscript><p>The curves need JavaScript. codistill-report --figures writes them as PNG files.</p></noscript>"
        f'{body}<p class="quiet">Drag over a chart to zoom, all charts of its run with it; double-click to go back; '
        "click a name in a legend to hide its curve.</p>"
        f'<script type="application/json" id="curves">{data}</script><script>{_asset("vendor", "uPlot.iife.min.js")}'
        f"</script><script>{_asset('assets', 'page.js')}</script></body></html>\n"
    )


def _asset(folder: str, name: str) -> str:
    return (resources.files("fairseq_codistill.report") / folder / name).read_text(encoding="utf-8")


def _iso(now: float) -> str:
    return datetime.datetime.fromtimestamp(now).astimezone().isoformat(timespec="seconds")


def main(argv: Sequence[str] | None = None) -> None:
    """Console script ``codistill-report``. Exit code 1 below ``--min-bleu``."""
    parser = argparse.ArgumentParser(
        prog="codistill-report",
        description="One HTML page of a training, or of all trainings in a folder, from their logs: curves, divergence "
        "and agreement, bits, waits, throughput, BLEU, peers that came or went, settings. Training may still go on.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "folder", type=Path, help="where the logs are: of one run or of many, a folder or a file a model; or one log"
    )
    parser.add_argument("--out", type=Path, help="where to put report.html and report.json; default: FOLDER/report")
    parser.add_argument("--figures", action="store_true", help="write the curves as PNG files, too")
    parser.add_argument("--min-bleu", type=float, default=-math.inf, help="fail when a model's test BLEU is below this")
    options = parser.parse_args(argv)
    beside = options.folder.parent if options.folder.is_file() else options.folder
    try:
        report = write_report(options.folder, options.out or beside / "report", options.figures)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f'{error}; install the figures\' library with: pip install "fairseq-codistill[demo]"')
    for metric in dict.fromkeys(summary.log.metric for summary in report.summaries):
        print(markdown([summary for summary in report.summaries if summary.log.metric == metric]), end="\n\n")
    page, record, *figures = report.files
    print(f"page: {page}\nrecord: {record}", *(f"figure: {figure}" for figure in figures), sep="\n")
    weak = [one.log.label for one in report.summaries if one.bleu is not None and one.bleu < options.min_bleu]
    if weak:
        sys.exit(f"models below {options.min_bleu:g} BLEU: {', '.join(weak)}")


if __name__ == "__main__":
    main()
