"""Measures the bands of ``codistill-vision --verify-baseline``: one epoch of a set-up, with several seeds.

    python benchmarks/vision_baseline.py --seeds 8 --out figures.json -- --model wrn10_1 --dataset digits --cpu

A band is the mean ± 4 standard deviations of the seeds: with eight of them, one of 140 set-ups that are right falls
outside. Prints a JSON object that holds the set-up, every seed's top-1, and the band.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import timm
import torch
import torchvision
from fairseq_codistill.vision.baseline import setup_of, trial_of
from fairseq_codistill.vision.distributed import take_place
from fairseq_codistill.vision.options import parse_options
from fairseq_codistill.vision.stop import Stop
from fairseq_codistill.vision.train import run

WIDTH = 4.0  # standard deviations to either side


def main() -> int:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the JSON object there as well")
    parser.add_argument("settings", nargs="+", help="of codistill-vision, after --")
    args = parser.parse_args()
    stop, found, setup = Stop(), {}, {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        options = [*args.settings, "--verify-baseline", "--no-progress-bar", "--seed", str(seed)]
        config = trial_of(parse_options(options))
        reason, trainer = run(config, take_place(config.cpu), stop)
        if reason != "finished":
            return 1
        setup, found[seed] = setup_of(trainer), trainer.last_valid["valid_top1"]
        print(f"seed {seed}: {found[seed]:.2f} %", file=sys.stderr, flush=True)
    mean, deviation = statistics.mean(found.values()), statistics.stdev(found.values())
    result = {
        "settings": args.settings,
        "setup": setup,
        "top1": {seed: round(value, 3) for seed, value in found.items()},
        "mean": round(mean, 3),
        "standard_deviation": round(deviation, 3),
        "band": [round(max(0.0, mean - WIDTH * deviation), 2), round(min(100.0, mean + WIDTH * deviation), 2)],
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "timm": str(timm.__version__),
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
