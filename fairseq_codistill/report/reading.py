"""Owns reading a log file: the models whose lines it holds, each as a :class:`ModelLog`.

A line that is cut short or not understood is left out. It must never decide which run a file belongs to, nor change it.
"""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fairseq_codistill.report.model import NLL, TOP1, Ending, ModelLog, Record
from fairseq_codistill.report.runlog import (
    LABEL,
    PARAMETERS,
    parse_incident,
    parse_launch_failure,
    parse_launch_start,
    parse_line,
    parse_settings,
    parse_stop,
    parse_time,
)

ERROR = re.compile(r"^(?:[\w.]+\.)?(?:\w*(?:Error|Exception|Exit)|KeyboardInterrupt|[A-Z]\w+)(?::.*)?$")
USAGE = re.compile(r"^[\w./-]+: error: ")  # a wrong option ends it before its log begins
# Both lines of Coordinator.close: a process that dies of an error writes them behind the traceback.
FAREWELL = re.compile(r"codistillation: (?:closed |\d+ updates, \d+ exchanges, )")
FROM_NOTHING = re.compile(r"\| INFO \| fairseq\.trainer \| No existing checkpoint found ")
EXIT_CODE = re.compile(r"^(?:rank 0 )?exit code \d+$")
OWN_FILE = re.compile(r"^model-(\d+)\.log$")  # of codistill-launch: lines of its only rank have no label there
OWN_FOLDER = re.compile(r"(?:^|/)(\d+)/train\.log$")  # of a recipe: lines of the model, and the launcher's of it


def read_log(path: Path) -> dict[tuple[int | None, int], ModelLog]:
    """The models of a log file.

    Returns:
        logs by (model, rank), as the labels of the lines tell; the model is None for lines without a label, unless the
        launcher named the file after it.
    """
    with path.open(encoding="utf-8", errors="replace") as lines:
        named = OWN_FILE.match(path.name)
        own = int(named.group(1)) if named else None
        in_folder = OWN_FOLDER.search(path.absolute().as_posix())
        alone = int(in_folder.group(1)) if in_folder else own
        models = _read_vision(lines) if path.suffix == ".jsonl" else _read_text(lines, own, alone)
    for model in models.values():
        model.files = [path]
    return models


def _read_text(lines: Iterable[str], own: int | None, alone: int | None) -> dict[tuple[int | None, int], ModelLog]:
    """The models of a text.

    Args:
        own: the model of lines without a label, if it is known.
        alone: of which model alone the launcher would speak in this file, if its lines have no label.
    """
    readers: dict[tuple[int | None, int], _TextReader] = {}
    for line in lines:
        if failure := parse_launch_failure(line):
            model, ending, what = failure
            is_own = model == alone and (model, 0) not in readers
            reader = readers.setdefault((own if is_own else model, 0), _TextReader())
            reader.fail(ending, what)
        elif line.startswith("[launch]"):
            started = parse_launch_start(line)
            named = own if started == alone and (started, 0) not in readers else started
            for source in [source for source in readers if source[0] == named and started is not None]:
                readers[source].start()
        else:
            label = LABEL.match(line)
            source = (int(label.group(1)), int(label.group(2) or 0)) if label else (own, 0)
            readers.setdefault(source, _TextReader()).feed(line[label.end() :] if label else line)
    if len(readers) > 1 and (None, 0) in readers and not readers[None, 0].has_figures:
        shell = readers.pop((None, 0))  # what one said around the training
        if shell.was_told and (alone, 0) not in readers:
            readers[alone, 0] = shell  # or a launcher of a model that ended before its first line
    return {source: reader.done() for source, reader in readers.items()}


class _TextReader:
    """The lines of one rank of one model, in order."""

    def __init__(self) -> None:
        self.log = ModelLog(-1, NLL)
        self._inner: list[Record] = []
        self._epochs: list[tuple[int, Record]] = []
        self._in_traceback = False
        self._told: Ending | None = None  # by the launcher, of this start
        self._is_restart = False  # by the launcher, of one that failed
        self._num_before = 0  # incidents before this start

    @property
    def was_told(self) -> bool:
        """Whether a launcher said how it ended."""
        return self._told is not None

    @property
    def has_figures(self) -> bool:
        return bool(self._inner or self._epochs or self.log.valid)

    def feed(self, line: str) -> None:
        log = self.log
        if (stamp := parse_time(line)) is not None:
            log.started = stamp if log.started is None else log.started
            log.last_seen = stamp
            log.is_starting = self._in_traceback = False
            if log.ending and log.ending.state != "finished" and "| INFO |" in line and not FAREWELL.search(line):
                self.start(stamp)  # it goes on, or has been started again
        elif line.startswith("Traceback (most recent call last)"):
            self._in_traceback = True
            if log.ending is None:
                log.ending = Ending("failed", "an error without a message")
            return
        elif self._in_traceback:
            if ERROR.match(line.rstrip()) and log.ending is not None and log.ending.state != "finished":
                state = "stopped" if line.startswith("KeyboardInterrupt") else "failed"
                log.ending = Ending(state, line.strip())
            return
        elif log.ending is None and USAGE.match(line):  # else of who speaks of the end, such as srun
            log.ending = Ending("failed", line.strip())
        if (parsed := parse_line(line)) is not None:
            self._keep(parsed[0], parsed[1], stamp)
        elif (settings := parse_settings(line)) is not None:  # a start, the first one or another
            self.start(stamp)
            self._num_before = len(log.incidents)
            log.num_parameters = 0  # which comes after the settings, and before what it begins from
            log.settings = settings
            log.world_size = int(settings.get("distributed_world_size", 1))
        elif (incident := parse_incident(line)) is not None:
            log.incidents.append(incident)
            log.ending = parse_stop(line) or log.ending
        elif FROM_NOTHING.search(line):
            if not self._is_restart:  # or what it sent before counts as well
                log.begin_anew(self._num_before)
                self._inner.clear()
                self._epochs.clear()
        elif "| done training in " in line:
            log.ending = Ending("finished")
        elif not log.num_parameters and (match := PARAMETERS.search(line)):
            log.num_parameters = int(match.group(1).replace(",", ""))

    def start(self, stamp: float | None = None) -> None:
        """It trains, whatever was said before."""
        self.log.ending = self._told = None
        self.log.is_starting = stamp is None
        if stamp is not None:
            self.log.starts.append(stamp)

    def fail(self, ending: Ending | None, what: str) -> None:
        """The launcher says that the model failed, or was stopped; at the end of its run it does so again."""
        self._is_restart = ending is None
        own = self.log.ending
        is_known = own is not None and own.state == "failed" and ending is not None and EXIT_CODE.match(ending.why)
        if ending is not None and not what:  # a process ended: less than what was said of its model, if anything was
            if self._told is None and not is_known and not (own and own.state == "finished"):
                self.log.ending = ending
            return
        if ending is None or self._told != ending:
            self.log.incidents.append((self._last_stamp, "ERROR", what))
        self._told = ending
        if not is_known:  # an exit code says less than the error in the log
            self.log.ending = ending

    @property
    def _last_stamp(self) -> str:
        seen = self.log.last_seen
        return "" if seen is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen))

    def _keep(self, kind: str, record: Record, stamp: float | None) -> None:
        if "num_updates" not in record:
            return
        self._is_restart = False  # it trains: what begins from nothing after this is another training
        if stamp is not None:
            record["time"] = stamp
        if kind == "train":
            self._epochs.append((len(self._inner), record))
        else:
            {"train_inner": self._inner, "valid": self.log.valid}[kind].append(record)

    def done(self) -> ModelLog:
        """The finer of the two kinds of training records is the curve."""
        if self._inner:
            self.log.train, self.log.epochs = self._inner, self._epochs
        else:
            self.log.train = [record for _, record in self._epochs]
        return self.log


def _read_vision(lines: Iterable[str]) -> dict[tuple[int | None, int], ModelLog]:
    log = ModelLog(-1, TOP1)
    for line in lines:
        with contextlib.suppress(AttributeError, KeyError, OverflowError, TypeError, ValueError):
            _feed_vision(log, json.loads(line))
    return {(None, 0): log} if dataclasses.asdict(log) != dataclasses.asdict(ModelLog(-1, TOP1)) else {}


def _feed_vision(log: ModelLog, record: dict[str, Any]) -> None:
    kind, update = record["kind"], float(record["update"])
    if isinstance(record.get("time"), (int, float)):
        log.started = record["time"] if log.started is None else log.started
        log.last_seen = record["time"]
        if kind == "start":
            log.starts.append(record["time"])
    if kind == "start":
        if update == 0:
            log.begin_anew(len(log.incidents))
        _start_vision(log, record)
    elif kind in ("train", "valid"):
        figures = {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}
        getattr(log, kind).append(figures | {"num_updates": update})
    elif kind == "skip":
        log.skipped.append((update, float(record.get("skipped", 0))))
        log.incidents.append((f"update {update:.0f}", "INFO", f"skipped {record.get('skipped')} updates"))
    elif kind == "end":
        state, _, why = str(record.get("reason")).partition(": ")
        known = state in ("finished", "failed")  # else the name of a signal
        log.ending = Ending(state, why) if known else Ending("stopped", str(record.get("reason")))


def _start_vision(log: ModelLog, record: dict[str, Any]) -> None:
    log.ending = None
    log.num_parameters = int(record.get("parameters") or 0)
    log.settings = {name: str(value) for name, value in (record.get("options") or {}).items()}
    log.world_size = int(record.get("world_size") or 1)
    log.num_classes = int(record.get("classes") or 0)
