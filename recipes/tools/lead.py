"""Owns one question to the runs of a figure: is one arm so much better than another that the rest is worth running?

``python recipes/tools/lead.py --points 3 OUT/RECIPE/ARM OUT/RECIPE/OTHER`` exits with 1 where the first arm is less
than 3 points of accuracy above the second, means over models and seeds; with FORCE=1 it only says so. It only reads.
"""

import argparse
import os
import sys
from pathlib import Path

from paper_figure import read_arm


def last_accuracy(folder: str) -> float:
    """Mean validation accuracy at the end, in percent.

    Raises:
        ValueError: no finished seed has one.
    """
    spread = read_arm(folder, Path(folder)).spread(lambda model: model.last("valid", "valid_top1"))
    if spread is None:
        raise ValueError(f"{folder} holds no validation accuracy")
    return spread.mean


def main() -> None:
    """Compare two arms."""
    parser = argparse.ArgumentParser(description="Whether one arm is ahead of another.")
    parser.add_argument("--points", type=float, required=True, help="how far it has to be, in points")
    parser.add_argument("arms", nargs=2, metavar="FOLDER", help="FOLDER/SEED/MODEL/log.jsonl")
    args = parser.parse_args()
    try:
        ahead, behind = map(last_accuracy, args.arms)
    except ValueError as error:
        sys.exit(f"lead.py: {error}")
    lead = ahead - behind
    print(f"{args.arms[0]} {ahead:.2f}, {args.arms[1]} {behind:.2f}: {lead:+.2f} points, {args.points:g} wanted")
    if lead < args.points and os.environ.get("FORCE", "0") == "0":
        sys.exit("lead.py: the difference that the figure is about is too small here to see anything")


if __name__ == "__main__":
    main()
