"""Owns which run of the test of the claim comes next: the grid, the choice from it, whether a gap counts.

Pure functions from finished rows to the next run: a campaign that was killed goes on where it stopped, and nothing is
chosen by hand in between. What there is to run is in ``settings.py``.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from typing import Any

from settings import (
    ARMS,
    BASELINES,
    BEYOND,
    FOUR,
    LEAST_ERRORS,
    METRICS,
    ORDERS,
    REMEDIES,
    SETTINGS,
    TUNING_SEED,
    Setting,
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: one process, or several that teach each other or share a model."""

    setting: str
    stage: str  # "tune" or "final"
    arm: str
    seed: int
    init: int  # 0, or 1 for one model that begins where the second of a pair does
    lr: float
    regularisation: str
    alpha: float = 0.0

    @property
    def name(self) -> str:
        """The folder of the run."""
        alpha = f"_alpha{self.alpha:g}" if self.alpha else ""
        return (
            f"{self.setting}/{self.stage}/{self.arm}/lr{self.lr:g}_{self.regularisation}{alpha}/{self.seed}_{self.init}"
        )

    @property
    def num_models(self) -> int:
        """That teach each other."""
        return ARMS[self.arm].models

    def first_seed(self) -> int:
        """Seed of the first model's initialisation, as in ``recipes/common.sh``."""
        return 100 * (self.seed - 1) + 1 + self.init


def run_of(row: Row) -> Run:
    """The run that a row is of."""
    return Run(*(row[name] for name in Run.__dataclass_fields__))


def goodness(row: Row, metric: str, part: str) -> float:
    """Larger is better; training that diverged is worst.

    Args:
        row: of a finished run.
        metric: one of METRICS.
        part: ``held_out`` or ``test``.
    """
    value = row[part][metric]
    if value is None or not math.isfinite(value):
        return -math.inf
    return float(METRICS[metric].sign * value)


def choice(rows: list[Row], setting: str, arm: str, metric: str) -> Run | None:
    """The best run of an arm on the held-out images; None where nothing was tuned.

    Of two that are equally good by the metric it is the one that is better by the setting's other one.
    """
    tuned = [row for row in rows if (row["setting"], row["stage"], row["arm"]) == (setting, "tune", arm)]
    return run_of(max(tuned, key=lambda row: quality(row, metric))) if tuned else None


def quality(row: Row, metric: str) -> tuple[float, ...]:
    """By which runs of the tuning are chosen: the metric on held-out data, then the setting's other one.

    The first is rounded: of two models the mean 73.11 is no better than 73.11 of others.
    """
    others = [other for other in SETTINGS[row["setting"]].metrics if other != metric]
    return (round(goodness(row, metric, "held_out"), 9), *(goodness(row, other, "held_out") for other in others))


def gap(rows: list[Row], setting: str, metric: str) -> tuple[float, float]:
    """How far one model alone is behind all_reduce on the test images, and the standard error of that, over seeds."""
    spreads = []
    for arm in ("all_reduce", "plain"):
        values = final_values(rows, setting, arm, metric)
        finite = len(values) > 1 and all(map(math.isfinite, values))
        variance = statistics.variance(values) if finite else math.nan
        spreads.append((statistics.fmean(values), variance / len(values)))
    (large, large_error), (alone, alone_error) = spreads
    return large - alone, math.sqrt(large_error + alone_error)


def final_rows(rows: list[Row], setting: str, arm: str, metric: str) -> list[Row]:
    """The final runs of an arm with the settings chosen for this metric; none where nothing was tuned."""
    best = choice(rows, setting, arm, metric)
    if best is None:
        return []
    return [
        row
        for row in rows
        if (row["setting"], row["stage"], row["arm"]) == (setting, "final", arm) and same_point(run_of(row), best)
    ]


def final_values(rows: list[Row], setting: str, arm: str, metric: str) -> list[float]:
    """:func:`goodness` on the test images of :func:`final_rows`, a value each seed.

    Of one model alone a seed has two runs, with one order of the data: as with the two models of a pair, their mean is
    its value.
    """
    return by_seed([(row, goodness(row, metric, "test")) for row in final_rows(rows, setting, arm, metric)])


def by_seed(values: list[tuple[Row, float]]) -> list[float]:
    """The mean of every seed, in the order of the seeds."""
    seeds = sorted({row["seed"] for row, _ in values})
    return [statistics.fmean(value for row, value in values if row["seed"] == seed) for seed in seeds]


def counts(rows: list[Row], setting: str, metric: str) -> bool:
    """Whether there is a gap to close: large enough, and larger than its error."""
    size, error = gap(rows, setting, metric)
    return size >= METRICS[metric].least_gap and size >= LEAST_ERRORS * error


def pending(rows: list[Row], order: str = "claim") -> Iterator[Run]:
    """The runs that are missing, in order, as far as the rows decide them. Take the first, run it, and ask again."""
    done = {run_of(row) for row in rows}
    for name, part in ORDERS[order]:
        setting = SETTINGS[name]
        part, tuning_only = part.removesuffix(" tuning"), part.endswith(" tuning")
        if part == "baselines":
            arms: tuple[str, ...] = BASELINES
        elif part in ("codistilled", "four", "remedies"):
            arms = {"codistilled": setting.codistilled, "four": FOUR, "remedies": REMEDIES}[part]
            if not setting.always and not any(counts(rows, name, metric) for metric in setting.metrics):
                continue
        else:
            arms = (part,)
        untuned = {arm: [run for run in tuning(rows, setting, arm) if run not in done] for arm in arms}
        missing = [run for runs in untuned.values() for run in runs]
        # What one arm of a part is tuned to is nothing to the others: they need not wait for it.
        tuned = [] if tuning_only else [arm for arm in arms if not untuned[arm]]
        missing += [run for arm in tuned for run in final(rows, setting, arm) if run not in done]
        yield from missing
        if missing:
            return  # what comes next may depend on them


def tuning(rows: list[Row], setting: Setting, arm: str) -> list[Run]:
    """The grid of one arm, on one seed: rates x regularisations, then for the best of each metric other alphas, what
    regularisations are left for later, and further rates where the best one is at the edge. Or, without a grid, what
    was chosen for another arm, with alphas: a remedy begins at kl, what codistils where the setting says so."""
    made = ARMS[arm]
    teaches = made.models > 1
    if start := "kl" if arm in REMEDIES else setting.start if teaches and arm != setting.start else "":
        points = [best for metric in setting.metrics if (best := choice(rows, setting.name, start, metric))]
        alphas = made.alphas or setting.alphas
        return list(
            dict.fromkeys(dataclasses.replace(best, arm=arm, alpha=alpha) for best in points for alpha in alphas)
        )
    alphas = ((1.0,) if 1.0 in setting.alphas else setting.alphas[:1]) if teaches else (0.0,)
    regularisations = setting.regularisations
    has_alpha = False  # it is chosen elsewhere
    if setting.like or arm in FOUR:
        # Four devices: what was chosen for two.
        name, other = (setting.like, arm) if setting.like else (setting.name, "kl" if teaches else "all_reduce")
        chosen = [best for metric in setting.metrics if (best := choice(rows, name, other, metric))]
        alphas = tuple(sorted({run.alpha for run in chosen})) or alphas
        has_alpha = bool(chosen)
        if not chosen:  # there was no gap to close: nothing was taught
            chosen = [best for metric in setting.metrics if (best := choice(rows, name, "plain", metric))]
        regularisations = tuple(sorted({run.regularisation for run in chosen})) or regularisations
    rates = [made.rate * rate for rate in setting.rates]
    runs = [
        Run(setting.name, "tune", arm, TUNING_SEED, 0, rate, regularisation, alpha)
        for regularisation in regularisations
        for rate in rates
        for alpha in alphas
    ]
    done = {run_of(row) for row in rows if (row["setting"], row["arm"]) == (setting.name, arm)}
    if not done.issuperset(runs):
        return runs
    for metric in setting.metrics:
        best = choice(rows, setting.name, arm, metric)
        assert best is not None
        if teaches and not has_alpha:
            runs += [dataclasses.replace(best, alpha=alpha) for alpha in setting.alphas]
        runs += [dataclasses.replace(best, regularisation=regularisation) for regularisation in setting.later]
        if beside := setting.next_to.get(best.regularisation):
            runs.append(dataclasses.replace(best, regularisation=beside))
        rates_tried = [run.lr for run in done if dataclasses.replace(run, lr=best.lr) == best]
        if not setting.edges:
            continue
        if best.lr == max(rates_tried) and 2 * best.lr <= BEYOND * max(rates):
            runs.append(dataclasses.replace(best, lr=2 * best.lr))
        if best.lr == min(rates_tried) and best.lr / 2 >= min(rates) / BEYOND:
            runs.append(dataclasses.replace(best, lr=best.lr / 2))
    return list(dict.fromkeys(runs))


def final(rows: list[Row], setting: Setting, arm: str) -> list[Run]:
    """The chosen settings with the other seeds. One model alone begins once where each model of a pair does."""
    runs = []
    for metric in setting.metrics:
        best = choice(rows, setting.name, arm, metric)
        if best is not None:
            runs += [
                dataclasses.replace(best, stage="final", seed=seed, init=init)
                for seed in setting.seeds
                for init in (range(2) if arm == "plain" else range(1))
            ]
    return list(dict.fromkeys(runs))


def same_point(run: Run, other: Run) -> bool:
    """Whether two runs have the same settings, whatever they are runs of."""
    return (run.lr, run.regularisation, run.alpha) == (other.lr, other.regularisation, other.alpha)
