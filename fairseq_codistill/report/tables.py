"""Owns the parts of the page that are text: results, states, links to logs, incidents, settings, each as HTML."""

import html
import os
from collections.abc import Iterable
from pathlib import Path

from fairseq_codistill.report.runs import Run
from fairseq_codistill.report.state import State
from fairseq_codistill.report.summary import EXPLAINED, Summary, table

MAX_INCIDENTS = 200
WORDS = ("run", "model", "state")  # columns that are not figures


def results(summaries: list[Summary]) -> str:
    """The table of models with the same metric, and what its figures mean."""
    header, rows = table(summaries)
    kinds = ["" if title in WORDS else ' class="number"' for title in header]
    head = "".join(f"<th{kind}>{text(title)}</th>" for kind, title in zip(kinds, header, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{state(State(cell)) if title == 'state' else text(cell)}</td>"
            for kind, title, cell in zip(kinds, header, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    signatures = sorted({score.signature for one in summaries for score in one.log.scores if score.signature})
    told = f" BLEU: sacreBLEU, {', '.join(f'<code>{text(one)}</code>' for one in signatures)}." if signatures else ""
    return f'<table class="results"><tr>{head}</tr>{body}</table><p class="quiet">{EXPLAINED}{told}</p>'


def heading(run: Run, its_state: State, out: Path) -> str:
    """Name and state of a run, and links to its logs, relative to the page in ``out``."""
    files = dict.fromkeys(file for model in run.models for file in model.files)
    links = ", ".join(f'<a href="{_link(file, out)}">{text(_short(file, files))}</a>' for file in files)
    why = f'<p class="{its_state.word}">{text(its_state.why)}</p>' if its_state.why else ""
    return f'<h2>{text(run.name)} {state(its_state)}</h2>{why}<p class="quiet">Logs: {links}</p>'


def state(its_state: State) -> str:
    """The word of a state, in its colour."""
    return f'<span class="state {its_state.word}">{text(its_state.word)}</span>'


def incidents(run: Run) -> str:
    """Peers that came or went, and warnings; the first of them where there are many."""
    rows = [(model.label, *incident) for model in run.models for incident in model.incidents]
    if not rows:
        return '<p class="quiet">No peer came or went, and nothing was warned of.</p>'
    left_out = f"<p>{len(rows) - MAX_INCIDENTS:,} more are in the logs.</p>" if len(rows) > MAX_INCIDENTS else ""
    body = "".join(
        f'<tr class="{text(level)}"><td>{text(label)}</td><td>{text(when)}</td><td>{text(what)}</td></tr>'
        for label, when, level, what in rows[:MAX_INCIDENTS]
    )
    return (
        f"<details><summary>Peers that came or went, and warnings: {len(rows):,}</summary><table><tr><th>model</th>"
        f"<th>when</th><th>what its log says</th></tr>{body}</table>{left_out}</details>"
    )


def settings(run: Run) -> str:
    """Those that differ between the models first; then all, folded away."""
    names = sorted(set().union(*(model.settings for model in run.models)))
    if not names:
        return '<p class="quiet">The logs name no settings.</p>'
    values = {name: [model.settings.get(name, "–") for model in run.models] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    head = "<tr><th>setting</th>" + "".join(f"<th>model {text(model.label)}</th>" for model in run.models) + "</tr>"

    def rows(chosen: Iterable[str]) -> str:
        return "".join(
            f"<tr><td><code>{text(name)}</code></td>" + "".join(f"<td>{text(v)}</td>" for v in values[name]) + "</tr>"
            for name in chosen
        )

    shown = f"<table>{head}{rows(differing)}</table>" if differing else "<p>All models have the same settings.</p>"
    everything = f"<details><summary>All {len(names)} settings</summary><table>{head}{rows(names)}</table></details>"
    return (f"<h3>Settings that differ</h3>{shown}" if len(run.models) > 1 else "") + everything


def text(value: str) -> str:
    """``value`` with what HTML would take for its own escaped."""
    return html.escape(str(value))


def _link(file: Path, out: Path) -> str:
    return html.escape(Path(os.path.relpath(file.resolve(), out.resolve())).as_posix().replace("%", "%25"))


def _short(file: Path, files: Iterable[Path]) -> str:
    """``model-0.log``, or ``0/train.log`` where several have the same name."""
    return file.name if sum(other.name == file.name for other in files) == 1 else f"{file.parent.name}/{file.name}"
