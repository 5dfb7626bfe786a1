"""Owns finding the runs in a folder: which logs are there, of which model and which run each is.

It takes logs where they lie: ``0/train.log`` or ``large/log.jsonl`` (a folder a model), ``model-0.log`` (a file a
model), one file of labelled lines, or any file for itself. It must never change one.
"""

import contextlib
import dataclasses
import fnmatch
import itertools
import logging
import math
import os
import re
from pathlib import Path

from fairseq_codistill.report.model import Ending, ModelLog
from fairseq_codistill.report.reading import read_log
from fairseq_codistill.report.scores import find_scores

logger = logging.getLogger(__name__)
PATTERNS = ("log.jsonl", "*.log", "*.out")
LINK_DEPTH = 2  # a run, or a group of runs, may be a link; further down lie data sets
GENERIC = ("train", "log", "stdout", "output")  # names that say nothing of what they hold
NUMBERED = re.compile(r"^(?:model[-_ ]?)?(\d+)$")
NUMBERED_FILE = re.compile(r"^model[-_]?(\d+)(?:\.|$)")
RANKED_FILE = re.compile(r"\.(rank[-_]?)?(\d+)$")  # train.rank1.log, and Slurm's train.1.log


@dataclasses.dataclass
class Run:
    """Models that were trained together.

    Attributes:
        name: of the folder, relative to where the report was asked for.
        models: in the order of their indices.
    """

    name: str
    models: list[ModelLog]


@dataclasses.dataclass
class _Found:
    """One model of one file: whose it is. ``is_sure`` is off where another run in the same folder may look the same."""

    place: Path
    index: int
    rank: int
    is_sure: bool
    log: ModelLog

    @property
    def alone(self) -> Path:
        """Where it belongs if it is a run for itself."""
        file = self.log.files[0]
        return file.parent if file.stem in GENERIC else file.with_suffix("")

    @property
    def prefix(self) -> str:
        """Of what it says, where its model has several ranks."""
        return f"rank {self.rank}: " if self.rank else ""


class NoRunsError(ValueError):
    """A folder without a log of any training."""


def find_runs(folder: Path) -> list[Run]:
    """Every run in a folder: it is one itself, or holds some at any depth.

    Args:
        folder: or one file of labelled lines.

    Raises:
        NoRunsError: there is none.
    """
    files = _files(folder)
    found = [one for file in files for one in _readable(file, folder)]
    claims: dict[tuple[Path, int, int], set[Path]] = {}
    sure = {(one.place, one.index, one.rank) for one in found if one.is_sure}
    for one in found:  # several that say the same as a sure one are what one run said each time that it was started
        if not one.is_sure and (one.place, one.index, one.rank) not in sure:
            claims.setdefault((one.place, one.index, one.rank), set()).add(one.log.files[0])
    clashing = set().union(*(files for files in claims.values() if len(files) > 1))
    for one in found:
        if not one.is_sure and one.log.files[0] in clashing:
            one.log.name, one.place = "", one.alone
    runs = []
    for place in sorted({one.place for one in found}):
        models = _of_the_last_run(_models([one for one in found if one.place == place]))
        if any(_has_data(model) for model in models):
            for model in models:
                model.scores = find_scores(model, place, len(models) == 1)
            runs.append(Run(printable(str(place.relative_to(folder))) if place != folder else "", models))
    name = printable(folder.resolve().name)
    for run in runs:  # the folder itself, which has a folder of its name in it
        run.name = run.name or (name if all(other.name != name for other in runs) else ".")
    if not runs:
        if not folder.exists():
            raise NoRunsError(
                f"{folder} does not exist; give the --log-dir of codistill-launch or a --save-dir's parent"
            )
        if found:
            names = ", ".join(
                sorted({str(file.relative_to(folder)) if file != folder else file.name for file in files})[:4]
            )
            raise NoRunsError(
                f"{names} in {folder}: no figures of fairseq-train or codistill-vision in them; a loop of one's own, "
                "whose figures are its own to print, is not reported on"
            )
        raise NoRunsError(
            f"{folder} holds no log of fairseq-train (MODEL/train.log, model-0.log, any *.log) and no MODEL/log.jsonl "
            "of codistill-vision; give the --log-dir of codistill-launch, a --save-dir's parent, or a folder of those"
        )
    return runs


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    found: set[Path] = set()
    seen: set[tuple[int, int]] = set()
    tops, above = [folder], folder.resolve().parents
    while tops:  # links after what lies there, so that a run has its own name, and not that of a link to it
        for place, folders, names in os.walk(tops.pop(0)):
            with contextlib.suppress(OSError):  # it is gone by now
                status = os.stat(place)
                if (status.st_dev, status.st_ino) in seen:  # a link that leads back, or a second way to it
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
            if len(Path(place).relative_to(folder).parts) < LINK_DEPTH:
                links = [Path(place, name) for name in sorted(folders) if os.path.islink(os.path.join(place, name))]
                tops += [link for link in links if link.resolve() not in above]
            found |= {Path(place, name) for name in names if any(fnmatch.fnmatch(name, own) for own in PATTERNS)}
    return sorted(path for path in found if path.is_file())


def printable(name: str) -> str:
    """A name of the file system as text: bytes in it that are not UTF-8 as replacement characters."""
    return os.fsencode(name).decode("utf-8", "replace")


def _readable(file: Path, folder: Path) -> list[_Found]:
    """What a file holds; nothing where it cannot be read, but for one that was asked for: it may be somebody else's."""
    try:
        return _identify(file, folder)
    except OSError:
        if file == folder:
            raise
        logger.warning("%s cannot be read, and is left out", printable(str(file)))
        return []


def _identify(file: Path, folder: Path) -> list[_Found]:
    if file == folder:  # one file was asked for, and its name is the run's
        return [_Found(folder, label or 0, rank, True, log) for (label, rank), log in read_log(file).items()]
    own_folder = file.parent if file.parent == folder else file.parent.parent
    ranked, numbered_file = RANKED_FILE.search(file.stem), NUMBERED_FILE.match(file.stem)
    numbered = NUMBERED.match(file.parent.name)
    found, logs = [], read_log(file)
    labels = {label for label, _ in logs}
    for (label, labelled_rank), log in logs.items():
        # A bare number is that of a job, or part of a name, where there are figures, which only the first rank logs.
        is_ranked = ranked is not None and (ranked.group(1) is not None or not _has_figures(log))
        rank = labelled_rank or (int(ranked.group(2)) if ranked and is_ranked else 0)
        stem = RANKED_FILE.sub("", file.stem)
        if not is_ranked and stem not in GENERIC:
            stem = file.stem
        own = _own_index(log)
        if numbered_file:
            one = _Found(file.parent, int(numbered_file.group(1)), rank, True, log)
        elif numbered and labels <= {None, int(numbered.group(1))} and (stem in GENERIC or _has_data(log)):
            one = _Found(own_folder, int(numbered.group(1)), rank, True, log)
        elif label is not None:
            one = _Found(file.parent, label, rank, False, log)
        elif own is not None:
            log.name = printable(file.parent.name if stem in GENERIC else stem)
            one = _Found(own_folder if stem in GENERIC else file.parent, own, rank, False, log)
        elif _has_data(log):
            one = _Found(file.parent, 0, rank, True, log)
            one.place = one.alone
        else:
            continue  # of something else
        found.append(one)
    return found


def _own_index(log: ModelLog) -> int | None:
    """Which of several models it is, as its settings say; None for one alone."""
    try:
        several = int(log.settings.get("codistill_num_models", 1)) > 1
        return int(log.settings["codistill_model_index"]) if several else None
    except (KeyError, ValueError):
        return None


def _models(found: list[_Found]) -> list[ModelLog]:
    """One log a model: the fullest of it and those that it goes on in, with what other files and ranks add."""
    models = []
    for index in sorted({one.index for one in found}):
        best, *others = _joined(sorted((one for one in found if one.index == index), key=_worth, reverse=True))
        log = best.log
        log.index = index
        log.ending = _ending(best, others)
        seen = [one.log.last_seen for one in (best, *others) if one.log.last_seen is not None]
        log.last_seen = max(seen, default=None)
        for other in others:
            log.incidents += [(when, level, other.prefix + what) for when, level, what in other.log.incidents]
            log.files += other.log.files
            log.name = log.name or other.log.name
            log.settings = log.settings or other.log.settings
        log.incidents = sorted(dict.fromkeys(log.incidents), key=lambda incident: incident[0])
        log.files = list(dict.fromkeys(log.files))
        models.append(log)
    return models


def _of_the_last_run(models: list[ModelLog]) -> list[ModelLog]:
    """Without those whose index a run has not that was started in the same folder after they ended: it has fewer."""
    return [
        model
        for model in models
        if not any(
            model.index >= _num_models(other)
            and (model.last_seen or 0.0) < (other.starts[-1] if other.starts else other.started or 0.0)
            for other in models
        )
    ]


def _num_models(log: ModelLog) -> float:
    """Of its run, as its settings say; infinity where they do not."""
    try:
        return int(log.settings["codistill_num_models"])
    except (KeyError, ValueError):
        return math.inf


def _joined(found: list[_Found]) -> list[_Found]:
    """The files of a model, the best first, to which every file with figures that follows in time was added.

    Such as that of each submission of a job. Of files that overlap, which tell the same twice, the best is one's pick.
    """
    best = found[0]
    parts = [best]
    for one in found[1:]:
        if _has_figures(one.log) and all(
            _was_started_after(first, then) for first, then in itertools.pairwise(_by_start([*parts, one]))
        ):
            parts.append(one)
    first, *later = _by_start(parts)
    for part in later:
        first.log.go_on_with(part.log)
    return [first, *(one for one in found if one not in parts)]


def _by_start(parts: list[_Found]) -> list[_Found]:
    return sorted(parts, key=lambda part: part.log.started or 0.0)


def _ending(best: _Found, others: list[_Found]) -> Ending | None:
    """The ending of a model: of the fullest file that has one, unless the rank trained on, or was started, after it."""
    for one in (best, *others):
        if (ending := one.log.ending) is None or any(_was_started_after(one, other) for other in (best, *others)):
            continue
        if one is best:
            return ending
        if not _has_gone_on(best, one):
            return dataclasses.replace(ending, why=one.prefix + ending.why if ending.why else "")
    return None


def _was_started_after(one: _Found, other: _Found) -> bool:
    """Whether another file of the same rank, such as that of a job's next submission, begins after this one ends."""
    end, start = one.log.last_seen, other.log.started
    if other.rank != one.rank or end is None or start is None:
        return False
    if len({log.files[0].suffix == ".jsonl" for log in (one.log, other.log)}) > 1:
        return False  # of which only one has a time zone
    return end < start and (other.rank > 0 or _has_data(other.log))  # only the first rank logs figures


def _has_gone_on(best: _Found, other: _Found) -> bool:
    """Whether a rank trained on after another file of it, with its ending, was written last.

    By the stamps in its log, which are of an unknown zone, and by when that was written, which a copy changes.
    """
    if other.rank != best.rank or best.log.last_seen is None:
        return False
    ended = max(file.stat().st_mtime for file in other.log.files) + 1
    return ended < best.log.last_seen and ended < max(file.stat().st_mtime for file in best.log.files)


def _worth(one: _Found) -> tuple[bool, bool, int]:
    is_vision = one.log.files[0].suffix == ".jsonl"
    return one.rank == 0, is_vision, len(one.log.train) + len(one.log.valid)


def _has_figures(log: ModelLog) -> bool:
    return bool(log.train or log.valid)


def _has_data(log: ModelLog) -> bool:
    return bool(_has_figures(log) or log.settings or log.num_parameters)
