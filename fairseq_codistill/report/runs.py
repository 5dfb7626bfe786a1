"""Owns what a report knows of a run, whichever program wrote its logs: settings, figures over updates, incidents.

Reads ``RUN/<model>/train.log`` (fairseq-train with ``--log-format json``) and ``RUN/<model>/log.jsonl``
(codistill-vision). It imports neither fairseq nor torch, and never changes a file.
"""

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from fairseq_codistill.report.runlog import PARAMETERS, Record, parse_line

FILES = ("log.jsonl", "train.log")
# "2026-01-31 12:00:00 | WARNING | name | codistillation: model 1 is away (was present): ..."
INCIDENT = re.compile(r"^(\S+ \S+?)(?:,\d+)? \| (\w+) \| [\w.]+ \| codistillation: (.*)")
STATE_CHANGE = re.compile(r"model \d+ is \w+ \(was \w+\)")
SETTINGS_LINE = re.compile(r"\| fairseq_cli\.train \| (\{'_name': None.*\})\s*$")


@dataclasses.dataclass(frozen=True)
class Metric:
    """What models are compared by.

    Attributes:
        key: of the validation records.
        label: with its unit.
        is_higher_better: else lower values are.
    """

    key: str
    label: str
    is_higher_better: bool

    def best(self, values: list[float]) -> float:
        """The best of them."""
        return max(values) if self.is_higher_better else min(values)


NLL = Metric("nll_loss", "validation NLL (bits per target token)", False)
TOP1 = Metric("valid_top1", "validation top-1 (%)", True)


@dataclasses.dataclass
class ModelLog:
    """One model of a run.

    Attributes:
        index: of the model in its run.
        metric: what it is compared by.
        num_parameters: trained ones; 0 where the log does not say.
        num_classes: of its predictions; 0 where the log does not say.
        world_size: devices of this model.
        settings: options by name, as text.
        train: records with ``num_updates``, in the order of training.
        valid: likewise, of each evaluation.
        incidents: (time, level, what) of peers that came or went and of anything else that was warned of.
    """

    index: int
    metric: Metric
    num_parameters: int = 0
    num_classes: int = 0
    world_size: int = 1
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    train: list[Record] = dataclasses.field(default_factory=list)
    valid: list[Record] = dataclasses.field(default_factory=list)
    incidents: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def curve(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Updates and values of one figure of ``train`` or ``valid``; records without it are left out."""
        records = [record for record in getattr(self, kind) if key in record]
        return [record["num_updates"] for record in records], [record[key] for record in records]

    @property
    def num_updates(self) -> int:
        """Updates done."""
        return int(max((r["num_updates"] for r in [*self.train, *self.valid]), default=0))

    def sent_megabits(self) -> tuple[list[float], list[float]]:
        """Updates, and what a device has sent to its peers until then, in Mbit."""
        updates, sent, before, total = [0.0], [0.0], 0.0, 0.0
        for record in self.train:
            # A model that was restarted goes over some updates again; what it sends for them counts again.
            since = record["num_updates"] - before
            total += max(since, 0.0) * record.get("codistill_mbit", 0.0)
            before = record["num_updates"]
            updates.append(before)
            sent.append(total)
        return updates, sent

    def best(self) -> float | None:
        """Best value of the metric; None before the first evaluation."""
        values = self.curve("valid", self.metric.key)[1]
        return self.metric.best(values) if values else None

    def last(self, kind: str, key: str) -> float | None:
        """The last value of a figure; None where there is none."""
        values = self.curve(kind, key)[1]
        return values[-1] if values else None

    @property
    def last_agreement(self) -> float | None:
        """The last one of an exchange that can tell: a codec that samples cannot, nor a model without peers."""
        return next((value for value in reversed(self.curve("train", "codistill_agreement")[1]) if value), None)


@dataclasses.dataclass
class Run:
    """Models that were trained together.

    Attributes:
        name: of the folder, relative to where the report was asked for.
        models: in the order of their indices.
    """

    name: str
    models: list[ModelLog]


def find_runs(folder: Path) -> list[Run]:
    """Every run in a folder: it is one itself, or holds some at any depth.

    Raises:
        ValueError: there is none.
    """
    found: dict[Path, dict[int, Path]] = {}
    for name in FILES:
        for path in sorted(folder.rglob(name)):
            if path.parent.name.isdecimal():
                found.setdefault(path.parent.parent, {}).setdefault(int(path.parent.name), path)
    runs = []
    for place, logs in sorted(found.items()):
        models = [read_model(index, path) for index, path in sorted(logs.items())]
        models = [model for model in models if model.train or model.valid]
        if models:
            runs.append(Run(str(place.relative_to(folder)) if place != folder else folder.resolve().name, models))
    if not runs:
        raise ValueError(
            f"{folder} holds no MODEL/train.log (of fairseq-train --log-format json) and no MODEL/log.jsonl (of "
            "codistill-vision) with figures in it; give a --save-dir's parent, or a folder of those"
        )
    return runs


def read_model(index: int, path: Path) -> ModelLog:
    """One model's log. A line that was cut short is left out."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        return _read_vision(index, lines) if path.suffix == ".jsonl" else _read_fairseq(index, lines)


def _read_fairseq(index: int, lines: Any) -> ModelLog:
    log = ModelLog(index, NLL)
    inner: list[Record] = []
    for line in lines:
        if not log.num_parameters and (match := PARAMETERS.search(line)):
            log.num_parameters = int(match.group(1).replace(",", ""))
        elif not log.settings and (match := SETTINGS_LINE.search(line)):
            log.settings = _flat_settings(match.group(1))
            log.world_size = int(log.settings.get("distributed_world_size", 1))
        elif match := INCIDENT.match(line):
            _note_incident(log, *match.groups())
        elif (parsed := parse_line(line)) is not None and "num_updates" in parsed[1]:
            {"train_inner": inner, "train": log.train, "valid": log.valid}[parsed[0]].append(parsed[1])
    log.train = inner or log.train  # the finer of the two
    return log


def _read_vision(index: int, lines: Any) -> ModelLog:
    log = ModelLog(index, TOP1)
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        kind = record.get("kind")
        if kind == "start":
            log.num_parameters = int(record.get("parameters", 0))
            log.settings = {name: str(value) for name, value in record.get("options", {}).items()}
            log.world_size = int(record.get("world_size", 1))
            log.num_classes = int(record.get("classes", 0))
        elif kind in ("train", "valid"):
            figures = {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}
            getattr(log, kind).append(figures | {"num_updates": float(record["update"])})
        elif kind in ("skip", "end"):
            what = f"skipped {record['skipped']} updates" if kind == "skip" else f"ended: {record.get('reason')}"
            log.incidents.append((f"update {record['update']}", "INFO", what))
    return log


def _note_incident(log: ModelLog, when: str, level: str, what: str) -> None:
    if level != "INFO" or STATE_CHANGE.search(what) or "skipped" in what:
        log.incidents.append((when, level, what))


def _flat_settings(text: str) -> dict[str, str]:
    """fairseq's printed configuration, without the groups that its options are in."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return {}
    flat: dict[str, str] = {}
    groups = tree.values if isinstance(tree, ast.Dict) else []
    for group in groups:
        if isinstance(group, ast.Dict):
            flat.update(
                (str(_value(name)), str(_value(value))) for name, value in zip(group.keys, group.values, strict=True)
            )
        elif isinstance(group, ast.Call):  # Namespace(...): those of the model, the task and the criterion
            flat.update((str(keyword.arg), str(_value(keyword.value))) for keyword in group.keywords)
    return {name: value for name, value in sorted(flat.items()) if not name.startswith("_")}


def _value(node: ast.expr | None) -> object:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
