"""Owns reading what ``fairseq-train --log-format json`` wrote: figures by kind, and the size of the model.

It must never guess: a line that is not a record of figures is skipped, a log without any is an error.
"""

import dataclasses
import json
import re
from pathlib import Path

RECORD = re.compile(r"\| (train_inner|train|valid) \| (\{.*\})\s*$")
PARAMETERS = re.compile(r"num\. shared model params: [\d,]+ \(num\. trained: ([\d,]+)\)")

Record = dict[str, float]


def parse_line(line: str) -> tuple[str, Record] | None:
    """One line of the log.

    Returns:
        kind (``train_inner``: every ``--log-interval`` updates; ``train`` and ``valid``: every epoch) and its figures
        by name without the prefix of the kind, or None for any other line.
    """
    match = RECORD.search(line)
    if match is None:
        return None
    kind = match.group(1)
    try:
        raw = json.loads(match.group(2))
    except json.JSONDecodeError:
        return None
    record: Record = {}
    for key, value in raw.items():
        try:
            record[key.removeprefix(kind + "_")] = float(value)
        except (TypeError, ValueError):
            continue  # not a figure, for example a best checkpoint that does not exist yet
    return kind, record


@dataclasses.dataclass
class RunLog:
    """The figures of one model.

    Attributes:
        num_parameters: trained parameters.
        train_inner: records in the order of training, one every ``--log-interval`` updates.
        train: one record an epoch.
        valid: one record an epoch. ``nll_loss`` is in bits a target token.
    """

    num_parameters: int
    train_inner: list[Record] = dataclasses.field(default_factory=list)
    train: list[Record] = dataclasses.field(default_factory=list)
    valid: list[Record] = dataclasses.field(default_factory=list)

    def curve(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Updates and values of one figure; records without it are left out."""
        records = [record for record in getattr(self, kind) if key in record and "num_updates" in record]
        return [record["num_updates"] for record in records], [record[key] for record in records]

    @property
    def best_valid(self) -> Record:
        """The record with the lowest validation loss, which fairseq keeps as ``checkpoint_best.pt``."""
        return min(self.valid, key=lambda record: record["loss"])

    @property
    def megabits_per_update(self) -> float:
        """Megabits that a device of this model sent to its peers in an update, averaged over training; 0 alone."""
        weighted, total, before = 0.0, 0.0, 0.0
        for record in self.train:
            updates = record["num_updates"] - before
            before = record["num_updates"]
            weighted += updates * record.get("codistill_mbit", 0.0)
            total += updates
        return weighted / total if total else 0.0


def read_log(path: Path) -> RunLog:
    """Read one model's log.

    Raises:
        ValueError: the log names no number of parameters, or holds no finished epoch.
    """
    log = RunLog(num_parameters=0)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not log.num_parameters and (match := PARAMETERS.search(line)):
                log.num_parameters = int(match.group(1).replace(",", ""))
            parsed = parse_line(line)
            if parsed is not None:
                getattr(log, parsed[0]).append(parsed[1])
    if not log.num_parameters:
        raise ValueError(f"{path} does not say how many parameters the model has; is it the log of fairseq-train?")
    if not log.train or not log.valid:
        raise ValueError(f"{path} holds no finished epoch; train longer, and with --log-format json")
    return log
