"""Owns how an arm of images is trained and what is read from it: options of ``codistill-vision``, a row of figures."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from evaluate import figures, load_folder, log_mean_probability, predict
from grid import Row, Run
from settings import ARMS, SETTINGS

# The tuned drops (18, 38, 44 of 45 epochs) and Goyal's warm-up (5 of 90), as shares of the training.
DROPS = (18 / 45, 38 / 45, 44 / 45)
WARM_UP = 5 / 90
WEIGHT_DECAYS = {  # at the start, from the first drop of the learning rate on, from the second on
    "wd1e-4": (1e-4, 1e-4, 1e-4),
    "wd5e-4": (5e-4, 5e-4, 5e-4),
    "wd1e-3": (1e-3, 1e-3, 1e-3),
    "wd2e-3": (2e-3, 2e-3, 2e-3),
    "wd1e-4-falling": (1e-4, 1e-5, 0.0),
    "wd5e-4-falling": (5e-4, 1e-5, 0.0),
}
TRAINED = ("nll_loss", "distance", "codistill_agreement", "codistill_mbit", "codistill_mse")
DIVERGED = ("failed: the loss was not finite", "failed: parameters are not finite")  # reasons in the log
PARTS = {"held_out": "val", "test": "test"}  # name in the rows -> folder

_images: dict[Path, Any] = {}  # read once: a campaign evaluates on the same ones again and again


def options(run: Run, data: Path) -> list[str]:
    """Options of ``codistill-vision`` for every model of the run; seed, folder and peers apart.

    Args:
        run: that is to be trained.
        data: folder that holds ``<train_images>/train``, ``val`` and ``test``.
    """
    setting, arm = SETTINGS[run.setting], ARMS[run.arm]
    epochs, batch = setting.epochs * arm.updates, setting.batch_size * arm.batch
    # As many updates in every arm, also where a batch does not divide the images. An epoch here is one of those of one
    # model alone; an arm with m times the images an update goes through the data m times in it.
    stretch = setting.updates_per_epoch / (setting.train_images // (batch * arm.devices))
    drops = [f"{share * epochs:.6g}" for share in DROPS]
    decays = [f"{value:g}" for value in WEIGHT_DECAYS[run.regularisation]]
    made = {
        "--dataset": [f"cifar10:{data / setting.data}"], "--model": [setting.model],
        "--augmentation": ["cifar"], "--image-size": [str(setting.image_size)], "--batch-size": [str(batch)],
        "--epochs": [str(epochs)], "--stretch": [f"{stretch:.6g}"], "--optimizer": ["sgd"], "--momentum": ["0.9"],
        "--lr": [f"{run.lr:g}"], "--lr-batch-size": ["0"], "--warmup-epochs": [f"{WARM_UP * epochs:.6g}"],
        "--warmup-lr": [f"{min(run.lr, 0.1):g}"], "--lr-schedule": ["step"], "--lr-milestones": drops,
        "--lr-decay": ["0.1"], "--weight-decay": decays, "--weight-decay-milestones": drops[:2],
        "--amp": ["bf16"], "--eval-epochs": [f"{epochs / 3:.6g}"], "--save-updates": ["60"],
        "--log-updates": ["117"], "--codistill-data-seed": [str(run.seed)],
    }  # fmt: skip
    if arm.models > 1:
        made |= {
            "--codistill-divergence": [arm.divergence], "--codistill-codec": [arm.codec],
            "--codistill-weight": [f"{run.alpha:g}"], "--codistill-require-peers": ["always"],
            # The ranks of a model wait for each other for no longer than 600 s (NCCL) or 1,800 (gloo).
            "--codistill-timeout": ["3600" if arm.devices == 1 else "400"], "--codistill-start-timeout": ["3600"],
            "--codistill-burn-in": [str(round(arm.burn_in * epochs * setting.updates_per_epoch))],
            "--codistill-temperature": [f"{arm.temperature:g}"],
        }  # fmt: skip
    flat = [word for flag, values in made.items() for word in (flag, *values)]
    return [*flat, "--channels-last", "--no-progress-bar"]


def command(run: Run, data: Path, folder: Path, devices: list[str]) -> list[str]:
    """What trains the run, from its last checkpoint where there is one; model i in ``folder/i``.

    Args:
        run: as in :func:`options`.
        data: as in :func:`options`.
        folder: of the run.
        devices: options for the device, such as ``--cpu``.
    """
    arm = ARMS[run.arm]
    if run.setting == "smoke" and "--cpu" not in devices and torch.cuda.device_count() < arm.devices:
        devices = [*devices, "--cpu"]  # ranks of one model cannot share a GPU
    train = [sys.executable, "-m", "fairseq_codistill.vision.train", *options(run, data), *devices]
    if arm.models * arm.devices == 1:
        return [*train, "--seed", str(run.first_seed()), "--save-dir", str(folder / "0")]
    launch = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", str(arm.models)]
    launch += ["--devices-per-model", str(arm.devices), "--log-dir", "none", "--grace-s", "60"]
    if "--cpu" not in devices:
        launch.append("--share-devices")
    return [*launch, "--", *train, "--seed", f"{{model+{run.first_seed()}}}", "--save-dir", str(folder / "{model}")]


def state(run: Run, folder: Path, exit_code: int) -> str:
    """How a run that ended did so.

    Returns:
        ``complete``: every model trained to its end; one whose peer failed is not worth a row. ``diverged``: training
        ended because a loss or a parameter was not finite, as it would again. ``failed``: anything else.
    """
    ends = [last(read_log(folder / str(model) / "log.jsonl"), "end", "reason") for model in range(run.num_models)]
    if exit_code == 0 and set(ends) == {"finished"}:
        return "complete"
    return "diverged" if any(str(end).startswith(DIVERGED) for end in ends) else "failed"


def row(run: Run, data: Path, folder: Path) -> Row:
    """Figures of a complete run: ``held_out``, and ``test`` where the run is not of the tuning.

    A value is the mean over the models; ``..._models`` has each, ``..._together`` what they predict as one.
    """
    found: Row = {}
    records = [read_log(folder / str(model) / "log.jsonl") for model in range(run.num_models)]
    for name in TRAINED:
        found["train_" + name] = mean([last(log, "train", name) for log in records])
    found["updates"] = records[0][-1]["update"]
    found["skipped_updates"] = sum(r["skipped"] for log in records for r in log if r["kind"] == "skip")
    found["skipped_exchanges"] = sum(r.get("codistill_skipped", 0) for log in records for r in log)
    found["versions"] = last(records[0], "start", "versions")
    for part, name in PARTS.items():
        found[part] = None
        if part == "test" and run.stage == "tune":
            continue  # settings are chosen without a look at the test images
        images = data / SETTINGS[run.setting].data / name
        if images not in _images:
            _images[images] = load_folder(images)
        pixels, targets = _images[images]
        logits = [predict(folder / str(i) / "checkpoint_last.pt", pixels) for i in range(run.num_models)]
        torch.save(torch.stack(logits).half(), folder / f"{part}.logits.pt")
        models = [figures(one, targets) for one in logits]
        found[part] = {key: mean([model[key] for model in models]) for key in models[0]}
        found[part + "_models"] = models
        if len(logits) > 1:
            found[part + "_together"] = figures(log_mean_probability(logits), targets)
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a training; none where it never began. A last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last(log: list[dict[str, Any]], kind: str, name: str) -> Any:
    """The last value of a figure, None where there is none."""
    return next((record[name] for record in reversed(log) if record["kind"] == kind and name in record), None)


def mean(values: list[Any]) -> float | None:
    """None where a value is missing."""
    return None if any(value is None for value in values) else sum(values) / len(values)
