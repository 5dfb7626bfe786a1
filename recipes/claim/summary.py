"""Owns the tables of the test of the claim, from finished rows alone: spreads over seeds, gaps closed, verdicts.

``python recipes/claim/summary.py --runs DIR --out results/claim`` copies ``runs.jsonl`` and writes ``summary.md``. It
decides by the margins of ``results/claim/PLAN.md`` and says "not run" where rows are missing; it never starts a run.
"""

import argparse
import dataclasses
import json
import math
import shutil
import statistics
from pathlib import Path

from grid import (
    Row,
    by_seed,
    choice,
    counts,
    final,
    final_rows,
    final_values,
    gap,
    goodness,
    quality,
    run_of,
    same_point,
)
from scipy.stats import t as student
from settings import ARMS, BASELINES, FIGURES, METRICS, ORDERS, REMEDIES, SETTINGS

# What is shown: label with its unit, digits.
SHOWN = {**{name: (metric.label, metric.digits) for name, metric in METRICS.items()}, **FIGURES}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Values of one arm: mean, and the variance of that mean; NaN for one value."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def variance(self) -> float:
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return math.nan
        return statistics.variance(self.values) / len(self.values)


def interval(first: Sample, second: Sample, level: float = 0.95) -> tuple[float, float, float]:
    """Difference of two means and its interval of confidence (Welch).

    Returns:
        the difference ``first - second``, its lower end, its upper end.
    """
    difference, variance = first.mean - second.mean, first.variance + second.variance
    if not variance > 0:  # all values the same, or one value
        return difference, difference if variance == 0 else -math.inf, difference if variance == 0 else math.inf
    parts = [sample.variance**2 / (len(sample.values) - 1) for sample in (first, second)]
    width = student.ppf((1 + level) / 2, variance**2 / sum(parts)) * math.sqrt(variance)
    return difference, difference - width, difference + width


def paired(first: Sample, second: Sample, level: float = 0.95) -> tuple[float, float]:
    """Ends of the interval of confidence of the difference, seed by seed (Student).

    A seed begins every arm with the same weights and data order. Of three differences the interval knows little of
    their spread: it is shown beside the other, and no verdict is by it.

    Raises:
        ValueError: the samples are not of the same number of seeds.
    """
    differences = Sample([one - other for one, other in zip(first.values, second.values, strict=True)])
    if not differences.variance > 0:  # as interval()
        end = 0.0 if differences.variance == 0 else math.inf
        return differences.mean - end, differences.mean + end
    width = student.ppf((1 + level) / 2, len(differences.values) - 1) * math.sqrt(differences.variance)
    return differences.mean - width, differences.mean + width


def paired_shown(first: Sample, second: Sample, digits: int) -> str:
    """The interval of :func:`paired` in words, empty where seeds differ in number."""
    if len(first.values) != len(second.values):
        return ""
    low, high = paired(first, second)
    return f"; by seed {low:+.{digits}f} to {high:+.{digits}f}"


def tells(low: float, high: float) -> int:
    """1 where an interval lies above 0, -1 where it lies below, else 0."""
    return int(low > 0) - int(high < 0)


def verdict(codistilled: Sample, other: Sample, margin: float) -> str:
    """``equivalent``, ``better``, ``worse`` or ``not decided``; larger values are better."""
    _, low, high = interval(codistilled, other)
    if -margin <= low and high <= margin:
        return "equivalent"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not decided"


def gap_closed(codistilled: Sample, plain: Sample, all_reduce: Sample) -> tuple[float, float]:
    """(codistilled - plain) / (all_reduce - plain) and its standard error, to first order."""
    size = all_reduce.mean - plain.mean
    share = (codistilled.mean - plain.mean) / size
    variance = codistilled.variance + share**2 * all_reduce.variance + (1 - share) ** 2 * plain.variance
    return share, math.sqrt(variance) / abs(size)


def samples(rows: list[Row], setting: str, metric: str) -> dict[str, Sample]:
    """The arms that have final runs, each seed one value (the mean over its models)."""
    found = {}
    for arm in ARMS:
        best = choice(rows, setting, arm, metric)
        values = final_values(rows, setting, arm, metric) if best else []
        if values:
            found[arm] = Sample(values)
    return found


def better_setting(rows: list[Row], names: tuple[str, ...], arm: str, metric: str) -> str | None:
    """The setting in which an arm was best on held-out data; None where it was tuned in none."""
    tuned = [row for row in rows if (row["stage"], row["arm"]) == ("tune", arm) and row["setting"] in names]
    return max(tuned, key=lambda row: quality(row, metric))["setting"] if tuned else None


def at_the_better(rows: list[Row], names: tuple[str, ...], metric: str) -> list[str]:
    """Every arm where it was best on held-out data, of settings that differ in regularisation alone: Markdown."""
    chosen = {arm: name for arm in ARMS if (name := better_setting(rows, names, arm, metric))}
    chosen = {arm: name for arm, name in chosen.items() if is_finished(rows, name, arm, metric)}
    found = {arm: samples(rows, name, metric)[arm] for arm, name in chosen.items()}
    digits, lines = METRICS[metric].digits, [f"{METRICS[metric].label}:"]
    for arm, sample in found.items():
        best = choice(rows, chosen[arm], arm, metric)
        assert best is not None
        value = f"{METRICS[metric].sign * sample.mean:.{digits}f} ± {math.sqrt(sample.variance):.{digits}f}"
        told = [f"- {arm} (learning rate {best.lr:g}, {best.regularisation}): {value}"]
        told += [comparison(arm, other, found, metric) for other in others_of(arm) if other in found]
        lines.append(". ".join(told) + ".")
    return lines


def others_of(arm: str) -> tuple[str, ...]:
    """The arms that one is compared with."""
    return {"plain": (), "all_reduce": ("plain",)}.get(arm, ("all_reduce", "plain"))


def shown(sample: Sample, digits: int) -> str:
    """Mean ± standard error, of one value that alone."""
    error = f" ± {math.sqrt(sample.variance):.{digits}f}" if len(sample.values) > 1 else ""
    return f"{sample.mean:.{digits}f}{error}"


def table(rows: list[Row], setting: str, metric: str) -> list[str]:
    """Lines of Markdown for the runs that were chosen by one metric."""
    names = columns(setting)
    lines = ["| arm | learning rate, regularisation, α | runs | " + " | ".join(SHOWN[name][0] for name in names) + " |"]
    lines.append("|---" * (3 + len(names)) + "|")
    notes = []
    for arm in samples(rows, setting, metric):
        best = choice(rows, setting, arm, metric)
        assert best is not None
        mine = final_rows(rows, setting, arm, metric)
        if any(skipped := [row.get("skipped_updates") or 0 for row in mine]):
            numbers = ", ".join(f"{number:g}" for number in skipped)
            notes += ["", f"{arm}: models that were behind skipped {numbers} updates (a run each, of all its models)."]
        cells = []
        for name in names:
            digits = SHOWN[name][1]
            if any(row["test"][name] is None for row in mine):
                cells.append("diverged")
                continue
            cells.append(shown(Sample(by_seed([(row, row["test"][name]) for row in mine])), digits))
        point = f"{best.lr:g}, {best.regularisation}" + (f", {best.alpha:g}" if best.alpha else "")
        lines.append(f"| {arm} | {point} | {len(mine)} | " + " | ".join(cells) + " |")
    return lines + notes


def conclusions(rows: list[Row], setting: str, metric: str) -> list[str]:
    """What the margins say of one setting and metric."""
    found = samples(rows, setting, metric)
    digits, unit = METRICS[metric].digits, METRICS[metric].label
    if not all(is_finished(rows, setting, arm, metric) for arm in BASELINES):
        return [f"{unit}: calibration not run yet."]
    size, error = gap(rows, setting, metric)
    is_gap = counts(rows, setting, metric)
    alone = [goodness(row, metric, "test") for row in final_rows(rows, setting, "plain", metric)]
    noise = statistics.stdev(alone) if all(map(math.isfinite, alone)) else math.nan
    lines = [
        f"{unit}: all_reduce is {size:+.{digits}f} ± {error:.{digits}f} better than one model: "
        + ("the setting counts." if is_gap else "**no gap to close**.")
        + f" Noise floor (one model): {noise:.{digits}f}."
    ]
    remedies = [arm for arm in REMEDIES if arm in found]
    for arm in (*SETTINGS[setting].codistilled, *remedies):
        if not is_finished(rows, setting, arm, metric):
            lines.append(f"- {arm}: not run.")
            continue
        text = "- " + comparison(arm, "all_reduce", found, metric)
        if is_gap:
            share, share_error = gap_closed(found[arm], found["plain"], found["all_reduce"])
            text += f"; gap closed {100 * share:.0f} ± {100 * share_error:.0f} %"
        lines.append(f"{text}. {comparison(arm, 'plain', found, metric)}.")
    return lines


def is_finished(rows: list[Row], setting: str, arm: str, metric: str) -> bool:
    """Whether all final runs are there of what was chosen for an arm by a metric."""
    best = choice(rows, setting, arm, metric)
    wanted = [run for run in final(rows, SETTINGS[setting], arm) if best is not None and same_point(run, best)]
    return bool(wanted) and {run_of(row) for row in rows}.issuperset(wanted)


def comparison(arm: str, other: str, found: dict[str, Sample], metric: str) -> str:
    """How far an arm is ahead of another, and what the margin says of that."""
    digits = METRICS[metric].digits
    difference, low, high = interval(found[arm], found[other])
    ends = f"{low:+.{digits}f} to {high:+.{digits}f}{paired_shown(found[arm], found[other], digits)}"
    said = verdict(found[arm], found[other], METRICS[metric].margin)
    if len(found[arm].values) == len(found[other].values) and tells(low, high) != tells(
        *paired(found[arm], found[other])
    ):
        said += " (not so by seed)"
    return f"{arm} − {other}: {difference:+.{digits}f} (95 %: {ends}): {said}"


def columns(setting: str) -> tuple[str, ...]:
    """The figures of a setting's tables."""
    return (*SETTINGS[setting].metrics, *SETTINGS[setting].shown)


def tuning_table(rows: list[Row], setting: str) -> list[str]:
    """What was tried on the held-out images."""
    shown = [name for name in columns(setting) if name not in ("bleu", "chrf")]  # of the test split alone
    lines = ["| arm | learning rate | regularisation | α | " + " | ".join(SHOWN[name][0] for name in shown) + " |"]
    lines.append("|---" * (4 + len(shown)) + "|")
    tuned = [row for row in rows if (row["setting"], row["stage"]) == (setting, "tune")]
    for row in sorted(tuned, key=lambda r: (r["arm"], r["regularisation"], r["lr"], r["alpha"])):
        part = row["held_out"]
        figures = " | ".join("diverged" if part[name] is None else f"{part[name]:.{SHOWN[name][1]}f}" for name in shown)
        lines.append(f"| {row['arm']} | {row['lr']:g} | {row['regularisation']} | {row['alpha'] or '':} | {figures} |")
    return lines


def read_rows(runs: Path) -> list[Row]:
    """The rows of a campaign, of which the last may have been cut off."""
    text = (runs / "runs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description="Tables of the test of the claim.")
    parser.add_argument("--runs", type=Path, required=True, help="folder that run.py was given")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs.jsonl and summary.md")
    parser.add_argument("--order", choices=tuple(ORDERS), default="claim", help="as run.py was given")
    args = parser.parse_args()
    rows = read_rows(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.runs / "runs.jsonl").resolve() != (args.out / "runs.jsonl").resolve():
        shutil.copyfile(args.runs / "runs.jsonl", args.out / "runs.jsonl")
    lines = [f"# {len(rows)} finished runs, by the margins of PLAN.md", ""]
    lines += [
        "Intervals of 95 % are Welch's, and verdicts are by them; beside each is that of the differences by seed.",
        "",
    ]
    for setting in dict.fromkeys(name for name, _ in ORDERS[args.order]):
        if not any(row["setting"] == setting for row in rows):
            lines += [f"## {setting}", "", "Not run.", ""]
            continue
        lines += [f"## {setting}", ""]
        for metric in SETTINGS[setting].metrics:
            lines += [*conclusions(rows, setting, metric), ""]
            if samples(rows, setting, metric):
                lines += [
                    f"Chosen by {METRICS[metric].label}, on the test split:",
                    "",
                    *table(rows, setting, metric),
                    "",
                ]
        lines += ["Tuning, one seed, on held-out data:", "", *tuning_table(rows, setting), ""]
        if beside := SETTINGS[setting].beside:
            lines += [f"## Each arm in {beside} or {setting}, by held-out data", ""]
            lines += ["The plan, which judges each setting by itself, did not foresee this.", ""]
            for metric in SETTINGS[setting].metrics:
                lines += [*at_the_better(rows, (beside, setting), metric), ""]
    (args.out / "summary.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
