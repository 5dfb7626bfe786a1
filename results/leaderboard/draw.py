"""Draws the leaderboard: the table between the marks of README.md from rows.jsonl, and the frontier as frontier.svg.

    python results/leaderboard/draw.py [RUNS/rows.jsonl ...]

Rows of the files that are named, if any, are added to rows.jsonl first; one that is there already stays as it is.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MIN_METHODS = 3  # for a panel of the figure
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"
SETTING = ("pairs", "num_pieces", "width", "layers", "sentences", "updates", "rate", "smoothing", "burn_in")
LATER = {"smoothing": 0.1, "burn_in": 0}  # of rows from before there was such a setting


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a file; none where it is not there."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [{**LATER, **json.loads(line)} for line in lines]


def name_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row one of its own."""
    return tuple(row[key] for key in (*SETTING, "method", "seed", "commit"))


def in_words(setting: tuple[Any, ...]) -> str:
    """What settings of the leaderboard differ in."""
    of = dict(zip(SETTING, setting, strict=True))
    return f"{of['pairs']}, {of['updates']}, {of['smoothing']:g}, {of['burn_in']}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Best first, one line a method and commit; seeds together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[(*(row[key] for key in SETTING), row["method"], row["commit"])].append(row)
    lines = []
    for (*setting, method, commit), members in groups.items():
        means = [statistics.fmean(row["nll_bits"]) for row in members]
        spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
        mbit = statistics.fmean(row["mbit"] for row in members)
        full = 2 * 32 * members[0]["parameters"] / 1e6
        fewer = f"{full / mbit:,.1f}" if mbit else "-"
        lines.append(
            (
                statistics.fmean(means),
                f"| {method} | {statistics.fmean(means):.3f}{spread} | {len(members)} | {mbit:,.4g} | {fewer} | "
                f"{in_words(tuple(setting))} | {commit} | `{members[0]['command']}` |",
            )
        )
    head = [
        "| method | validation NLL, bits | seeds | Mbit an update | all_reduce / this "
        "| pairs, updates, label smoothing, burn-in | commit | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return head + [line for _, line in sorted(lines)]


def draw(rows: list[dict[str, Any]]) -> None:
    """Bits against quality, with the methods that nothing is better than in both: a panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "leaderboard"
    from matplotlib import pyplot

    panels: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["mbit"]:
            panels[tuple(row[key] for key in SETTING)][row["method"]].append(row)
    shown = {setting: methods for setting, methods in panels.items() if len(methods) >= MIN_METHODS}
    figure, all_axes = pyplot.subplots(len(shown), figsize=(8, 5 * len(shown)), squeeze=False)
    for axes, (setting, methods) in zip(all_axes[:, 0], shown.items(), strict=True):
        best, frontier = float("inf"), []
        points = [
            (statistics.fmean(row["mbit"] for row in found), [statistics.fmean(row["nll_bits"]) for row in found], name)
            for name, found in methods.items()
        ]
        for mbit, of_seeds, name in sorted(points):
            nll = statistics.fmean(of_seeds)
            error = statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0
            axes.errorbar(mbit, nll, error, fmt="o", color="tab:blue")
            axes.annotate(name, (mbit, nll), fontsize=7, xytext=(3, 3), textcoords="offset points")
            if nll < best:
                best = nll
                frontier.append((mbit, nll))
        axes.step(*zip(*frontier, strict=True), where="post", color="tab:orange", label="frontier")
        axes.legend()
        axes.set(xscale="log", xlabel="Mbit a device sends in an update", ylabel="validation NLL, bits a piece")
        axes.set_title(in_words(setting), fontsize=9)
    figure.tight_layout()
    figure.savefig(FOLDER / "frontier.svg", metadata={"Date": None})


def main() -> None:
    """Rows, table, figure."""
    rows = read(FOLDER / "rows.jsonl")
    known = {name_of(row) for row in rows}
    for file in map(Path, sys.argv[1:]):
        rows += [row for row in read(file) if name_of(row) not in known]
    (FOLDER / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    (FOLDER / "README.md").write_text(
        f"{before}{BEGIN}\n" + "\n".join(table(rows)) + f"\n{END}{after}", encoding="utf-8"
    )
    draw(rows)


if __name__ == "__main__":
    main()
