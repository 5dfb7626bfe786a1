"""What the tests of the hosts share: several models as real processes, each told its place as by the launcher."""

import sys
from pathlib import Path

import torch
from helpers import environment, free_ports, run_together

LOOPS = Path(__file__).parent / "distributed"


def place(model, ports, **settings):
    """The environment that codistill-launch gives a model; ``settings`` by their names in Python."""
    return environment(
        CODISTILL_NUM_MODELS=str(len(ports)),
        CODISTILL_MODEL_INDEX=str(model),
        CODISTILL_ADDRESSES=",".join(f"127.0.0.1:{port}" for port in ports),
        **{"CODISTILL_CODEC": "fp32", **{f"CODISTILL_{key.upper()}": str(value) for key, value in settings.items()}},
    )


def run_models(tmp_path, loop, name, *options, num_models=2, ranks=1, timeout_s=280, **settings):
    """A whole run of ``loop OUT SEED [options]`` for every model; what each wrote, and what each rank printed."""
    ports, meeting = free_ports(num_models, ranks), free_ports(num_models)
    commands, places = [], []
    for model in range(num_models):
        for rank in range(ranks):
            given = [option.replace("{model}", str(model)) for option in options]
            commands.append(
                [sys.executable, str(LOOPS / loop), str(tmp_path / f"{name}{model}"), str(model + 1), *given]
            )
            torchrun = {}
            if ranks > 1:
                torchrun = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting[model])}
            places.append({**place(model, ports, **settings), **torchrun})
    results = run_together(commands, timeout_s, places)
    # One rank's fault ends the others with an error of their own: all of them are told.
    failed = [result.output[-4000:] for result in results if result.returncode]
    assert not failed, "\n\n".join(failed)
    return [torch.load(tmp_path / f"{name}{model}", weights_only=False) for model in range(num_models)], [
        result.output for result in results
    ]
