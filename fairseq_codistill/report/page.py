"""Owns ``codistill-report``: from the logs of runs, one self-contained HTML page, ``report.json``, and figures.

With ``--serve`` :mod:`~fairseq_codistill.report.live` shows the same page instead. It must never change a log, nor make
a page that fetches anything when it is opened.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fairseq_codistill import __version__
from fairseq_codistill.report import tables
from fairseq_codistill.report.document import compose, document, finite, iso
from fairseq_codistill.report.live import DEFAULT_PORT, EVERY_S, serve
from fairseq_codistill.report.runs import find_runs, printable
from fairseq_codistill.report.summary import Summary, markdown


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
    content = compose(printable(folder.resolve().name), runs, now, lambda file: tables.relative(file, out))
    page, record = out / "report.html", out / "report.json"
    page.write_text(document(content), encoding="utf-8")
    models = [summary.record() for summary in content.summaries]
    content_of_record = finite({"made": iso(now), "models": models})
    record.write_text(json.dumps(content_of_record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    files = [page, record]
    if with_figures:
        from fairseq_codistill.report.figures import draw  # matplotlib is an extra

        for name, drawn in content.pictures.items():
            draw(drawn, out / name)
            files.append(out / name)
    return Report(files, content.summaries)


def _tell(report: Report) -> None:
    """The table, and where the files are, on standard output."""
    for metric in dict.fromkeys(summary.log.metric for summary in report.summaries):
        print(markdown([summary for summary in report.summaries if summary.log.metric == metric]), end="\n\n")
    page, record, *figures = report.files
    print(f"page: {page}\nrecord: {record}", *(f"figure: {figure}" for figure in figures), sep="\n")


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
    live = parser.add_argument_group("while training goes on")
    live.add_argument("--serve", action="store_true", help="show the page to browsers instead, and keep it up to date")
    live.add_argument("--port", type=int, default=DEFAULT_PORT, help="where; 0 picks a free one; %(default)s")
    live.add_argument(
        "--host", default="127.0.0.1", help="name or address to listen on; %(default)s: this machine alone"
    )
    live.add_argument("--every", type=float, default=EVERY_S, metavar="S", help="seconds between looks; %(default)g")
    options = parser.parse_args(argv)
    if options.serve:
        if options.out or options.figures or options.min_bleu > -math.inf:
            parser.error("--serve writes no files: leave out --out, --figures and --min-bleu")
        try:
            serve(options.folder, options.host, options.port, options.every)
        except ValueError as error:
            parser.error(str(error))
        return
    beside = options.folder.parent if options.folder.is_file() else options.folder
    try:
        report = write_report(options.folder, options.out or beside / "report", options.figures)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f'{error}; install the figures\' library with: pip install "fairseq-codistill[demo]"')
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the files are whole, whatever the locale cannot show
    try:
        _tell(report)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: who reads it has seen enough, and the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so at its end
    weak = [one.log.label for one in report.summaries if one.bleu is not None and one.bleu < options.min_bleu]
    if weak:
        sys.exit(f"models below {options.min_bleu:g} BLEU: {', '.join(weak)}")


if __name__ == "__main__":
    main()
