"""Draws the leaderboard: the tables between the marks of README.md from rows.jsonl, and the frontier as frontier.svg.

    python results/leaderboard/draw.py [RUNS/rows.jsonl ...]

Rows of the files that are named, if any, are added to rows.jsonl first; one that is there already stays as it is.
Those of images are the final runs of results/claim.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MIN_METHODS = 3  # for a panel of the figure
TUNING_SEED = 9
WRN_PARAMETERS = 175_066  # of WRN-16-1 with ten classes
ARMS = {"mse": "dense, mse", "kl": "dense, kl"}
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
    pairs = {"third": "a third of the pairs", "all": "all pairs"}[of["pairs"]]
    burn_in = f"teaching from update {of['burn_in']} on" if of["burn_in"] else "teaching from the start"
    return f"{pairs}, {of['updates']} updates, label smoothing {of['smoothing']:g}, {burn_in}"


def mean_and_spread(values: list[float], digits: int) -> str:
    """With the standard deviation over seeds, where there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]]:
    """Setting -> method -> rows by seed; that of the seed for tuning only where it is alone."""
    settings: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:  # of a seed that was run at two commits the last counts
        settings.setdefault(tuple(row[key] for key in SETTING), {}).setdefault(row["method"], {})[row["seed"]] = row
    return {
        setting: {
            method: [of_seed[seed] for seed in sorted(of_seed) if seed != TUNING_SEED] or list(of_seed.values())
            for method, of_seed in methods.items()
        }
        for setting, methods in settings.items()
    }


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """One a setting, the longest training first; best first, one line a method, its seeds together."""
    lines = []
    for setting, groups in sorted(
        grouped(rows).items(), key=lambda item: (-item[0][SETTING.index("updates")], item[0])
    ):
        lines += ["", f"### Multi30k: {in_words(setting)}", ""]
        lines += ["| method | validation NLL, bits | seeds | Mbit an update | all_reduce / this | commits | command |"]
        lines += ["|---|---|---|---|---|---|---|"]
        found = []
        for method, members in groups.items():
            commits = ", ".join(dict.fromkeys(row["commit"] for row in members))
            means = [statistics.fmean(row["nll_bits"]) for row in members]
            mbit = statistics.fmean(row["mbit"] for row in members)
            fewer = f"{2 * 32 * members[0]['parameters'] / 1e6 / mbit:,.1f}" if mbit else "-"
            found.append(
                (
                    statistics.fmean(means),
                    f"| {method} | {mean_and_spread(means, 3)} | {len(members)} | {mbit:,.4g} | {fewer} | {commits} "
                    f"| `{members[0]['command']}` |",
                )
            )
        lines += [line for _, line in sorted(found)]
    return [*lines, ""]


def images(file: Path) -> list[str]:
    """The final runs of the test of the claim in the paper's geometry, each arm at what was chosen for its NLL."""
    rows = [row for row in read(file) if row["setting"] == "a"]
    lines = ["| method | test NLL, nats | top-1, % | runs | Mbit an update | all_reduce / this |"]
    lines += ["|---|---|---|---|---|---|"]
    found = []
    for arm in sorted({row["arm"] for row in rows if row["stage"] == "final"}):
        tuned = [row for row in rows if row["arm"] == arm and row["stage"] == "tune" and row["held_out"]["nll"]]
        best = min(tuned, key=lambda row: row["held_out"]["nll"])
        members = [row for row in rows if row["arm"] == arm and row["stage"] == "final"]
        members = [row for row in members if all(row[key] == best[key] for key in ("lr", "regularisation", "alpha"))]
        if not members:  # so far only what was chosen by top-1 has been run
            continue
        nll, top1 = ([row["test"][name] for row in members] for name in ("nll", "top1"))
        counted = [row.get("train_codistill_mbit") or 0.0 for row in members]
        mbit = 2 * 32 * WRN_PARAMETERS / 1e6 if arm == "all_reduce" else statistics.fmean(counted)
        fewer = f"{2 * 32 * WRN_PARAMETERS / 1e6 / mbit:,.1f}" if mbit else "-"
        line = f"| {ARMS.get(arm, arm)} | {mean_and_spread(nll, 4)} | {mean_and_spread(top1, 2)} "
        line += f"| {len(members)} | {mbit:,.4g} | {fewer} |"
        found.append((statistics.fmean(nll), line))
    return lines + [line for _, line in sorted(found)]


def put(page: str, mark: str, lines: list[str]) -> str:
    """The page with the lines between its marks."""
    before, rest = page.split(f"<!-- {mark} -->")
    after = rest.split(f"<!-- end of {mark} -->")[1]
    return f"{before}<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- end of {mark} -->{after}"


def draw(rows: list[dict[str, Any]]) -> None:
    """Bits against quality, with the methods that nothing is better than in both: a panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "leaderboard"
    from matplotlib import pyplot

    shown = {setting: methods for setting, methods in grouped(rows).items() if len(methods) >= MIN_METHODS}
    figure, all_axes = pyplot.subplots(len(shown), figsize=(9, 6 * len(shown)), squeeze=False)
    for axes, (setting, methods) in zip(all_axes[:, 0], shown.items(), strict=True):
        best, frontier = float("inf"), []
        points = [
            (statistics.fmean(row["mbit"] for row in found), [statistics.fmean(row["nll_bits"]) for row in found], name)
            for name, found in methods.items()
        ]
        for mbit, of_seeds, name in sorted(points):
            nll = statistics.fmean(of_seeds)
            if not mbit:
                axes.axhline(nll, color="tab:gray", linestyle="dashed", label=name)
                continue
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
    page = FOLDER / "README.md"
    text = put(page.read_text(encoding="utf-8"), "rows", tables(rows))
    text = put(text, "images", images(FOLDER.parent / "claim" / "runs.jsonl"))
    page.write_text(text, encoding="utf-8")
    draw(rows)


if __name__ == "__main__":
    main()
