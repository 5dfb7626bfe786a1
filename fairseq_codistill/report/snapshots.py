"""Owns one reading of the logs of runs that go on, in every form that is served, and how often they are read.

However many ask, reading takes at most a tenth of the time. It must never change a file.
"""

import functools
import gzip
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from fairseq_codistill.report import openmetrics
from fairseq_codistill.report.document import Content, compose, document, finite, iso
from fairseq_codistill.report.runs import NoRunsError, find_runs, printable

READING_SHARE = 0.1  # of the time that reading may take: a reading of one second is not repeated for nine more


class Snapshot:
    """What is served until the next reading.

    Attributes:
        content: of the page.
        files: the logs, by the numbers that the page links to.
        version: of what the page shows; the same text for the same content.
    """

    def __init__(self, content: Content, files: list[Path], every_s: float):
        self.content, self.files, self._every_s = content, files, every_s
        shown = json.dumps([content.body, content.chart_data()], allow_nan=False)
        self.version = f'"{hashlib.sha256(shown.encode()).hexdigest()[:20]}"'

    @functools.cached_property
    def html(self) -> bytes:
        """The page."""
        return document(self.content, self._every_s).encode()

    @functools.cached_property
    def page(self) -> bytes:
        """What a page that is open needs to show this."""
        made = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.content.made))
        state = {"body": self.content.body, "charts": self.content.chart_data()}
        return json.dumps(state | {"made": iso(self.content.made), "made_text": made}, allow_nan=False).encode()

    @functools.cached_property
    def packed_page(self) -> bytes:
        """The same by gzip: eight models of a long run are megabytes."""
        return gzip.compress(self.page, compresslevel=5)

    @functools.cached_property
    def status(self) -> bytes:
        """For ``codistill-status`` and scripts."""
        return json.dumps(finite(status_record(self.content)), allow_nan=False).encode()

    @functools.cached_property
    def metrics(self) -> bytes:
        """For Prometheus."""
        return openmetrics.exposition(self.content.standings, self.content.made).encode()


def status_record(content: Content) -> dict[str, object]:
    """How the runs of a page stand, for JSON."""
    runs = [stands.record() for stands in content.standings]
    return {"title": content.title, "made": iso(content.made), "runs": runs}


def read(folder: Path, every_s: float, now: float) -> Snapshot:
    """Read all logs of a folder; one that is not there, or holds none yet, gives a page that says so."""
    try:
        runs = find_runs(folder) if folder.exists() else []
    except NoRunsError:
        runs = []
    files = list(dict.fromkeys(file for run in runs for model in run.models for file in model.files))
    links = {file: f"log/{number}" for number, file in enumerate(files)}
    return Snapshot(compose(printable(folder.resolve().name), runs, now, links.__getitem__), files, every_s)


class Reader:
    """Reads a folder no more often than is worth it; all who ask meanwhile get the same snapshot."""

    def __init__(self, folder: Path, every_s: float, clock: Callable[[], float] = time.time):
        self._folder, self._every_s, self._clock = folder, every_s, clock
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._next_at = 0.0  # monotonic

    def snapshot(self) -> Snapshot:
        """The state of the runs, as of now or of a moment ago."""
        with self._lock:
            began = monotonic()
            if self._snapshot is None or began >= self._next_at:
                self._snapshot = read(self._folder, self._every_s, self._clock())
                took = monotonic() - began
                self._next_at = began + max(self._every_s / 2, took / READING_SHARE)
            return self._snapshot
