"""How the cost of codistillation grows with the number of models n and of devices of a model X: bits, time, memory.

On loopback, n · X real processes that share the cores of this machine, so a time by itself says nothing: it is set
against the same processes without any exchange (``--codistill-burn-in`` for the whole run). Predictions have the size
of ResNet50's, 32 images and 1,000 classes in fp32; the network is a small one, whose steps are short, so that what the
exchange costs is seen.

    sent     by a device for an update, as counted, over the paper's (n - 1) · b_pred · B, which has no headers
    speed    updates a second, over those without an exchange
    wait     of a step for the peers, in milliseconds: how unevenly the processes get at the cores, beside the exchange
    memory   the largest process, and how much larger it is than without an exchange

    python benchmarks/scaling.py --out figures.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import about

# Started as a process of its own, so that the largest of its descendants is known when it ends.
LAUNCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run(num_models: int, devices: int, size: dict[str, int], steps: int, with_exchange: bool) -> dict[str, float]:
    """One training of n models on X devices each: updates a second, Mbit and wait of an update, MiB of a process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fairseq_codistill.launch", "--num-models", str(num_models)]
        command += ["--devices-per-model", str(devices), "--", sys.executable, "-m", "vision.train", "--cpu"]
        command += ["--model", "wrn10_1", "--dataset", "fake", "--fake-images", str(size["batch"] * devices * 4)]
        command += [
            "--fake-classes",
            str(size["classes"]),
            "--image-size",
            str(size["pixels"]),
            "--augmentation",
            "none",
        ]
        command += ["--batch-size", str(size["batch"]), "--lr-batch-size", "0", "--lr", "0.01", "--epochs", "1000000"]
        command += ["--max-updates", str(steps), "--eval-epochs", "1000000", "--log-updates", str(steps // 3)]
        command += ["--num-workers", "0", "--no-progress-bar", "--seed", "{model+1}", "--codistill-codec", "fp32"]
        command += ["--save-dir", folder + "/{model}"]
        if not with_exchange:
            command += ["--codistill-burn-in", str(10 * steps)]
        ended = subprocess.run(
            [sys.executable, "-c", LAUNCH, *command], stdout=subprocess.PIPE, text=True, env=_environment()
        )
        if ended.returncode:
            raise SystemExit(f"scaling.py: {num_models} models on {devices} devices ended with {ended.returncode}")
        found = []
        for model in range(num_models):
            lines = (Path(folder) / str(model) / "log.jsonl").read_text(encoding="utf-8").splitlines()
            found.append([record for record in map(json.loads, lines) if record["kind"] == "train"])
    first, last = found[0][0], found[0][-1]
    return {
        "updates_per_s": (last["update"] - first["update"]) / (last["time"] - first["time"]),
        "mbit": max(max(record.get("codistill_mbit", 0.0) for record in records) for records in found),
        "wait_ms": max(records[-1].get("codistill_wait_ms", 0.0) for records in found),
        "memory_mib": int(ended.stdout) / 1024,
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Measure every n and X, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="how the cost of codistillation grows with models and devices")
    parser.add_argument("--models", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60, help="updates of each run; the first third does not count")
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--tiny", action="store_true", help="two models, a few updates, to see that it works")
    args = parser.parse_args()
    size = {"batch": 32, "classes": 1000, "pixels": 32}
    if args.tiny:
        args.models, args.devices, args.steps = [2], [1], 6
        size = {"batch": 4, "classes": 10, "pixels": 8}
    rows: list[dict[str, Any]] = []
    heads = (
        "n | X | sent (Mbit an update) | by the formula | speed, times without | wait (ms) | memory (MiB) | more (MiB)"
    )
    print(f"| {heads} |\n|" + " --- |" * 8)
    for devices in args.devices:
        for num_models in args.models:
            alone = run(num_models, devices, size, args.steps, False)
            with_exchange = run(num_models, devices, size, args.steps, True)
            formula = (num_models - 1) * size["batch"] * size["classes"] * 32 / 1e6
            row = {"models": num_models, "devices": devices, "formula_mbit": formula}
            row.update(without=alone, codistilled=with_exchange)
            rows.append(row)
            speed = with_exchange["updates_per_s"] / alone["updates_per_s"]
            more = with_exchange["memory_mib"] - alone["memory_mib"]
            print(
                f"| {num_models} | {devices} | {with_exchange['mbit']:.4f} | {formula:.4f} | {speed:.3f} | "
                f"{with_exchange['wait_ms']:.1f} | {with_exchange['memory_mib']:.0f} | {more:+.0f} |",
                flush=True,
            )
    if args.out:
        Path(args.out).write_text(json.dumps({"about": about(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
