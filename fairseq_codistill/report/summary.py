"""Owns the row of figures that a report gives for each model: in the page, on the terminal and in ``report.json``."""

import dataclasses
from typing import Any

from fairseq_codistill.coordinator.meter import all_reduce_bits
from fairseq_codistill.report.model import NLL, ModelLog
from fairseq_codistill.report.runs import Run
from fairseq_codistill.report.state import State, model_state

EXPLAINED = (
    "Sent: counted as it left one device, averaged over all updates. all_reduce: 2 × parameters × 32 bits, what "
    "averaging gradients between servers would send."
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """One model. Bits are those of one device in one update, averaged over training."""

    run: str
    log: ModelLog
    state: State

    @property
    def sent_megabits_per_update(self) -> float:
        return self.log.sent_megabits_per_update

    @property
    def all_reduce_megabits_per_update(self) -> float:
        return all_reduce_bits(self.log.num_parameters) / 1e6

    @property
    def times_fewer_bits(self) -> float | None:
        sent, reduced = self.sent_megabits_per_update, self.all_reduce_megabits_per_update
        return reduced / sent if sent and reduced else None

    @property
    def bleu(self) -> float | None:
        """Of the best checkpoint; None if it was not scored."""
        return next((score.bleu for score in self.log.scores if score.name == "bleu"), None)

    def record(self) -> dict[str, Any]:
        """For ``report.json``."""
        best, scores = self.log.best(), self.log.scores
        record: dict[str, Any] = {
            "run": self.run,
            "model": self.log.index,
            "name": self.log.name,
            "state": self.state.word,
            "state_why": self.state.why,
            "num_parameters": self.log.num_parameters,
            "num_updates": self.log.num_updates,
            "metric": self.log.metric.label,
            "best": best,
            "last": self.log.last("valid", self.log.metric.key),
            "bleu": self.bleu,
            "bleu_signature": next((score.signature for score in scores if score.name == "bleu"), None),
            "scores": {score.name: score.bleu for score in scores},
            "sent_megabits_per_update": round(self.sent_megabits_per_update, 4),
            "all_reduce_megabits_per_update": round(self.all_reduce_megabits_per_update, 4),
            "times_fewer_bits": self.times_fewer_bits,
        }
        if self.log.metric == NLL and best is not None:
            record |= {"best_valid_nll_bits": best, "best_valid_ppl": round(2.0 ** min(best, 1023.0), 3)}
        return record


def summarise(run: Run, now: float) -> list[Summary]:
    """The models of a run, as they are at ``now``."""
    return [Summary(run.name, model, model_state(model, now)) for model in run.models]


def table(summaries: list[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of models with the same metric. A column that no model has anything for is left out."""
    metric = summaries[0].log.metric
    names = sorted({score.name for summary in summaries for score in summary.log.scores})
    header = ["run", "model", "state", "updates", f"best {metric.label}", "last", "last training loss"]
    header += ["agreement", *(_score_title(name) for name in names)]
    header += ["sent by a device, Mbit an update", "all_reduce would send", "fewer bits"]
    rows = []
    for summary in summaries:
        log, scores = summary.log, {score.name: score.bleu for score in summary.log.scores}
        times = summary.times_fewer_bits
        row = [summary.run, log.label, summary.state.word, f"{log.num_updates:,}", number(log.best())]
        row += [number(log.last("valid", metric.key)), number(log.last("train", "nll_loss"))]
        row += [number(log.last_agreement), *(f"{scores[name]:.2f}" if name in scores else "–" for name in names)]
        row += [number(summary.sent_megabits_per_update or None)]
        row += [number(summary.all_reduce_megabits_per_update or None), f"{times:,.1f}×" if times else "–"]
        rows.append(row)
    kept = [column for column in range(len(header)) if any(row[column] != "–" for row in rows)]
    return [header[column] for column in kept], [[row[column] for column in kept] for row in rows]


def markdown(summaries: list[Summary]) -> str:
    """The table for a terminal or a README."""
    header, rows = table(summaries)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
    signatures = {score.signature for summary in summaries for score in summary.log.scores if score.signature}
    return "\n".join([*lines, "", EXPLAINED, *(f"sacreBLEU signature: `{text}`" for text in sorted(signatures))])


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "–" if value is None else f"{value:,.4g}"


def _score_title(name: str) -> str:
    return "test BLEU" if name == "bleu" else f"BLEU ({name.removeprefix('bleu_')})"
