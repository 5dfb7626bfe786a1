"""Draws the leaderboard: the tables between the marks of README.md from rows.jsonl, and the frontier as frontier.svg.

    python results/leaderboard/draw.py [RUNS/rows.jsonl ...]

Rows of the files that are named, if any, are added to rows.jsonl first; one that is there already stays as it is.
The long training of images is that of the final runs of results/claim.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "recipes" / "claim"))
from grid import final_rows  # noqa: E402

MIN_METHODS = 3  # for a panel of the figure
TUNING_SEED = 9
WRN_PARAMETERS = 175_066  # of WRN-16-1 with ten classes
ARMS = {"mse": "dense, mse", "kl": "dense, kl", "plain_2k": "plain, twice the updates"}
# What the rows of a table have in common, by task; learning rate and alpha are those that a method was tuned to.
SETTING = {
    "translation": ("pairs", "num_pieces", "width", "layers", "sentences", "updates", "smoothing", "burn_in"),
    "images": ("name", "images", "updates", "decay", "smoothing", "burn_in"),
}


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a file; none where it is not there."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def setting_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes the table of a row."""
    return tuple(row[key] for key in ("task", *SETTING[row["task"]]))


def name_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row one of its own."""
    return (*setting_of(row), *(row[key] for key in ("method", "rate", "alpha", "seed", "commit")))


def in_words(setting: tuple[Any, ...]) -> str:
    """What settings of the leaderboard differ in."""
    task, *values = setting
    of = dict(zip(SETTING[task], values, strict=True))
    burn_in = f"teaching from update {of['burn_in']} on" if of["burn_in"] else "teaching from the start"
    if task == "images":
        return f"CIFAR-10, {of['updates']:,} updates, {burn_in}"
    pairs = {"third": "a third of the pairs", "all": "all pairs"}[of["pairs"]]
    return f"Multi30k, {pairs}, {of['updates']:,} updates, label smoothing {of['smoothing']:g}, {burn_in}"


def mean_and_spread(values: list[float], digits: int) -> str:
    """With the standard deviation over seeds, where there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def grouped(rows: list[dict[str, Any]], tuning: bool = False) -> dict[tuple[Any, ...], dict[Any, list[dict[str, Any]]]]:
    """Setting -> (method, rate, alpha) -> rows by seed, of the seed for tuning or all others."""
    settings: dict[tuple[Any, ...], dict[Any, dict[int, dict[str, Any]]]] = {}
    for row in rows:  # of a seed that was run at two commits the last counts
        if (row["seed"] == TUNING_SEED) == tuning:
            point = row["method"], row["rate"], row["alpha"]
            settings.setdefault(setting_of(row), {}).setdefault(point, {})[row["seed"]] = row
    in_order = sorted(settings, key=lambda setting: (setting[0], -updates_of(setting), setting))
    return {
        setting: {point: [of_seed[seed] for seed in sorted(of_seed)] for point, of_seed in settings[setting].items()}
        for setting in in_order
    }


def updates_of(setting: tuple[Any, ...]) -> int:
    """Of every model."""
    return int(setting[1 + SETTING[setting[0]].index("updates")])


def tables(rows: list[dict[str, Any]], tuning: bool = False) -> list[str]:
    """One a setting; best first, one line a method, its seeds together."""
    lines = []
    for setting, points in grouped(rows, tuning).items():
        lines += ["", f"### {in_words(setting)}" + (": tuning, one seed" if tuning else ""), ""]
        heads = ["method", "NLL, bits", *(["top-1, %"] if setting[0] == "images" else []), "rate, α", "seeds"]
        heads += ["Mbit an update", "all_reduce / this", "commits", "command"]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        found = []
        for (method, rate, alpha), members in points.items():
            commits = ", ".join(dict.fromkeys(row["commit"] for row in members))
            means = [statistics.fmean(row["nll_bits"]) for row in members]
            mbit = statistics.fmean(row["mbit"] for row in members)
            fewer = f"{all_reduce_mbit(members[0]) / mbit:,.1f}" if mbit else "-"
            cells = [method, mean_and_spread(means, 3)]
            if "top1" in members[0]:
                cells.append(mean_and_spread([statistics.fmean(row["top1"]) for row in members], 2))
            cells += [f"{rate:g}, {alpha:g}" if teaches(members[0]) else f"{rate:g}"]
            cells += [str(len(members)), f"{mbit:,.4g}", fewer, commits, f"`{members[0]['command']}`"]
            found.append((statistics.fmean(means), f"| {' | '.join(cells)} |"))
        lines += [line for _, line in sorted(found)]
    return [*lines, ""]


def teaches(row: dict[str, Any]) -> bool:
    """Whether its models learn from each other's predictions, so that alpha counts: whatever averages ends with one."""
    return len(row["nll_bits"]) > 1


def all_reduce_mbit(row: dict[str, Any]) -> float:
    """What a device sends in an update where all gradients are averaged in fp32."""
    return 2 * 32 * float(row["parameters"]) / 1e6


def images(file: Path) -> list[str]:
    """The final runs of the test of the claim in the paper's geometry, each arm at what was chosen for its NLL."""
    rows = [row for row in read(file) if row["setting"] == "a"]
    lines = ["| method | test NLL, nats | top-1, % | runs | Mbit an update | all_reduce / this |"]
    lines += ["|---|---|---|---|---|---|"]
    found = []
    for arm in sorted({row["arm"] for row in rows if row["stage"] == "final"}):
        members = final_rows(rows, "a", arm, "nll")
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

    shown = {setting: points for setting, points in grouped(rows).items() if len(points) >= MIN_METHODS}
    figure, all_axes = pyplot.subplots(len(shown), figsize=(9, 6 * len(shown)), squeeze=False)
    for axes, (setting, points) in zip(all_axes[:, 0], shown.items(), strict=True):
        best, frontier = float("inf"), []
        placed = [
            (
                statistics.fmean(row["mbit"] for row in found),
                [statistics.fmean(row["nll_bits"]) for row in found],
                name,
                "tab:blue" if teaches(found[0]) else "tab:red",
            )
            for (name, _, _), found in points.items()
        ]
        for mbit, of_seeds, name, colour in sorted(placed):
            nll = statistics.fmean(of_seeds)
            if not mbit:
                axes.axhline(nll, color="tab:gray", linestyle="dashed", label=name)
                continue
            error = statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0
            axes.errorbar(mbit, nll, error, fmt="o", color=colour)
            axes.annotate(name, (mbit, nll), fontsize=7, xytext=(3, 3), textcoords="offset points")
            if nll < best:
                best = nll
                frontier.append((mbit, nll))
        axes.step(*zip(*frontier, strict=True), where="post", color="tab:orange", label="frontier")
        axes.legend()
        axes.set(xscale="log", xlabel="Mbit a device sends in an update", ylabel="NLL, bits")
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
    text = put(text, "tuning", tables(rows, tuning=True))
    text = put(text, "images", images(FOLDER.parent / "claim" / "runs.jsonl"))
    page.write_text(text, encoding="utf-8")
    draw(rows)


if __name__ == "__main__":
    main()
