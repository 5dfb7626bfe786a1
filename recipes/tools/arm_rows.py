"""Owns the table of the arms that ``distil.sh`` and ``own_data.sh`` leave: means and spreads over seeds and models.

``python recipes/tools/arm_rows.py FOLDER`` reads FOLDER/<arm>[.seed]<seed>/<model>/ of fairseq (train.log, bleu.json)
and of codistill-vision (log.jsonl), finished models only. It writes a Markdown table and changes nothing.
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

VALID = re.compile(r"\| valid \| (\{.*\})")


def split_name(folder: str) -> tuple[str, str]:
    """Arm and seed that a folder's name says.

    >>> split_name("half0.seed2"), split_name("taught3"), split_name("teacher")
    (('half0', '2'), ('taught', '3'), ('teacher', '1'))
    """
    arm, dot, seed = folder.partition(".seed")
    if dot:
        return arm, seed
    found = re.fullmatch(r"(\D+)(\d*)", folder)
    return (found[1], found[2] or "1") if found else (folder, "1")


def figures_of(model: Path) -> dict[str, float]:
    """What a finished model reached; empty for one that is not finished."""
    if (model / "log.jsonl").exists():
        records = read((model / "log.jsonl").read_text(encoding="utf-8").splitlines())
        last = next((record for record in reversed(records) if record.get("kind") == "valid"), None)
        if last is None or records[-1].get("reason") != "finished":
            return {}
        return {"top-1 (%)": last["valid_top1"], "NLL (nats)": last["valid_loss"]}
    if not (model / "bleu.json").exists():
        return {}
    log = model / "train.log"
    found = read(VALID.findall(log.read_text(encoding="utf-8", errors="replace"))) if log.exists() else []
    best = min((float(record["valid_nll_loss"]) for record in found if "valid_nll_loss" in record), default=None)
    if best is None:
        return {}
    return {"valid NLL, best (bits)": best, "BLEU": json.loads((model / "bleu.json").read_text())["bleu"]}


def read(lines: list[str]) -> list[dict[str, Any]]:
    """Records of a log, but for lines that a running training, or a full disk, left half-written."""
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def table(folder: Path) -> list[str]:
    """Lines of the table.

    Raises:
        ValueError: nothing is finished.
    """
    arms: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    models = [path for path in folder.glob("*/*") if path.name.isdecimal()]
    for model in sorted(models, key=lambda path: (path.parent.name, int(path.name))):
        arm, seed = split_name(model.parent.name)
        for name, value in figures_of(model).items():
            arms[arm][name][seed].append(value)
    if not arms:
        raise ValueError(f"{folder} holds no finished model")
    names = list(next(iter(arms.values())))
    lines = ["| arm | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for arm, figures in arms.items():
        cells = []
        for name in names:
            means = [statistics.fmean(values) for values in figures[name].values()]  # over the models of a seed
            spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
            cells.append(f"{statistics.fmean(means):.2f}{spread}")
        lines.append(f"| {arm} | {len(figures[names[0]])} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="A table of the arms in a folder.")
    parser.add_argument("folder", type=Path)
    try:
        print("\n".join(table(parser.parse_args().folder)))
    except ValueError as error:
        sys.exit(f"arm_rows.py: {error}")


if __name__ == "__main__":
    main()
