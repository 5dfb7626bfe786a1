"""Owns finding BLEU beside the logs: the ``bleu*.json`` that recipes write into a model's folder. It scores nothing."""

import json
from pathlib import Path, PurePath

from fairseq_codistill.report.model import ModelLog, Score


def find_scores(model: ModelLog, place: Path, is_alone: bool) -> list[Score]:
    """The scores of a model, by the names of their files; that of the best checkpoint, ``bleu``, comes first.

    Args:
        model: with its files and settings.
        place: folder of the run.
        is_alone: whether it is the run's only model, whose scores may then lie in ``place``.
    """
    folders = [place / str(model.index), place / f"model-{model.index}"]
    folders += [file.parent for file in model.files]
    if "save_dir" in model.settings:  # the run may have been moved since: only the last part counts
        folders.append(place / PurePath(model.settings["save_dir"]).name)
    found: dict[str, Score] = {}
    for folder in dict.fromkeys(folders):
        if folder != place or is_alone:
            for file in sorted(folder.glob("bleu*.json")):
                if (score := _read(file)) is not None:
                    found.setdefault(score.name, score)
    return sorted(found.values(), key=lambda score: score.name)


def _read(file: Path) -> Score | None:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return Score(file.stem, float(record["bleu"]), str(record.get("signature", "")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # being written, or of something else
