"""Quality against bits at equal updates: one row a method, seed and commit. What results/leaderboard rests on.

    python benchmarks/leaderboard.py --data DIR [--method counts:16] [--seed 1] [--updates 600] [--pairs third]
    python benchmarks/leaderboard.py --task images --data DIR [--method counts:16] [--seed 1]

DIR holds ``{train,val}.{en,de}.gz`` of Multi30k; of images ``{train,val,test}``, as shrink_images.py makes them.
Without ``--method`` it goes through all methods. Finished rows are in RUNS/rows.jsonl and are not run again, so a run
that was killed goes on with the next. One process and one thread: n models in one process over a transport in memory,
which sends the bytes that any other would. Seed 9 is for choosing settings: of images its rows are measured on those
held out for that.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from leaderboard_methods import PowerSgd, averaged_gradients, averaged_parameters, codistil, in_full, plain
from leaderboard_tasks import TASKS, TUNING_SEED

ROOT = Path(__file__).parents[1]
KL = {"divergence": "kl"}


def methods(setting: Any, told: Any = None, begun: Path | None = None) -> dict[str, Callable[..., Any]]:
    """Name -> function of setting, training pairs and seed.

    Args:
        setting: of leaderboard_tasks.py.
        told: data that models are weighted by, where they are.
        begun: folder for what models are before they teach each other.
    """

    def peers(num_models: int, **settings: Any) -> Callable[..., Any]:
        return functools.partial(codistil, num_models=num_models, begun=begun, **settings)

    def diloco(period: int) -> Callable[..., Any]:
        return lambda *what: averaged_parameters(*what, period=period, outer=0.5)

    found: dict[str, Callable[..., Any]] = {
        "plain": plain,
        "all_reduce": lambda *what: averaged_gradients(*what, in_full(torch.float32)),
        "dense": peers(2, codec="fp16", **KL),
        **{f"counts:{k}": peers(2, codec=f"counts:{k}", **KL) for k in (16, 8, 4)},
        "tokens:16": peers(2, codec="tokens:16", **KL),
        "label": peers(2, codec="label", **KL),
        "counts:16 n=4 p=1": peers(4, codec="counts:16", peers_per_position=1, **KL),
        "fp16": lambda *what: averaged_gradients(*what, in_full(torch.float16)),
        "PowerSGD 4": lambda *what: averaged_gradients(*what, PowerSgd(4)),
        "post-local SGD 8": lambda *what: averaged_parameters(*what, period=8, begin=setting.updates // 4),
        "DiLoCo 20": lambda *what: averaged_parameters(*what, period=20, outer=0.9),
        "Streaming DiLoCo 20": lambda *what: averaged_parameters(*what, period=20, outer=0.9, fragments=4),
        **{f"DiLoCo {period}, momentum 0.5": diloco(period) for period in (20, 100, 500)},
        "DiLoCo 20, momentum 0": lambda *what: averaged_parameters(*what, period=20, outer=0.0),
        "Streaming DiLoCo 20, momentum 0.5": lambda *what: averaged_parameters(
            *what, period=20, outer=0.5, fragments=4
        ),
        "Streaming DiLoCo 20, momentum 0": lambda *what: averaged_parameters(*what, period=20, outer=0.0, fragments=4),
        "counts:16 T=3": peers(2, codec="counts:16", interval=3, **KL),
        "dense T=10": peers(2, codec="fp16", interval=10, **KL),
        "dense ahead": peers(2, codec="fp16", lookahead=True, **KL),
        "dense T=10 ahead": peers(2, codec="fp16", interval=10, lookahead=True, **KL),
        "budget 0.04": peers(2, codec="counts:64", budget_mbit=0.04, **KL),
        "js": peers(2, codec="fp16", divergence="js"),
        "reverse_kl": peers(2, codec="fp16", divergence="reverse_kl"),
        "kl tau=2": peers(2, codec="fp16", temperature=2.0, **KL),
        "topk:16 js": peers(2, codec="topk:16", divergence="js"),
        "counts:16 tau=2": peers(2, codec="counts:16", temperature=2.0, **KL),
        "vote n=4": peers(4, codec="vote", **KL),
        "dense n=4": peers(4, codec="fp16", **KL),
        **{f"counts:{k}": peers(2, codec=f"counts:{k}", **KL) for k in (2, 1)},
        **{f"tokens:{k}": peers(2, codec=f"tokens:{k}", **KL) for k in (8, 4, 2, 1)},
        "counts:16 n=8 p=1": peers(8, codec="counts:16", peers_per_position=1, **KL),
        "int8": peers(2, codec="int8", **KL),
        f"columns:{setting.columns}": peers(2, codec=f"columns:{setting.columns}"),
        "mse": peers(2, codec="fp16"),
        "checkpoints 20": peers(2, exchange="checkpoints", codec="fp16", interval=20, **KL),
    }
    if hasattr(setting, "drops"):  # where its paper begins to average parameters in place of gradients
        drop = round(setting.drops[0] * setting.updates)
        found["post-local SGD 8 from the first drop"] = lambda *what: averaged_parameters(*what, period=8, begin=drop)
    if hasattr(setting, "width") and told is not None:
        weak = functools.partial(peers, 3, codec="fp16", weak_width=8, **KL)
        found["dense n=3, one weak"] = weak()
        found["dense n=3, one weak, weights"] = weak(told=told, peer_weights="validation")
    return found


def commit() -> str:
    """What is checked out."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Finished ones; a line that a crash cut off is none."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> None:
    """Run what is missing."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--task", choices=TASKS, default="translation")
    task = TASKS[first.parse_known_args()[0].task]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[first]
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("checkpoints/leaderboard"))
    parser.add_argument("--method", action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--most", type=int, default=10**6, help="rows to run at most")
    for field in dataclasses.fields(task):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    options = parser.parse_args()
    setting = task(**{field.name: getattr(options, field.name) for field in dataclasses.fields(task)})
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    data = setting.load(options.data, options.runs)
    known = methods(setting, data.told, options.runs)
    if unknown := set(options.method or ()) - set(known):
        parser.error(f"--method {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    file = options.runs / "rows.jsonl"
    for seed in options.seed or [1]:
        for name in options.method or known:
            what = {"task": options.task, "method": name, "seed": seed, **dataclasses.asdict(setting)}
            if options.most <= 0 or any(what.items() <= row.items() for row in rows_of(file)):
                continue
            options.most -= 1
            started = time.process_time()
            models, bits = known[name](setting, data.train, seed)
            measured = data.held_out if seed == TUNING_SEED else data.final
            figures = [setting.figures(model, measured) for model in models]
            row = {
                **what,
                **{name: [one[name] for one in figures] for name in figures[0]},
                "mbit": bits / 1e6,
                "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
                "cpu_s": round(time.process_time() - started),
                "commit": commit(),
                "command": command(options.task, setting, name, seed),
            }
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            nll = sum(row["nll_bits"]) / len(models)
            print(f"{name} seed {seed}: {nll:.3f} bits, {bits / 1e6:.4g} Mbit an update", flush=True)


def command(task: str, setting: Any, method: str, seed: int) -> str:
    """What makes a row."""
    words = ["python benchmarks/leaderboard.py --data DIR"]
    words += [f"--task {task}"] if task != "translation" else []
    words.append(f"--method '{method}' --seed {seed}")
    for field in dataclasses.fields(setting):
        if (value := getattr(setting, field.name)) != field.default:
            words.append(f"--{field.name} {value}")
    return " ".join(words)


if __name__ == "__main__":
    main()
