"""Owns what a report knows of one model, whichever program wrote its log: settings, figures over updates, incidents.

It must never read a file, nor make up a figure that no log holds.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

Record = dict[str, float]


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
        """The best of them; a loss that is no number is none."""
        values = [value for value in values if math.isfinite(value)] or [math.nan]
        return max(values) if self.is_higher_better else min(values)


NLL = Metric("nll_loss", "validation NLL (bits per target token)", False)
TOP1 = Metric("valid_top1", "validation top-1 (%)", True)


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a training ended, as its log says.

    Attributes:
        state: ``finished``, ``failed`` or ``stopped`` (by a signal).
        why: the error or the signal; empty where there is nothing to say.
    """

    state: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Score:
    """BLEU of a checkpoint, as a recipe's scorer wrote it.

    Attributes:
        name: of the file: ``bleu`` for the best checkpoint, ``bleu_average`` for an average.
        bleu: detokenised sacreBLEU, in percent.
        signature: of sacreBLEU.
    """

    name: str
    bleu: float
    signature: str


@dataclasses.dataclass
class ModelLog:
    """One model of a run.

    Attributes:
        index: of the model in its run.
        metric: what it is compared by.
        name: of its folder, where that is more than the index.
        num_parameters: trained ones; 0 where the log does not say.
        num_classes: of its predictions; 0 where the log does not say.
        world_size: devices of this model.
        settings: options by name, as text.
        train: records with ``num_updates`` and, where lines are stamped, ``time`` (seconds since 1970), in the order
            of training.
        valid: likewise, of each evaluation.
        epochs: means over an epoch, each with the number of ``train`` records before it; empty where ``train`` is
            these.
        skipped: (position, updates before it that were left out) where ``num_updates`` counts positions in the data.
        incidents: (time, level, what) of peers that came or went and of anything else that was warned of.
        started: time of the first stamped line; None where none is.
        last_seen: time of the last one.
        starts: times at which it was started, or went on after an ending.
        is_starting: the last thing that is known of it is a start, which bore no time.
        is_new: it began from nothing, so that figures of a log before it are of another training.
        ending: how it ended; None while nothing says that it did.
        files: its logs.
        scores: BLEU, where it was scored.
    """

    index: int
    metric: Metric
    name: str = ""
    num_parameters: int = 0
    num_classes: int = 0
    world_size: int = 1
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    train: list[Record] = dataclasses.field(default_factory=list)
    valid: list[Record] = dataclasses.field(default_factory=list)
    epochs: list[tuple[int, Record]] = dataclasses.field(default_factory=list)
    skipped: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    incidents: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    started: float | None = None
    last_seen: float | None = None
    starts: list[float] = dataclasses.field(default_factory=list)
    is_starting: bool = False
    is_new: bool = False
    ending: Ending | None = None
    files: list[Path] = dataclasses.field(default_factory=list)
    scores: list[Score] = dataclasses.field(default_factory=list)

    @property
    def label(self) -> str:
        """``0``, or ``0 (large)`` where its folder has a name."""
        return f"{self.index} ({self.name})" if self.name else str(self.index)

    def begin_anew(self, num_incidents: int = 0) -> None:
        """What follows is another training, with the same name: the two are not to be taken together.

        Args:
            num_incidents: those before it.
        """
        for name in ("train", "valid", "epochs", "skipped"):
            getattr(self, name).clear()
        del self.incidents[:num_incidents]
        del self.starts[:-1]
        self.started = self.starts[0] if self.starts else None
        self.is_new = True

    def go_on_with(self, later: "ModelLog") -> None:
        """Add a log that begins after this one ends, as if the training had gone on writing to this one."""
        if later.is_new:
            self.begin_anew(len(self.incidents))
            self.starts, self.started = [], later.started
        self.epochs += [(len(self.train) + before, record) for before, record in later.epochs]
        for name in ("train", "valid", "skipped", "incidents", "starts", "files"):
            getattr(self, name).extend(getattr(later, name))
        self.num_parameters = later.num_parameters or self.num_parameters
        self.num_classes = later.num_classes or self.num_classes
        if later.settings:
            self.settings, self.world_size = later.settings, later.world_size
        self.last_seen, self.is_starting, self.ending = later.last_seen, later.is_starting, later.ending

    def curve(self, kind: str, key: str) -> tuple[list[float], list[float]]:
        """Updates and values of one figure of ``train`` or ``valid``; records without it are left out."""
        records = [record for record in getattr(self, kind) if key in record]
        return [record["num_updates"] for record in records], [record[key] for record in records]

    @property
    def num_updates(self) -> int:
        """Updates done; fewer than :attr:`furthest_update` after a restart from an earlier checkpoint."""
        latest = [records[-1] for records in (self.train, self.valid) if records]
        if all("time" in record for record in latest):
            return int(max(((r["time"], r["num_updates"]) for r in latest), default=(0, 0))[1])
        return int(max(r["num_updates"] for r in latest))

    @property
    def furthest_update(self) -> int:
        """The highest update of any record."""
        return int(max((r["num_updates"] for r in [*self.train, *self.valid]), default=0))

    def sent_megabits(self) -> tuple[list[float], list[float]]:
        """Updates, and what a device has sent to its peers until then, in Mbit.

        The mean over an epoch replaces what was added up in it: the last updates of an epoch are in no other record. A
        model that was restarted goes over some updates again; what it sends for them counts again. Records are rounded,
        so that such a mean may be the lower one: what was sent never decreases.
        """
        updates, sent = self._added_up(lambda record: record.get("codistill_mbit", 0.0))
        return updates, list(itertools.accumulate(sent, max))

    @property
    def sent_megabits_per_update(self) -> float:
        """Mean over the updates that were made, those that a restart made again among them."""
        made = self._added_up(lambda record: 1.0)[1][-1]
        return self.sent_megabits()[1][-1] / made if made else 0.0

    def _added_up(self, of_update: Callable[[Record], float]) -> tuple[list[float], list[float]]:
        """Updates, and the sum until then of what a record says of each of its updates."""
        updates, sums = [0.0], [0.0]
        epoch_start, epoch_total = 0.0, 0.0
        epochs = iter([*self.epochs, (len(self.train) + 1, {})])
        position, epoch = next(epochs)
        for number in range(len(self.train) + 1):
            while position == number:
                total = epoch_total + max(epoch["num_updates"] - epoch_start, 0.0) * of_update(epoch)
                epoch_start, epoch_total = epoch["num_updates"], total
                updates.append(epoch_start)
                sums.append(total)
                position, epoch = next(epochs)
            if number < len(self.train):
                now = self.train[number]["num_updates"]
                since = now - updates[-1]
                since -= sum(left_out for until, left_out in self.skipped if updates[-1] < until <= now)
                sums.append(sums[-1] + max(since, 0.0) * of_update(self.train[number]))
                updates.append(now)
                if now < updates[-2]:
                    epoch_start, epoch_total = now, sums[-1]
        return updates, sums

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
