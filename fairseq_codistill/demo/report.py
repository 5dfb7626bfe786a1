"""Owns the report of a run: a table, a figure and a JSON file from the logs and scores of its models.

Reads ``RUN/<model>/train.log`` and, where it exists, ``RUN/<model>/bleu.json``; writes ``report.md``, ``report.json``
and ``curves.png`` to ``RUN``. It must never train, decode or import fairseq.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend has to be chosen first

from fairseq_codistill.coordinator.meter import all_reduce_bits  # noqa: E402
from fairseq_codistill.report.runlog import RunLog, read_log  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for colour blindness
FIGURE_NAME, TABLE_NAME, JSON_NAME = "curves.png", "report.md", "report.json"


@dataclasses.dataclass
class ModelReport:
    """What is reported of one model. Bits are those of one device in one update, averaged over training."""

    model: int
    num_parameters: int
    num_updates: int
    best_valid_nll_bits: float
    best_valid_ppl: float
    bleu: float | None
    bleu_signature: str | None
    sent_megabits_per_update: float
    all_reduce_megabits_per_update: float

    @property
    def times_fewer_bits(self) -> float | None:
        if self.sent_megabits_per_update == 0:
            return None
        return self.all_reduce_megabits_per_update / self.sent_megabits_per_update


def find_models(run: Path) -> list[int]:
    """Indices of the models that left a log in ``run``.

    Raises:
        ValueError: there is none.
    """
    models = sorted(int(log.parent.name) for log in run.glob("*/train.log") if log.parent.name.isdigit())
    if not models:
        raise ValueError(f"{run} holds no <model>/train.log; give the folder that holds one folder a model")
    return models


def describe(model: int, log: RunLog, folder: Path) -> ModelReport:
    """Figures of one model from its log, and from ``bleu.json`` in ``folder`` if it was scored."""
    score_file = folder / "bleu.json"
    score = json.loads(score_file.read_text(encoding="utf-8")) if score_file.exists() else {}
    return ModelReport(
        model=model,
        num_parameters=log.num_parameters,
        num_updates=int(log.train[-1]["num_updates"]),
        best_valid_nll_bits=log.best_valid["nll_loss"],
        best_valid_ppl=round(2 ** log.best_valid["nll_loss"], 3),
        bleu=score.get("bleu"),
        bleu_signature=score.get("signature"),
        sent_megabits_per_update=round(log.megabits_per_update, 4),
        all_reduce_megabits_per_update=round(all_reduce_bits(log.num_parameters) / 1e6, 4),
    )


def table(reports: list[ModelReport]) -> str:
    """The report as Markdown."""
    lines = [
        "# Report of the run",
        "",
        "| model | test BLEU | best valid NLL (bits/token) | ppl | updates "
        "| sent, Mbit/update | all_reduce, Mbit/update | fewer bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        bleu = "not scored" if report.bleu is None else f"{report.bleu:.2f}"
        times = "-" if report.times_fewer_bits is None else f"{report.times_fewer_bits:.1f}x"
        lines.append(
            f"| {report.model} | {bleu} | {report.best_valid_nll_bits:.3f} | {report.best_valid_ppl:.2f} "
            f"| {report.num_updates} | {report.sent_megabits_per_update:.2f} "
            f"| {report.all_reduce_megabits_per_update:.2f} | {times} |"
        )
    lines += [
        "",
        "*sent*: bits counted as they left one device of the model for its peers, averaged over all updates.",
        f"*all_reduce*: what averaging gradients between servers would send instead, 2 x {reports[0].num_parameters:,} "
        "parameters x 32 bits (model 0).",
    ]
    lines += [f"sacreBLEU signature: `{s}`" for s in sorted({r.bleu_signature for r in reports if r.bleu_signature})]
    lines += ["", f"![validation curves and divergence]({FIGURE_NAME})", ""]
    return "\n".join(lines)


def plot(logs: dict[int, RunLog], path: Path) -> None:
    """Validation NLL of every model on the left, divergence from the peers on the right, both over updates."""
    figure, (valid_axis, divergence_axis) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (model, log) in enumerate(logs.items()):
        # Two models see the same divergence: dashes let the first curve show through the second.
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "label": f"model {model}",
            "linewidth": 2.4 if number == 0 else 1.6,
            "linestyle": "-" if number == 0 else (number, (4, 3)),
        }
        valid_axis.plot(*log.curve("valid", "nll_loss"), marker="o", markersize=3.5, **style)
        divergence_axis.plot(*log.curve("train_inner", "codistill_mse"), marker=".", markersize=3.5, **style)
    valid_axis.set(title="Validation", ylabel="NLL (bits per target token)", xlabel="updates")
    divergence_axis.set(
        title="Divergence of the two sides in training" if len(logs) == 2 else "Divergence from the peers in training",
        ylabel="codistill_mse (per target token)",
        xlabel="updates",
    )
    for axis in (valid_axis, divergence_axis):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_report(run: Path) -> list[ModelReport]:
    """Write all three files to ``run``.

    Raises:
        ValueError: no model left a usable log.
    """
    logs = {model: read_log(run / str(model) / "train.log") for model in find_models(run)}
    reports = [describe(model, log, run / str(model)) for model, log in logs.items()]
    records = [dataclasses.asdict(report) | {"times_fewer_bits": report.times_fewer_bits} for report in reports]
    (run / JSON_NAME).write_text(json.dumps({"models": records}, indent=2) + "\n", encoding="utf-8")
    (run / TABLE_NAME).write_text(table(reports), encoding="utf-8")
    plot(logs, run / FIGURE_NAME)
    return reports


def main() -> None:
    """Command line: ``python -m fairseq_codistill.demo.report --run DIR``. Exit code 1 below ``--min-bleu``."""
    parser = argparse.ArgumentParser(description="Report of a run: BLEU, bits, curves.")
    parser.add_argument("--run", type=Path, required=True, help="folder that holds one folder a model, named 0, 1, ...")
    parser.add_argument("--min-bleu", type=float, default=-math.inf, help="fail when a model scores below this")
    args = parser.parse_args()
    try:
        reports = write_report(args.run)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(reports))
    print(f"figure: {args.run / FIGURE_NAME}\nreport: {args.run / TABLE_NAME} and {args.run / JSON_NAME}")
    weak = [r.model for r in reports if r.bleu is not None and r.bleu < args.min_bleu]
    if weak:
        sys.exit(f"models below {args.min_bleu:g} BLEU: {', '.join(map(str, weak))}")


if __name__ == "__main__":
    main()
