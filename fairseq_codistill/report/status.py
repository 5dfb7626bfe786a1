"""Owns ``codistill-status``: how runs stand, on a terminal, from their logs or from a ``codistill-report --serve``.

It must never change a file, nor ask a training process for anything.
"""

import argparse
import http.client
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_codistill import __version__
from fairseq_codistill.report.document import finite
from fairseq_codistill.report.snapshots import read, status_record

TIMEOUT_S = 10.0
COLOURS = {"live": 34, "finished": 32, "present": 32, "failed": 31, "away": 31, "stopped": 33, "silent": 33}
HEADER = ("model", "state", "updates", "updates/s", "train", "valid", "best", "agree", "wait", "sent", "peers")
UNITS = {"agree": "share of 1", "wait": "ms an update", "sent": "Mbit an update"}  # of what is shown
NUM_WARNINGS = 5
# Past any proxy of the environment: one that is set for the world outside knows nothing of this host or a cluster's.
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Status = dict[str, Any]


def fetch(address: str) -> Status:
    """What the server at ``address`` says.

    Args:
        address: ``HOST:PORT`` or ``http://HOST:PORT/`` of a ``codistill-report --serve``.

    Raises:
        ValueError: nothing of that kind answers there.
    """
    url = (address if "://" in address else f"http://{address}").rstrip("/") + "/status.json"
    try:
        with DIRECTLY.open(url, timeout=TIMEOUT_S) as answer:
            status = json.load(answer)
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ValueError(
            f"{address} does not answer as codistill-report --serve would: {why}; give the address that it prints, or "
            "the folder of a run"
        ) from error
    if not isinstance(status, dict) or "runs" not in status:
        raise ValueError(f"{address} is no codistill-report --serve; give the address that it prints")
    return status


def ask(place: str) -> Status:
    """How the runs stand at an address, or in a folder.

    Raises:
        ValueError: ``place`` is neither.
    """
    if Path(place).exists():
        return status_record(read(Path(place), every_s=1.0, now=time.time()).content)
    if "://" in place or (":" in place and place.rpartition(":")[2].rstrip("/").isdecimal()):
        return fetch(place)
    raise ValueError(f"{place} is no folder or log that is there, and no HOST:PORT of a codistill-report --serve")


def render(status: Status, in_colour: bool) -> str:
    """The text of a terminal: a line a model, and the last warnings of each run."""
    if not status["runs"]:
        return f"{status['title']}: no log of fairseq-train or codistill-vision is here (yet); others are not read"
    return "\n\n".join(_run(run, in_colour) for run in status["runs"])


def _run(run: Status, in_colour: bool) -> str:
    rows = [HEADER, *(_row(model) for model in run["models"])]
    kept = [column for column in range(len(HEADER)) if any(row[column] != "–" for row in rows[1:])]
    widths = {column: max(len(row[column]) for row in rows) for column in kept}
    lines = [f"{run['run']}  {_coloured(run['state'], in_colour)}" + (f"  {run['why']}" if run["why"] else "")]
    for row in rows:
        cells = []
        for column in kept:
            text = row[column]
            is_text = HEADER[column] in ("model", "state", "peers")
            padding = " " * (widths[column] - len(text))
            shown = _coloured(text, in_colour) if HEADER[column] in ("state", "peers") else text
            cells.append(shown + padding if is_text else padding + shown)
        lines.append("  " + "  ".join(cells).rstrip())
    lines += [f"  ({units})"] if (units := _units(run, {HEADER[column] for column in kept})) else []
    for warned in run["warnings"][:NUM_WARNINGS]:
        lines.append(f"  {warned['when']}  model {warned['model']}  {warned['what']}".rstrip())
    return "\n".join(lines)


def _units(run: Status, columns: set[str]) -> str:
    """Of the columns that are shown; that of the losses is the metric's of each model, as its log has it."""
    metrics = dict.fromkeys(model["metric"] for model in run["models"] if model.get("metric"))
    told = [f"valid, best: {' or '.join(metrics)}"] if metrics and columns & {"valid", "best"} else []
    return "; ".join(told + [f"{column}: {unit}" for column, unit in UNITS.items() if column in columns])


def _row(model: Status) -> tuple[str, ...]:
    name = f"{model['model']} ({model['name']})" if model["name"] else str(model["model"])
    figures = ("updates_per_s", "train_loss", "valid", "best", "agreement", "wait_ms", "sent_megabits_per_update")
    peers = ", ".join(f"{peer['model']} {peer['state']}" for peer in model["peers"]) or "–"
    return (name, model["state"], f"{model['num_updates']:,}", *(_figure(model[key]) for key in figures), peers)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _coloured(text: str, in_colour: bool) -> str:
    """Words of a state in their colours."""
    if not in_colour:
        return text
    return " ".join(
        f"\033[{COLOURS[bare]}m{word}\033[0m" if (bare := word.rstrip(",")) in COLOURS else word
        for word in text.split(" ")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``codistill-status``.

    Returns:
        0 where every run is live or finished, 1 where one failed, was stopped or fell silent, or none is there; 2 (by
        exit) for a place that is none.
    """
    parser = argparse.ArgumentParser(
        prog="codistill-status",
        description="How trainings stand: state, updates, losses, agreement, waits, bits, peers and the last warnings "
        "of each model. Exit code 0 where every run is live or finished, 1 where one is not or none is there.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "place", metavar="ADDRESS|RUN", help="HOST:PORT of a codistill-report --serve, or a folder of logs, or a log"
    )
    parser.add_argument("--watch", type=float, metavar="S", help="say it again every S seconds while a run is live")
    parser.add_argument("--json", action="store_true", help="as JSON, with all that is known")
    options = parser.parse_args(argv)
    if options.watch is not None and not options.watch >= 0.2:
        parser.error(f"--watch is {options.watch:g}; it must be 0.2 seconds or more")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a dash that the locale lacks is no failed run
    in_colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    has_answered = False
    while True:
        try:
            status = ask(options.place)
            has_answered = True
        except (OSError, ValueError) as error:
            if options.watch is None or not has_answered:
                parser.error(str(error))
            print(f"{error}; asked again in {options.watch:g} s", file=sys.stderr, flush=True)
            try:
                time.sleep(options.watch)
            except KeyboardInterrupt:
                return 130
            continue
        text = json.dumps(finite(status), indent=2, allow_nan=False) if options.json else render(status, in_colour)
        if options.watch is not None and sys.stdout.isatty():
            text = f"\033[H\033[2J{text}"
        try:
            print(text, flush=True)
        except BrokenPipeError:  # as of `| head`: who reads it has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so at its end
            options.watch = None
        states = {run["state"] for run in status["runs"]}
        if options.watch is None or (states and "live" not in states):
            return 0 if states and states <= {"live", "finished"} else 1
        try:
            time.sleep(options.watch)
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
