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

from grid import BASELINES, CODISTILLED, METRICS, SEEDS, SETTINGS, Row, choice, counts, final_values, gap, run_of
from scipy.stats import t as student

MARGIN = {"top1": 0.5, "nll": 0.02}  # within which codistillation and all_reduce are the same
UNIT = {"top1": "top-1 (%)", "nll": "NLL (nats)"}
DIGITS = {"top1": 2, "nll": 4, "ece": 2}
ARMS = (*BASELINES, *CODISTILLED, "plain_2k")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Values of one arm: mean, and the variance of that mean; NaN for one value."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def variance(self) -> float:
        return statistics.variance(self.values) / len(self.values) if len(self.values) > 1 else math.nan


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


def verdict(codistilled: Sample, all_reduce: Sample, margin: float) -> str:
    """``equivalent``, ``better``, ``worse`` or ``not decided``; larger values are better."""
    _, low, high = interval(codistilled, all_reduce)
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
    """The arms that have final runs, each run one value (the mean over the two models of a pair)."""
    found = {}
    for arm in ARMS:
        best = choice(rows, setting, arm, metric)
        values = final_values(rows, setting, arm, metric) if best else []
        if values:
            found[arm] = Sample(values)
    return found


def table(rows: list[Row], setting: str, metric: str) -> list[str]:
    """Lines of Markdown for the runs that were chosen by one metric."""
    lines = ["| arm | learning rate, weight decay, α | runs | top-1 (%) | NLL (nats) | ECE (%) |", "|---" * 6 + "|"]
    for arm in samples(rows, setting, metric):
        best = choice(rows, setting, arm, metric)
        assert best is not None
        mine = [
            row
            for row in rows
            if (row["setting"], row["stage"], row["arm"]) == (setting, "final", arm)
            and dataclasses.replace(run_of(row), stage="tune", seed=best.seed, init=best.init) == best
        ]
        cells = []
        for name, digits in DIGITS.items():
            values = Sample([row["test"][name] for row in mine])
            error = f" ± {math.sqrt(values.variance):.{digits}f}" if len(mine) > 1 else ""
            cells.append(f"{values.mean:.{digits}f}{error}")
        point = f"{best.lr:g}, {best.weight_decay}" + (f", {best.alpha:g}" if best.alpha else "")
        lines.append(f"| {arm} | {point} | {len(mine)} | " + " | ".join(cells) + " |")
    return lines


def conclusions(rows: list[Row], setting: str, metric: str) -> list[str]:
    """What the margins say of one setting and metric."""
    found = samples(rows, setting, metric)
    digits, unit = DIGITS[metric], UNIT[metric]
    if not set(BASELINES) <= set(found) or min(len(found[arm].values) for arm in BASELINES) < len(SEEDS):
        return [f"{unit}: calibration not run yet."]
    size, error = gap(rows, setting, metric)
    is_gap = counts(rows, setting, metric)
    noise = statistics.stdev(found["plain"].values)
    lines = [
        f"{unit}: all_reduce is {size:+.{digits}f} ± {error:.{digits}f} better than one model: "
        + ("the setting counts." if is_gap else "**no gap to close**.")
        + f" Noise floor (one model): {noise:.{digits}f}."
    ]
    for arm in CODISTILLED:
        if arm not in found or len(found[arm].values) < len(SEEDS):
            lines.append(f"- {arm}: not run.")
            continue
        difference, low, high = interval(found[arm], found["all_reduce"])
        text = f"- {arm} − all_reduce: {difference:+.{digits}f} (95 %: {low:+.{digits}f} to {high:+.{digits}f}): "
        text += verdict(found[arm], found["all_reduce"], MARGIN[metric])
        if is_gap:
            share, share_error = gap_closed(found[arm], found["plain"], found["all_reduce"])
            text += f"; gap closed {100 * share:.0f} ± {100 * share_error:.0f} %"
        lines.append(text + ".")
    return lines


def tuning_table(rows: list[Row], setting: str) -> list[str]:
    """What was tried on the held-out images."""
    lines = ["| arm | learning rate | weight decay | α | top-1 (%) | NLL (nats) | ECE (%) |", "|---" * 7 + "|"]
    tuned = [row for row in rows if (row["setting"], row["stage"]) == (setting, "tune")]
    for row in sorted(tuned, key=lambda r: (r["arm"], r["weight_decay"], r["lr"], r["alpha"])):
        part = row["held_out"]
        figures = " | ".join(f"{part[name]:.{digits}f}" for name, digits in DIGITS.items())
        lines.append(f"| {row['arm']} | {row['lr']:g} | {row['weight_decay']} | {row['alpha'] or '':} | {figures} |")
    return lines


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description="Tables of the test of the claim.")
    parser.add_argument("--runs", type=Path, required=True, help="folder that run.py was given")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs.jsonl and summary.md")
    args = parser.parse_args()
    text = (args.runs / "runs.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.runs / "runs.jsonl").resolve() != (args.out / "runs.jsonl").resolve():
        shutil.copyfile(args.runs / "runs.jsonl", args.out / "runs.jsonl")
    lines = [f"# {len(rows)} finished runs, by the margins of PLAN.md", ""]
    for setting in SETTINGS:
        if not any(row["setting"] == setting for row in rows):
            lines += [f"## {setting}", "", "Not run.", ""]
            continue
        lines += [f"## {setting}", ""]
        for metric in METRICS:
            lines += [*conclusions(rows, setting, metric), ""]
            if samples(rows, setting, metric):
                lines += [f"Chosen by {UNIT[metric]}, on the test images:", "", *table(rows, setting, metric), ""]
        lines += ["Tuning, one seed, on held-out images:", "", *tuning_table(rows, setting), ""]
    (args.out / "summary.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
