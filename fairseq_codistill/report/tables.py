"""Owns the parts of the page that are text: results, states, links to logs, incidents, settings, each as HTML."""

import html
import os
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path

from fairseq_codistill.report.runs import Run, printable
from fairseq_codistill.report.standing import ModelStanding, PeerView, Standing
from fairseq_codistill.report.state import State
from fairseq_codistill.report.summary import EXPLAINED, Summary, number, table

MAX_INCIDENTS = 200
WORDS = ("run", "model", "state")  # columns that are not figures
NOTHING = "–"


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


def heading(run: Run, its_state: State, link: Callable[[Path], str]) -> str:
    """Name and state of a run, and links to its logs."""
    files = dict.fromkeys(file for model in run.models for file in model.files)
    links = ", ".join(f'<a href="{link(file)}">{text(_short(file, files))}</a>' for file in files)
    # A live run has something to say only of models that are not.
    style = "stopped" if its_state.word == "live" else its_state.word
    why = f'<p class="{style}">{text(its_state.why)}</p>' if its_state.why else ""
    return f'<h2>{text(run.name)} {state(its_state)}</h2>{why}<p class="quiet">Logs: {links}</p>'


def side_by_side(stands: Standing) -> str:
    """How the models of a run stand, a column each; a row that no model has anything for is left out."""
    head = "".join(f'<th scope="col">model {text(model.log.label)}</th>' for model in stands.models)
    body = "".join(
        f'<tr><th scope="row">{title}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for title, cells in ((title, [make(model) for model in stands.models]) for title, make in SIDE_BY_SIDE)
        if any(cell != NOTHING for cell in cells)
    )
    return f'<table class="now"><tr><td></td>{head}</tr>{body}</table>'


def _throughput(unit: str) -> Callable[[ModelStanding], str]:
    def cell(model: ModelStanding) -> str:
        found = model.throughput
        return NOTHING if found is None or found[1] != unit else f"{found[0]:,.0f}"

    return cell


def _peers(model: ModelStanding) -> str:
    """One mark a state, with the numbers of the models that are in it."""
    states = dict.fromkeys(view.state for view in model.peers)
    return " ".join(_mark(word, [view for view in model.peers if view.state == word]) for word in states) or NOTHING


def _mark(word: str, views: list[PeerView]) -> str:
    said = "\n".join(
        f"{view.model}: " + (" ".join(part for part in (view.when, view.why) if part) or "nothing was said of it")
        for view in views
    )
    numbers = ", ".join(str(view.model) for view in views)
    return f'<span class="peer {word}" title="{text(said)}"><b>{numbers}</b> {word}</span>'


def _in_all(megabits: float) -> str:
    """Bits that were sent, in a unit that leaves few digits."""
    return NOTHING if not megabits else f"{megabits / 1000:,.4g} Gbit" if megabits >= 1000 else f"{megabits:,.4g} Mbit"


SIDE_BY_SIDE: tuple[tuple[str, Callable[[ModelStanding], str]], ...] = (
    ("state", lambda model: state(model.state)),
    ("updates", lambda model: f"{model.log.num_updates:,}"),
    ("epoch", lambda model: number(model.epoch)),
    ("updates a second", lambda model: number(model.updates_per_s)),
    ("target tokens a second", _throughput("tokens/s")),
    ("images a second", _throughput("images/s")),
    ("training loss", lambda model: number(model.train_loss)),
    ("validation", lambda model: number(model.valid)),
    ("best validation", lambda model: number(model.best)),
    ("agreement", lambda model: number(model.agreement)),
    ("divergence", lambda model: number(model.divergence)),
    ("weight of the peers, α", lambda model: number(model.weight)),
    ("wait, ms an update", lambda model: number(model.wait_ms)),
    ("sent, Mbit an update", lambda model: number(model.sent_megabits_per_update)),
    ("sent in all", lambda model: _in_all(model.sent_megabits)),
    ("peers that taught", lambda model: number(model.num_peers)),
    ("what it says of its peers", _peers),
)


def last_warnings(stands: Standing) -> str:
    """The newest lines that a person should see, the newest first."""
    if not stands.warnings:
        return ""
    rows = "".join(
        f'<tr class="{text(one.level)}"><td>{text(one.when)}</td><td>{text(one.model)}</td><td>{text(one.what)}</td>'
        "</tr>"
        for one in stands.warnings
    )
    head = "<tr><th>when</th><th>model</th><th>what its log says</th></tr>"
    return f'<h3>Last warnings</h3><table class="warnings">{head}{rows}</table>'


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
        f'<details data-key="incidents {text(run.name)}"><summary>Peers that came or went, and warnings: {len(rows):,}'
        f"</summary><table><tr><th>model</th><th>when</th><th>what its log says</th></tr>{body}</table>{left_out}"
        "</details>"
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
    everything = (
        f'<details data-key="settings {text(run.name)}"><summary>All {len(names)} settings</summary>'
        f"<table>{head}{rows(names)}</table></details>"
    )
    return (f"<h3>Settings that differ</h3>{shown}" if len(run.models) > 1 else "") + everything


def text(value: str) -> str:
    """``value`` with what HTML would take for its own escaped."""
    return html.escape(str(value))


def relative(file: Path, out: Path) -> str:
    """The link to a file from a page in the folder ``out``."""
    path = Path(os.path.relpath(file.resolve(), out.resolve())).as_posix()
    link = urllib.parse.quote(os.fsencode(path))
    return html.escape(link if link.startswith(".") else f"./{link}")  # or a colon in a name would end a scheme


def _short(file: Path, files: Iterable[Path]) -> str:
    """``model-0.log``, or ``0/train.log`` where several have the same name."""
    is_one = sum(other.name == file.name for other in files) == 1
    return printable(file.name if is_one else f"{file.parent.name}/{file.name}")
