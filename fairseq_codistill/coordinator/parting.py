"""Owns in how many parts the models cut a batch at a position, and what each part is called: fixed, or agreed on.

With ``auto`` every model measures what waiting costs it, in windows that begin and end at the same positions, and says
so in its hellos. Model 0 decides (:mod:`~fairseq_codistill.coordinator.parts_choice`) and announces a schedule: so many
parts from a position on that lies ahead by more exchanges than two models can be apart. Whoever hears of a newer
schedule passes it on, and a model that comes back hears it when it is met. While model 0 is away nothing changes.
Of several ranks of a model the first does all that, and leaves what it follows in a note for the others, which
find it by the next position: a model is as fast as its slowest rank, so all of them cut or none.

Should two models differ nevertheless (an announcement that was lost), the keys of a whole batch and of the parts of two
and of four are all different. So neither waits for the other longer than to its next position, nothing is paired
wrongly, and what is lost are terms, until the schedule is told again at the end of the window.

It sends nothing itself, and decides nothing about a batch that is too small to cut.
"""

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

from fairseq_codistill.config import PARTS, CodistillationConfig
from fairseq_codistill.coordinator.parts_choice import PartsChoice
from fairseq_codistill.ranks import Notes

logger = logging.getLogger(__name__)

WINDOW = 40  # exchanges between two decisions
SETTLING = 6  # of them, at the start of a window, that are not measured: a schedule comes into force there
NOTICE = 3  # exchanges between an announcement and its coming into force
SLOTS = 1 + 2 + 4  # names of the whole batch, of two parts and of four
LARGEST = 2**40  # of a number that a peer may say


@dataclasses.dataclass(frozen=True)
class Schedule:
    """In how many parts from where on.

    Attributes:
        number: of schedules so far; a larger one replaces a smaller one.
        start: position, in updates' worth of batches.
        parts: from there on.
        before: up to there.
    """

    number: int = 0
    start: int = 0
    parts: int = 1
    before: int = 1

    @classmethod
    def parse(cls, content: Any) -> "Schedule | None":
        """What a peer says, as a list; None where it is none."""
        if not isinstance(content, list) or len(content) != 4 or not all(type(value) is int for value in content):
            return None
        found = cls(*content)
        is_sound = 0 <= found.number < LARGEST and 0 <= found.start < LARGEST
        return found if is_sound and {str(found.parts), str(found.before)} <= set(PARTS) else None


class Parting:
    """Of one rank: the first agrees with the first ranks of the other models, the others with the first.

    The gradient does not depend on it, so a rank that follows an update late costs terms and nothing else.

    Args:
        config: validated options.
        is_whole: no batch is ever cut, whatever the options say.
        why_whole: ``auto`` leaves this model at one part, and so all of them, where this is not empty.
        notes: between the ranks of this model; None where it has one, or where each has to decide for itself.
        clock: monotonic seconds.

    Attributes:
        splits: whether this model's loop cuts batches where it is told to; with ``auto`` none is cut before all do.
    """

    def __init__(
        self,
        config: CodistillationConfig,
        is_whole: bool = False,
        why_whole: str = "",
        notes: Notes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.splits = False
        self._interval, self._clock = config.codistill_interval, clock
        self._notes, self._leads = notes, notes is None or notes.leads
        self._model, self._num_models = config.codistill_model_index, config.codistill_num_models
        most = 1 if is_whole else config.most_parts
        self._is_auto = config.codistill_parts == "auto" and most > 1
        self._fixed = 1 if self._is_auto else most
        self._schedule = Schedule()
        self._choice = PartsChoice()
        self._at = (-1, 1)  # position that was asked for last, and the answer: it holds for all of that update
        self._arrived, self._since, self._waited_s = -1, 0.0, 0.0
        self._measured: list[tuple[float, float]] = []  # seconds between two exchanges, and of waiting in them
        self._report: tuple[int, float] = (-1, 0.0)  # position at which a window ended, and the share of waiting
        self._step_s = 0.0
        self._heard: dict[int, dict[str, Any]] = {}  # model -> what it said last

        self._can_split = not why_whole
        if why := config.why_whole:
            if config.codistill_parts != "1":
                logger.info("codistillation: batches stay in one part: %s", why)
        elif self._is_auto and why_whole:
            logger.info(
                "codistillation: batches stay in one part: %s; --codistill-parts 2 on all models cuts them even so",
                why_whole,
            )

    def offer(self) -> None:
        """This model's loop can cut its batches, and will where it is told to."""
        self.splits = self._can_split

    def slot(self, micro_batch: int, part: int, num_parts: int) -> int:
        """What takes the place of the micro-batch in the key of a part.

        Args:
            micro_batch: index inside the update.
            part: of the batch, from 0.
            num_parts: that the batch was cut in; 1 where it was too small.
        """
        if self._is_auto:
            return micro_batch * SLOTS + num_parts - 1 + part
        return micro_batch * self._fixed + part

    def at(self, elapsed: int) -> int:
        """In how many parts to cut the batches of a position: the same answer for all of an update."""
        if not self._is_auto:
            return self._fixed
        if elapsed != self._at[0]:
            self._read_notes()
            in_force = self._schedule.parts if elapsed >= self._schedule.start else self._schedule.before
            self._at = (elapsed, in_force if self.splits else 1)
        return self._at[1]

    def arrive(self, elapsed: int, present: Collection[int]) -> bool:
        """An exchange begins, before anything is posted for it.

        Args:
            elapsed: its position.
            present: models that are waited for.

        Returns:
            whether the peers should be told anew how things stand.
        """
        if not self._is_auto or elapsed == self._arrived:
            return False
        now = self._clock()
        if self._arrived >= 0:
            self._measured.append((now - self._since, self._waited_s))
        self._arrived, self._since, self._waited_s = elapsed, now, 0.0
        index = elapsed // self._interval % WINDOW
        if index == 0:
            return self._end_window(elapsed)
        if index == 1 and self._model == 0 and self._leads and self._report[0] == elapsed - self._interval:
            return self._decide(elapsed, present)
        if index == SETTLING:
            self._measured.clear()
        return False

    def waited(self, seconds: float) -> None:
        """For the peers, in the exchange at hand."""
        self._waited_s += seconds

    def status(self) -> dict[str, Any]:
        """What to tell the peers; JSON-serialisable."""
        if not self._is_auto:
            return {}
        schedule = list(dataclasses.astuple(self._schedule))
        return {"parts": {"splits": self.splits, "report": list(self._report), "schedule": schedule}}

    def hear(self, model: int, content: Any) -> bool:
        """What a peer says.

        Args:
            model: which one.
            content: of its hello, whatever it is.

        Returns:
            whether others should be told of it.
        """
        if not self._is_auto or not self._leads or not isinstance(content, dict):
            return False
        self._heard[model] = content
        schedule = Schedule.parse(content.get("schedule"))
        if schedule is None or schedule.number <= self._schedule.number:
            return False
        self._follow(schedule)
        return self._num_models > 2

    def _end_window(self, elapsed: int) -> bool:
        measured, self._measured = self._measured, []
        if len(measured) < WINDOW // 2:
            return False
        self._step_s, waited_s = (statistics.median(column) for column in zip(*measured, strict=True))
        self._report = (elapsed, waited_s / max(self._step_s, 1e-9))
        return True

    def _decide(self, elapsed: int, present: Collection[int]) -> bool:
        said = [self._heard.get(model, {}) for model in present]
        in_force, wanted = self.at(elapsed), 1
        if self.splits and all(content.get("splits") is True for content in said):
            ended, share = self._report
            shares = [share, *(found for content in said if (found := _share(content, ended)) is not None)]
            wanted = self._choice.next(in_force, min(shares), self._step_s)
        elif self._schedule.parts == 1:
            return False
        if wanted == self._schedule.parts:
            return False
        start = elapsed + NOTICE * self._interval
        self._follow(Schedule(self._schedule.number + 1, start, wanted, self._schedule.parts))
        return True

    def _read_notes(self) -> None:
        if self._notes is None or self._leads:
            return
        for content in self._notes.find():
            if schedule := Schedule.parse(json.loads(content)):
                self._follow(schedule)

    def _follow(self, schedule: Schedule) -> None:
        self._schedule = schedule
        if self._notes is not None and self._leads:
            self._notes.leave(json.dumps(dataclasses.astuple(schedule)))
        logger.info(
            "codistillation: batches are cut in %d parts from update %d on (%d before; waiting took %.1f %% here)",
            schedule.parts,
            schedule.start,
            schedule.before,
            100 * max(self._report[1], 0.0),
        )


def _share(content: dict[str, Any], ended: int) -> float | None:
    """Of waiting, as a peer measured it in the window that ended at a position."""
    report = content.get("report")
    if not isinstance(report, list) or len(report) != 2 or report[0] != ended:
        return None
    return float(report[1]) if isinstance(report[1], (int, float)) and report[1] >= 0 else None
