"""Owns ``codistill-report``: from the logs of runs, one self-contained HTML page, and its figures as PNG files."""

import argparse
import base64
import html
from collections.abc import Sequence
from pathlib import Path

from fairseq_codistill import __version__
from fairseq_codistill.coordinator.meter import all_reduce_bits
from fairseq_codistill.report.runs import ModelLog, Run, find_runs

MAX_INCIDENTS = 200
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #d8d8d8; padding: .3em .8em; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; }
code { font-size: 90%; }
summary { cursor: pointer; }
.WARNING { color: #8a4b00; } .ERROR { color: #a00000; }
"""


def write_page(folder: Path, out: Path) -> list[Path]:
    """Write ``report.html`` and its figures.

    Args:
        folder: a run, or a folder of runs.
        out: folder for the files; made if need be.

    Returns:
        the files, the page first.

    Raises:
        ValueError: ``folder`` holds no run.
    """
    from fairseq_codistill.report.figures import draw_comparison, draw_run  # matplotlib is an extra

    runs = find_runs(folder)
    out.mkdir(parents=True, exist_ok=True)
    parts, files = [f"<h1>{_text(folder.resolve().name)}</h1>"], []
    for kind in dict.fromkeys(run.models[0].metric for run in runs):
        alike = [run for run in runs if run.models[0].metric == kind]
        parts.append(_results_table(alike))
        if len(alike) > 1:
            files.append(out / f"comparison_{kind.key}.png")
            draw_comparison(alike, files[-1])
            parts.append(_image(files[-1], "all runs: " + kind.label))
    for number, run in enumerate(runs):
        files.append(out / f"run_{number}.png")
        draw_run(run, files[-1])
        parts += [f"<h2>{_text(run.name)}</h2>", _image(files[-1], "curves of " + run.name)]
        parts += [_incidents(run), _settings(run)]
    page = out / "report.html"
    page.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(folder.resolve().name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    return [page, *files]


def _results_table(runs: list[Run]) -> str:
    metric = runs[0].models[0].metric
    header = [
        "run", "model", "updates", f"best {metric.label}", "last", "last training loss", "agreement",
        "sent by a device, Mbit an update", "all_reduce would send", "fewer bits",
    ]  # fmt: skip
    rows = [_result_cells(run.name, model) for run in runs for model in run.models]
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"number" if i > 1 else ""}">{_text(c)}</td>' for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{''.join(f'<th>{_text(name)}</th>' for name in header)}</tr>{body}</table>" + (
        "<p>Sent: counted as it left one device, averaged over all updates. all_reduce: 2 × parameters × 32 bits, what "
        "averaging gradients between servers would send.</p>"
    )


def _result_cells(run: str, model: ModelLog) -> list[str]:
    sent = model.sent_megabits()[1][-1] / max(model.num_updates, 1)
    reduce = all_reduce_bits(model.num_parameters) / 1e6
    return [
        run,
        str(model.index),
        f"{model.num_updates:,}",
        _number(model.best()),
        _number(model.last("valid", model.metric.key)),
        _number(model.last("train", "nll_loss")),
        _number(model.last_agreement),
        _number(sent or None),
        _number(reduce or None),
        f"{reduce / sent:,.1f}×" if sent and reduce else "–",
    ]


def _incidents(run: Run) -> str:
    rows = [(model.index, *incident) for model in run.models for incident in model.incidents]
    if not rows:
        return "<p>No peer came or went, and nothing was warned of.</p>"
    left_out = f"<p>{len(rows) - MAX_INCIDENTS:,} more are in the logs.</p>" if len(rows) > MAX_INCIDENTS else ""
    body = "".join(
        f'<tr class="{_text(level)}"><td>{index}</td><td>{_text(when)}</td><td>{_text(what)}</td></tr>'
        for index, when, level, what in rows[:MAX_INCIDENTS]
    )
    return (
        f"<details><summary>Peers that came or went, and warnings: {len(rows):,}</summary><table><tr><th>model</th>"
        f"<th>when</th><th>what its log says</th></tr>{body}</table>{left_out}</details>"
    )


def _settings(run: Run) -> str:
    """Those that differ between the models first; then all, folded away."""
    names = sorted(set().union(*(model.settings for model in run.models)))
    if not names:
        return "<p>The logs name no settings.</p>"
    values = {name: [model.settings.get(name, "–") for model in run.models] for name in names}
    differing = [name for name in names if len(set(values[name])) > 1]
    head = "<tr><th>setting</th>" + "".join(f"<th>model {model.index}</th>" for model in run.models) + "</tr>"

    def rows(chosen: list[str]) -> str:
        return "".join(
            f"<tr><td><code>{_text(name)}</code></td>" + "".join(f"<td>{_text(v)}</td>" for v in values[name]) + "</tr>"
            for name in chosen
        )

    shown = f"<table>{head}{rows(differing)}</table>" if differing else "<p>All models have the same settings.</p>"
    everything = f"<details><summary>All {len(names)} settings</summary><table>{head}{rows(names)}</table></details>"
    return (f"<h3>Settings that differ</h3>{shown}" if len(run.models) > 1 else "") + everything


def _image(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{_text(description)}" src="data:image/png;base64,{data}"></p>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}"


def _text(value: str) -> str:
    return html.escape(str(value))


def main(argv: Sequence[str] | None = None) -> None:
    """Console script ``codistill-report``."""
    parser = argparse.ArgumentParser(
        prog="codistill-report",
        description="One HTML page of a training, or of all trainings in a folder, from their logs: curves, divergence "
        "and agreement, bits, waits, peers that came or went, settings. Training may still be going on.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "folder", type=Path, help="folder with a folder for each model (0, 1, ...), or a folder of those"
    )
    parser.add_argument("--out", type=Path, help="where to put report.html and its figures; default: FOLDER/report")
    options = parser.parse_args(argv)
    try:
        files = write_page(options.folder, options.out or options.folder / "report")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f'{error}; install the figures\' library with: pip install "fairseq-codistill[demo]"')
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
