"""Owns how an arm of translation is trained and what is read from it: the recipe of Multi30k, a row of figures.

Every arm trains until validation has not improved for some epochs, and is judged by its best checkpoint: what is asked
is how good it gets, not how fast. NLL is of the plain targets, without label smoothing, in bits a token; by it the best
checkpoint is chosen as well.
"""

import contextlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from grid import Row, Run
from sacrebleu.metrics import CHRF
from settings import ARMS, SETTINGS
from torch import Tensor

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/multi30k_en_de"
SPLITS = {"held_out": "valid", "test": "test"}
PATIENCE = 10  # validations without a better loss after which training ends; one an epoch of one model alone


def command(run: Run, data: Path, folder: Path, devices: list[str]) -> list[str]:
    """What trains the run, from its last checkpoint where there is one; model i in ``folder/i``.

    One model alone is trained by our task as well, so that it begins and goes through the data as the first of a pair
    does. all_reduce is one process that adds up the gradients of two batches: the same update.

    Args:
        run: that is to be trained.
        data: its folder, ``multi30k`` or ``multi30k_third``, was made by the recipe's ``prepare.sh``.
        folder: of the run.
        devices: not used: the recipe finds them.
    """
    setting, arm = SETTINGS[run.setting], ARMS[run.arm]
    train = ["env", "SCALE=small", f"SEED={run.seed}", f"PYTHON={sys.executable}", "bash", str(RECIPE / "train.sh")]
    train += ["--arm", "codistill"] if arm.models > 1 else ["--arm", "all_reduce", "--models", "1"]
    train += ["--data", str(data / setting.data), "--out", str(folder)]
    train += ["--lr", f"{run.lr:g}", "--dropout", run.regularisation.removeprefix("dropout")]
    train += ["--max-epoch", str(last_epoch(run, folder)), "--best-checkpoint-metric", "nll_loss"]
    train += ["--validate-interval", str(arm.batch)]
    if arm.models == 1:
        return [*train, "--update-freq", str(arm.batch), "--seed", str(run.first_seed())]
    train += ["--codistill-divergence", arm.divergence, "--codistill-codec", arm.codec]
    train += ["--codistill-weight", f"{run.alpha:g}", "--codistill-timeout", "1800"]
    return [*train, "--codistill-start-timeout", "1800"]


def state(run: Run, folder: Path, exit_code: int) -> str:
    """How a run that ended did so.

    Returns:
        ``complete``: validation did not improve any more. ``goes on``: it may, and the run is to be started again, for
        more epochs. ``diverged``: gradients were not finite, as they would be again. ``failed``: anything else.
    """
    logs = logs_of(run, folder)
    if exit_code != 0:
        diverged = any("FloatingPointError" in log.read_text(encoding="utf-8") for log in logs if log.exists())
        return "diverged" if diverged else "failed"
    found = [validations(log, ARMS[run.arm].batch) for log in logs]
    if not all(found):
        return "failed"
    return "complete" if min(max(one) for one in found) >= last_epoch(run, folder) else "goes on"


def last_epoch(run: Run, folder: Path) -> int:
    """The earliest epoch that training may end with, by the validations so far: ``PATIENCE`` of them after the best.

    An arm of batches twice as large makes half the updates in an epoch, and is validated every second one: all arms are
    after as many updates, and none has more chances of a lucky validation than the others. Of a pair the mean counts,
    and both go on to the same epoch: none trains on without the other. A run that was killed ends where it would have
    ended, which fairseq's own ``--patience`` does not: it begins to count anew.
    """
    batch = ARMS[run.arm].batch
    found = [validations(log, batch) for log in logs_of(run, folder)]
    means = {
        epoch: mean([float(one[epoch]["valid_nll_loss"]) for one in found])
        for epoch in sorted(set(found[0]).intersection(*found[1:]))
    }
    finite = {epoch: value if math.isfinite(value) else math.inf for epoch, value in means.items()}
    best = min(finite, key=lambda epoch: finite[epoch], default=batch)
    return min(best + PATIENCE * batch, SETTINGS[run.setting].epochs * batch)


def logs_of(run: Run, folder: Path) -> list[Path]:
    """Of its models, in their order."""
    return [folder / str(model) / "train.log" for model in range(run.num_models)]


def row(run: Run, data: Path, folder: Path) -> Row:
    """Figures of a complete run: ``held_out`` (the validation split), and ``test`` where the run is not of the tuning.

    A value is the mean over the models; ``..._models`` has each.
    """
    found: Row = {}
    folders = [folder / str(model) for model in range(run.num_models)]
    logs = [list(validations(log, ARMS[run.arm].batch).values()) for log in logs_of(run, folder)]
    held_out = [min(log, key=lambda line: float(line["valid_nll_loss"])) for log in logs]
    found["updates"] = mean([float(log[-1]["valid_num_updates"]) for log in logs])
    said = "".join(log.read_text(encoding="utf-8") for log in logs_of(run, folder))
    found["skipped_updates"] = sum(int(number) for number in re.findall(r"skipped (\d+) updates' worth", said))
    models = [{"nll_bits": float(best["valid_nll_loss"]), "epochs": float(best["epoch"])} for best in held_out]
    found["held_out"], found["held_out_models"] = means(models), models
    found["test"] = None
    if run.stage != "tune":
        models = [evaluate(one, data / SETTINGS[run.setting].data) for one in folders]
        for model, best in zip(models, held_out, strict=True):
            model["epochs"] = float(best["epoch"])
        found["test"], found["test_models"] = means(models), models
    return found


def evaluate(folder: Path, data: Path) -> dict[str, float]:
    """NLL (bits a token), BLEU and chrF of a model's best checkpoint on the test split."""
    program = Path(sys.executable).parent / "fairseq-validate"
    command = [str(program), str(data / "bin"), "--user-dir", str(ROOT / "fairseq_codistill"), "--task", "translation"]
    command += ["--path", str(folder / "checkpoint_best.pt"), "--valid-subset", "test", "--max-tokens", "4096"]
    command += ["--required-batch-size-multiple", "1", "--log-format", "json", "--num-workers", "0"]
    if not torch.cuda.is_available():
        command.append("--cpu")
    ended = subprocess.run(command, capture_output=True, text=True)
    nll = re.findall(r'"test_nll_loss": "?([0-9.]+)', ended.stdout + ended.stderr)
    if not nll:
        raise RuntimeError(f"fairseq-validate gave no NLL for {folder}: {(ended.stdout + ended.stderr)[-2000:]}")
    score = ["env", f"PYTHON={sys.executable}", "bash", str(RECIPE / "evaluate.sh"), "--data", str(data), str(folder)]
    subprocess.run(score, check=True, stdout=subprocess.DEVNULL)
    translated = (folder / "bleu.hyp").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    reference = (data / "raw/test.de").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return {
        "nll_bits": float(nll[-1]),
        "bleu": float(json.loads((folder / "bleu.json").read_text(encoding="utf-8"))["bleu"]),
        "chrf": CHRF().corpus_score(translated, [reference]).score,
    }


@torch.inference_mode()
def predictions(folder: Path, data: Path, parts: Sequence[str] = tuple(SPLITS)) -> dict[str, tuple[Tensor, Tensor]]:
    """What a model's best checkpoint says of every token after those before it, in float32, on the CPU.

    Args:
        folder: of the model.
        data: as the recipe's ``prepare.sh`` made it.
        parts: ``held_out``, ``test`` or both.

    Returns:
        by part: (num_tokens, num_words) logits, (num_tokens,) int64 targets; the same tokens in the same order for
        every model.
    """
    from fairseq.checkpoint_utils import load_model_ensemble_and_task  # seconds, which a campaign need not wait

    from fairseq_codistill.fairseq_side import compat

    compat.apply()  # so that torch reads fairseq's checkpoints
    overrides = {"data": str(data / "bin"), "task": "translation"}
    (model,), _, task = load_model_ensemble_and_task([str(folder / "checkpoint_best.pt")], arg_overrides=overrides)
    model.eval()
    found = {}
    for part in parts:
        task.load_dataset(SPLITS[part])
        batches = task.get_batch_iterator(task.dataset(SPLITS[part]), max_tokens=4096, required_batch_size_multiple=1)
        logits, targets = [], []
        for batch in batches.next_epoch_itr(shuffle=False):
            is_token = batch["target"] != task.target_dictionary.pad()
            logits.append(model(**batch["net_input"])[0][is_token])
            targets.append(batch["target"][is_token])
        found[part] = torch.cat(logits), torch.cat(targets)
    return found


def validations(path: Path, every: int = 1) -> dict[int, dict[str, Any]]:
    """fairseq's lines of validation by epoch, in order; of one that was done again after a kill the last.

    Where a full disk cut the log off epochs may be missing: they count as not validated.

    Args:
        path: of the log; one that is not there has none.
        every: epochs that are no multiple of it are left out.
    """
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if '"valid_nll_loss"' in line:
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line[line.index("{") :])
                found[int(record["epoch"])] = record
    return {epoch: found[epoch] for epoch in sorted(found) if epoch % every == 0}


def means(models: list[dict[str, float]]) -> dict[str, float]:
    """Of every figure over the models."""
    return {name: mean([model[name] for model in models]) for name in models[0]}


def mean(values: list[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)
