"""Owns figures and tables of the paper's rows: several arms, several seeds of each, mean and standard error.

``python recipes/tools/paper_figure.py --out OUT/fig02 --title ... --arm all_reduce FOLDER ...`` reads
``FOLDER/SEED/MODEL/log.jsonl`` (or ``train.log`` of fairseq) and writes ``OUT/fig02.png``, ``.svg``, ``.md`` and
``.json``. A value of a seed is the mean over the models that were trained together; mean and standard error are over
seeds. It never changes a log, and shows seeds that are missing as a smaller count.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sent_bits import megabits_per_update

from fairseq_codistill.report.runs import ModelLog, Run, find_runs

SKIPPED = re.compile(r"skipped (\d+) updates")
PANELS = {  # name -> (kind of record, figure, label); the metric of the runs stands for ""
    "valid": ("valid", "", ""),
    "train": ("train", "nll_loss", "training loss without distillation"),
    "distance": ("train", "distance", "distance of the parameters from their start"),
    "agreement": ("train", "codistill_agreement", "share of equal predictions"),
}


@dataclasses.dataclass
class Spread:
    """Mean and standard error of some seeds; the error is None where there is one seed."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        """None where there are no values."""
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def text(self, digits: int) -> str:
        """As it stands in the table."""
        return f"{self.mean:.{digits}f}" + (f" ± {self.error:.{digits}f}" if self.error is not None else "")


@dataclasses.dataclass
class Arm:
    """One arm with its seeds: ``runs`` has one run a seed, ``models`` the indices of those models that count.

    ``folder/SEED/MODEL`` is where the logs were.
    """

    label: str
    runs: list[Run]
    folder: Path
    models: frozenset[int] | None = None

    def logs(self, run: Run) -> list[ModelLog]:
        """The models of one seed that count."""
        return [model for model in run.models if self.models is None or model.index in self.models]

    def spread(self, figure: Any) -> Spread | None:
        """``figure(model)`` averaged over the models of a seed, over seeds; None values are left out."""
        by_seed = [[value for m in self.logs(run) if (value := figure(m)) is not None] for run in self.runs]
        return Spread.of([statistics.fmean(values) for values in by_seed if values])

    def bleu(self) -> Spread | None:
        """BLEU of the averaged checkpoints, where evaluate.sh has counted it for every model."""
        scores = []
        for run in self.runs:
            files = [self.folder / run.name / str(model.index) / "bleu_average.json" for model in self.logs(run)]
            if not all(file.exists() for file in files):
                return None
            scores.append(statistics.fmean(json.loads(file.read_text(encoding="utf-8"))["bleu"] for file in files))
        return Spread.of(scores)

    def curve(self, panel: str) -> list[tuple[float, Spread]]:
        """(update, spread over seeds) of one panel, at the updates that all models of all seeds have."""
        kind, key, _ = PANELS[panel]
        curves = [
            [dict(zip(*model.curve(kind, key or model.metric.key), strict=True)) for model in self.logs(run)]
            for run in self.runs
        ]
        common = set.intersection(*(set(curve) for seed in curves for curve in seed))
        points = []
        for update in sorted(common):
            spread = Spread.of([statistics.fmean(curve[update] for curve in seed) for seed in curves])
            assert spread is not None
            points.append((update, spread))
        return points


def sent_in(arms: list[Arm]) -> Callable[[ModelLog], float]:
    """:func:`megabits_per_update` as it is to be counted in a figure of these arms."""
    sizes = [run.models[0].world_size for arm in arms for run in arm.runs if len(run.models) > 1]
    return functools.partial(megabits_per_update, within=min(sizes, default=1))


def architecture(model: ModelLog) -> str:
    """What the model is, as its settings say."""
    return model.settings.get("model", model.settings.get("arch", "model"))


def sizes_of(arm: Arm) -> set[int]:
    """Numbers of parameters of its models."""
    return {model.num_parameters for run in arm.runs for model in arm.logs(run)}


def skips(arm: Arm) -> int:
    """Updates that its models did not make, since the others were ahead after a failure, over all seeds."""
    found = 0.0
    for model in (model for run in arm.runs for model in arm.logs(run)):
        told = [SKIPPED.search(what) for _, _, what in model.incidents if not what.startswith("rank ")]
        # Where a log has them as records, another one of the same model tells of them as well.
        found += sum(n for _, n in model.skipped) or sum(int(match[1]) for match in told if match)
    return round(found)


def split_by_architecture(arm: Arm) -> list[Arm]:
    """One arm for each architecture in it; the arm itself where there is only one."""
    kinds: dict[str, set[int]] = {}
    for model in arm.runs[0].models:
        kinds.setdefault(architecture(model), set()).add(model.index)
    if len(kinds) == 1:
        return [arm]
    return [Arm(f"{arm.label}: {kind}", arm.runs, arm.folder, frozenset(models)) for kind, models in kinds.items()]


def read_arm(label: str, folder: Path) -> Arm:
    """An arm whose logs are in FOLDER/SEED/MODEL; seeds without finished.txt are left out.

    Raises:
        ValueError: there is no log of a finished seed.
    """
    runs = [run for run in find_runs(folder) if (folder / run.name / "finished.txt").exists()]
    if not runs:
        raise ValueError(f"{folder} holds no seed that was trained to its end (with finished.txt)")
    return Arm(label, runs, folder)


def table(arms: list[Arm], reference: Arm | None) -> tuple[str, list[dict[str, Any]]]:
    """Markdown, and the same as records. ``reference`` is what bits are compared with, of models of its size."""
    metric = arms[0].runs[0].models[0].metric
    sent_megabits = sent_in(arms)
    against = reference.spread(sent_megabits) if reference else None
    columns: list[tuple[str, Any, int]] = [
        (metric.label + ", last", lambda m: m.last("valid", metric.key), 3 if metric.key == "nll_loss" else 2),
        ("training loss", lambda m: m.last("train", "nll_loss"), 3),
        ("distance", lambda m: m.last("train", "distance"), 1),
        ("Mbit an update", sent_megabits, 4),
    ]
    rows, records = [], []
    for arm in arms:
        spreads = [arm.spread(figure) for _, figure, _ in columns]
        bleu = arm.bleu()
        cells = [s.text(digits) if s else "" for s, (_, _, digits) in zip(spreads, columns, strict=True)]
        sent = spreads[-1]
        is_alike = reference is not None and sizes_of(arm) == sizes_of(reference)
        fewer = against.mean / sent.mean if against and sent and sent.mean and is_alike else None
        rows.append(
            [arm.label, str(len(arm.runs)), *cells, f"{fewer:,.1f}" if fewer else "", bleu.text(1) if bleu else ""]
        )
        record: dict[str, Any] = {"arm": arm.label, "seeds": [run.name for run in arm.runs], "times_fewer_bits": fewer}
        record["BLEU"] = dataclasses.asdict(bleu) if bleu else None
        for (name, _, _), spread in zip(columns, spreads, strict=True):
            record[name] = dataclasses.asdict(spread) if spread else None
        records.append(record)
    heads = ["arm", "seeds", *(name for name, _, _ in columns), "times fewer bits", "BLEU"]
    used = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    lines = [[heads[i] for i in used], ["---"] * len(used), *([row[i] for i in used] for row in rows)]
    notes = [
        f"\n{arm.label}: models that were behind skipped {skipped} updates.\n"
        for arm in arms
        if (skipped := skips(arm))
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "".join(notes), records


def draw(arms: list[Arm], kind: str, panels: list[str], title: str, out: Path) -> None:
    """``kind`` curves: ``panels`` over updates. bits: the metric over what a device sends. arms: the metric by arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "figure"  # the same figure is the same file
    metric = arms[0].runs[0].models[0].metric
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    names = panels if kind == "curves" else [kind]
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.6 * len(names), 4.2), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=True):
        for number, arm in enumerate(arms):
            style = {"color": colours[number % 10], "label": arm.label, "linestyle": ("-", "--", ":")[number // 10 % 3]}
            last = arm.spread(lambda m: m.last("valid", metric.key))
            if kind == "curves":
                points = arm.curve(name)
                if not points:
                    continue
                updates, means = [update for update, _ in points], [spread.mean for _, spread in points]
                errors = [spread.error or 0.0 for _, spread in points]
                axis.plot(updates, means, **style)
                low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
                axis.fill_between(updates, low, high, color=style["color"], alpha=0.2, linewidth=0)
            elif last is not None:
                sent = arm.spread(sent_in(arms))
                place = sent.mean if kind == "bits" and sent else number
                if kind == "arms" or place:  # one model alone sends nothing, and has no place on a logarithmic axis
                    axis.errorbar(place, last.mean, yerr=last.error, marker="o", capsize=3, **style)
        if kind == "curves":
            axis.set(xlabel="updates", ylabel=PANELS[name][2] or metric.label)
        elif kind == "bits":
            axis.set(xlabel="sent by a device (Mbit an update)", xscale="log", ylabel=metric.label)
        else:
            axis.set(ylabel=metric.label)
            axis.set_xticks(range(len(arms)), [arm.label for arm in arms], rotation=30, ha="right")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if kind != "arms":
        axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out.with_suffix(".png"), dpi=120)
    figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draw one figure and write its table."""
    parser = argparse.ArgumentParser(description="Draw a figure of several arms and seeds.")
    parser.add_argument("--out", type=Path, required=True, help="path of the figure without suffix")
    parser.add_argument("--title", required=True)
    parser.add_argument(
        "--arm", action="append", required=True, nargs=2, metavar=("LABEL", "FOLDER"), help="FOLDER/SEED/MODEL/log"
    )
    parser.add_argument("--kind", choices=["curves", "bits", "arms"], default="curves")
    parser.add_argument("--panels", nargs="+", choices=sorted(PANELS), default=["valid", "train"], help="of curves")
    parser.add_argument("--reference", default="all_reduce", help="label of the arm that bits are compared with")
    args = parser.parse_args()
    try:
        arms = [part for label, name in args.arm for part in split_by_architecture(read_arm(label, Path(name)))]
    except ValueError as error:
        sys.exit(f"paper_figure.py: {error}")
    reference = next((arm for arm in arms if arm.label == args.reference), None)
    markdown, records = table(arms, reference)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(f"{args.title}\n\n{markdown}", encoding="utf-8")
    args.out.with_suffix(".json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        draw(arms, args.kind, args.panels, args.title, args.out)
    except ImportError as error:
        sys.exit(f'paper_figure.py: {error}; run: pip install "fairseq-codistill[demo]"')
    print(f"{args.title}\n\n{markdown}\n{args.out}.png, .svg, .md, .json")


if __name__ == "__main__":
    main()
