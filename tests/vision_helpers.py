"""What the tests of ``vision`` share: command lines and logs. Imports no torch."""

import json
import sys
from pathlib import Path

COMMON = (
    "--cpu --model wrn10_1 --num-workers 0 --log-updates 1 --no-progress-bar --codistill-codec fp32 "
    "--codistill-start-timeout 120"
).split()


def vision_command(save_dir: Path, *extra: str) -> list[str]:
    """One model on the digits; ``extra`` wins."""
    return [sys.executable, "-m", "vision.train", *COMMON, "--save-dir", str(save_dir), *extra]


def codistill_commands(folder: Path, addresses: str, *extra: str) -> list[list[str]]:
    """Every model of a codistilled run, model i in ``folder/i`` with seed i + 1."""
    num_models = len(addresses.split(","))
    return [
        vision_command(
            folder / str(i), "--seed", str(i + 1), "--codistill-num-models", str(num_models),
            "--codistill-model-index", str(i), "--codistill-addresses", addresses, *extra,
        )
        for i in range(num_models)
    ]  # fmt: skip


def launch_command(folder: Path, num_models: int, devices_per_model: int, *extra: str) -> list[str]:
    """A whole run by codistill-launch, model i in ``folder/i`` with seed i + 1."""
    launcher = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", str(num_models)]
    command = vision_command(folder / "{model}", "--seed", "{model+1}", *extra)
    return [*launcher, "--devices-per-model", str(devices_per_model), "--", *command]


def records(folder: Path, kind: str) -> list[dict]:
    """The records of one kind in a log; what stands after its last newline is being written."""
    whole, _, _ = (folder / "log.jsonl").read_text().rpartition("\n")
    return [record for record in map(json.loads, whole.splitlines()) if record["kind"] == kind]
