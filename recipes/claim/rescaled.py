"""Owns two controls that the plan did not have, from what final runs left: temperatures, and two models as one.

``python recipes/claim/rescaled.py --runs DIR --data DATA --out results/claim`` writes ``rescaled.jsonl`` and
``rescaled.md``. A model that over-fits is too sure of itself, which one number mends: predictions divided by the
temperature that fits held-out images best (Guo et al. 2017). And who trains two models may also let them predict
together, whether they taught each other or not. It trains nothing, and leaves out runs without predictions (images)
or checkpoints (text, whose predictions are too large to keep); what ``rescaled.jsonl`` has of them already stays.
"""

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import text
import torch
from evaluate import expected_calibration_error, figures, log_mean_probability
from grid import Row, Run, by_seed, run_of
from images import PARTS, mean
from scipy.optimize import minimize_scalar
from settings import ARMS, SETTINGS
from summary import Sample, interval, others_of, paired_shown, read_rows, shown
from torch import Tensor
from torchvision.datasets import ImageFolder

from fairseq_codistill.whole_files import whole_file

GROUPS = (("a", "a_heavy"), ("a_few",), ("text_third",))  # settings that differ in regularisation alone
SHOWN = {"top1": 2, "nll": 4, "ece": 2, "temperature": 3, "nll_rescaled": 4, "ece_rescaled": 2}
HEADS = "top-1 (%) | NLL ({}) | ECE (%) | temperature | NLL, rescaled | ECE, rescaled"
IN_NLL = ("nll", "nll_rescaled", "held_out_nll_rescaled")
HIGHEST_TEMPERATURE = 20.0
NUM_BEST = 3  # points of the tuning that are shown of an arm


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The number that logits have to be divided by for the lowest NLL of these images.

    Args:
        logits: (num_images, num_classes).
        targets: (num_images,) int64.

    Source: Guo et al. 2017, section 4.2.
    """

    def nll(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / math.exp(log_temperature), targets))

    end = math.log(HIGHEST_TEMPERATURE)
    return math.exp(minimize_scalar(nll, bounds=(-end, end), method="bounded", options={"xatol": 1e-6}).x)


def rescaled(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, float]:
    """Figures of the test images, as they are and with the temperature that fits the held-out ones.

    Args:
        logits: (num_images, num_classes) of ``held_out`` and ``test``.
        targets: (num_images,) likewise.
    """
    temperature = fit_temperature(logits["held_out"], targets["held_out"])
    parts = {part: logits[part] / temperature for part in PARTS}
    nll = {part: float(torch.nn.functional.cross_entropy(parts[part], targets[part])) for part in PARTS}
    return {
        **figures(logits["test"], targets["test"]),
        "temperature": temperature,
        "nll_rescaled": nll["test"],
        "ece_rescaled": 100 * expected_calibration_error(parts["test"], targets["test"]),
        "held_out_nll_rescaled": nll["held_out"],
    }


def in_halves(logits: Tensor, targets: Tensor) -> float:
    """NLL of each half of some images with the temperature that fits the other half: for what was tuned on them.

    Args:
        logits: (num_images, num_classes).
        targets: (num_images,) int64, in any order: halves are drawn.
    """
    drawn = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    first, second = drawn[::2], drawn[1::2]
    nll = [
        torch.nn.functional.cross_entropy(logits[there] / fit_temperature(logits[here], targets[here]), targets[there])
        for here, there in ((first, second), (second, first))
    ]
    return float(sum(nll)) / 2


def rows_of(runs: Path, data: Path) -> list[Row]:
    """Rows of the runs that left what is asked here: of the final ones the mean of each model, and two together; of the
    tuning the held-out part alone.
    """
    found: list[Row] = []
    alone: dict[Run, dict[str, Tensor]] = {}
    for row in read_rows(runs):
        if row.get("diverged"):  # whatever it left
            continue
        run = run_of(row)
        parts = [part for part in PARTS if part == "held_out" or run.stage == "final"]
        read = {"images": of_images, "text": of_text}[SETTINGS[run.setting].kind]
        models, targets = read(run, runs / run.name, data / SETTINGS[run.setting].data, parts)
        if not models:
            continue
        one = {key: row[key] for key in ("setting", "stage", "arm", "seed", "init", "lr", "regularisation", "alpha")}
        if run.stage == "tune":
            each = [in_halves(model["held_out"], targets["held_out"]) for model in models]
            found.append(in_its_unit(one | {"models": 1, "held_out_nll_rescaled": mean(each)}))
            continue
        each = [rescaled(model, targets) for model in models]
        found.append(in_its_unit(one | {"models": 1, **{key: mean([model[key] for model in each]) for key in each[0]}}))
        if run.arm == "plain":  # the other of its seed begins where the second model of a pair does
            other = alone.pop(dataclasses.replace(run, init=1 - run.init), None)
            if other is None:
                alone[run] = models[0]
            else:
                models.append(other)
        if len(models) == 2:
            both = {part: log_mean_probability([model[part] for model in models]) for part in PARTS}
            found.append(in_its_unit(one | {"models": 2, **rescaled(both, targets)}))
    return found


Predicted = tuple[list[dict[str, Tensor]], dict[str, Tensor]]


def of_images(run: Run, folder: Path, data: Path, parts: list[str]) -> Predicted:
    """Logits of each model, by part, and targets, by part; no models where the run left no predictions."""
    files = {part: folder / f"{part}.logits.pt" for part in parts}
    if not all(map(Path.exists, files.values())):
        return [], {}
    logits = {part: torch.load(file, weights_only=True).double() for part, file in files.items()}
    return [{part: logits[part][i] for part in parts} for i in range(run.num_models)], labels_of(data)


@functools.cache
def labels_of(data: Path) -> dict[str, Tensor]:
    """(num_images,) int64 of each part of a folder of images."""
    return {part: torch.tensor(ImageFolder(str(data / name)).targets) for part, name in PARTS.items()}


def of_text(run: Run, folder: Path, data: Path, parts: list[str]) -> Predicted:
    """As :func:`of_images`, of the best checkpoints; a token is what an image is there."""
    folders = [folder / str(model) for model in range(run.num_models)]
    if not all((one / "checkpoint_best.pt").exists() for one in folders):
        return [], {}
    found = [text.predictions(one, data, parts) for one in folders]
    logits = [{part: logits for part, (logits, _) in one.items()} for one in found]
    return logits, {part: targets for part, (_, targets) in found[0].items()}


def in_its_unit(row: Row) -> Row:
    """NLL of text in bits, as in the other tables, in place of nats."""
    unit = math.log(2) if SETTINGS[row["setting"]].kind == "text" else 1.0
    return row | {key: row[key] / unit for key in IN_NLL if key in row}


def chosen(rows: list[Row], settings: tuple[str, ...], num_models: int) -> dict[str, list[Row]]:
    """The rows of each arm, at the point of its final runs that held-out images prefer once they are rescaled.

    A point of which seeds are missing is left out: it would win by the luck of those that are there.
    """
    found = {}
    for arm in ARMS:
        points: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            what = (row["stage"], row["arm"], row["models"])
            if row["setting"] in settings and what == ("final", arm, num_models):
                points.setdefault((row["setting"], row["lr"], row["regularisation"], row["alpha"]), []).append(row)
        points = {point: some for point, some in points.items() if has_all_seeds(some)}
        if points:
            found[arm] = min(points.values(), key=lambda some: mean([row["held_out_nll_rescaled"] for row in some]))
    return found


def has_all_seeds(rows: list[Row]) -> bool:
    """Whether rows of one point of an arm are those of every seed of its setting; of one model, of both starts."""
    inits = (0, 1) if (rows[0]["arm"], rows[0]["models"]) == ("plain", 1) else (0,)
    wanted = {(seed, init) for seed in SETTINGS[rows[0]["setting"]].seeds for init in inits}
    return {(row["seed"], row["init"] if len(inits) > 1 else 0) for row in rows}.issuperset(wanted)


def lines_of(found: dict[str, list[Row]], unit: str, name: str = "{}") -> list[str]:
    """A table of arms, and how far each is ahead of the first two."""
    lines = [f"| | learning rate, regularisation, α | seeds | {HEADS.format(unit)} |", "|---" * (3 + len(SHOWN)) + "|"]
    values: dict[str, Sample] = {}
    for arm, rows in found.items():
        cells = []
        for key, digits in SHOWN.items():
            cells.append(shown(Sample(by_seed([(row, row[key]) for row in rows])), digits))
        values[arm] = Sample(by_seed([(row, row["nll_rescaled"]) for row in rows]))
        lines.append(
            f"| {name.format(arm)} | {point_of(rows[0])} | {len(values[arm].values)} | " + " | ".join(cells) + " |"
        )
    lines.append("")
    for arm in values:
        for other in others_of(arm):
            if other in values:
                below, low, high = interval(values[other], values[arm])
                lines.append(
                    f"- {name.format(arm)}: rescaled NLL {below:+.4f} (95 %: {low:+.4f} to {high:+.4f}"
                    f"{paired_shown(values[other], values[arm], 4)}) below that of {name.format(other)}."
                )
    return lines


def page(rows: list[Row]) -> str:
    """Markdown of all rows."""
    lines = ["# Predictions that are rescaled, and two models that predict together", ""]
    lines += [
        "Not in the plan: made afterwards, from the predictions of its final runs. Every model's logits are divided by "
        "one temperature, which fits the held-out images best; figures are of the test images, ± the standard error "
        "over seeds. Of several points of an arm that which is best on held-out images then. In text, tokens stand for "
        "images.",
        "",
    ]
    for settings in GROUPS:
        if not any(row["setting"] in settings for row in rows):
            continue
        unit = {"images": "nats", "text": "bits"}[SETTINGS[settings[0]].kind]
        for num_models, name in ((1, "{}"), (2, "two models, {}")):
            if found := chosen(rows, settings, num_models):
                what = "each model" if num_models == 1 else "two models together (the mean of their probabilities)"
                lines += [f"## {' or '.join(settings)}: {what}", "", *lines_of(found, unit, name), ""]
        tuned = [row for row in rows if row["stage"] == "tune" and row["setting"] in settings]
        lines += [f"## {' or '.join(settings)}: tuning", ""]
        lines += [
            "One seed, held-out images, each half with the temperature of the other: whether a point that was not "
            "chosen would have been by this. Of each arm the three best of those that left predictions.",
            "",
            "| | learning rate, regularisation, α | NLL, rescaled |",
            "|---|---|---|",
        ]
        for arm in ARMS:
            mine = [row for row in tuned if row["arm"] == arm]
            for row in sorted(mine, key=lambda row: row["held_out_nll_rescaled"])[:NUM_BEST]:
                lines.append(f"| {arm} | {point_of(row)} | {row['held_out_nll_rescaled']:.4f} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def point_of(row: Row) -> str:
    """Learning rate, regularisation and, where there is one, alpha."""
    return f"{row['lr']:g}, {row['regularisation']}" + (f", {row['alpha']:g}" if row["alpha"] else "")


def joined(before: list[Row], now: list[Row]) -> list[Row]:
    """What is known of all runs: a row of a run that left nothing any more stays as it was.

    Args:
        before: rows that were there.
        now: rows of the runs that can be read.
    """

    def what(row: Row) -> tuple[Any, ...]:
        same = ("setting", "stage", "arm", "seed", "lr", "regularisation", "alpha", "models")
        # Of two that predict together the row has the start of whichever ended last.
        return (*(row[key] for key in same), row["init"] if row["models"] == 1 else None)

    return list({what(row): row for row in [*before, *now]}.values())


def main() -> None:
    """Write rows and tables."""
    parser = argparse.ArgumentParser(description="NLL of the final runs with fitted temperatures.")
    parser.add_argument("--runs", type=Path, required=True, help="folder that run.py was given")
    parser.add_argument("--data", type=Path, required=True, help="data that run.py was given")
    parser.add_argument("--out", type=Path, required=True, help="folder for rescaled.jsonl and rescaled.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "rescaled.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = joined([json.loads(line) for line in lines], rows_of(args.runs, args.data))
    with whole_file(file) as new:  # what it has of runs that left nothing is nowhere else
        new.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    (args.out / "rescaled.md").write_text(page(rows), encoding="utf-8")
    print(page(rows))


if __name__ == "__main__":
    main()
