"""Splits a folder of images over models as their owners might have them: each class unevenly, and a share for all.

``split_images.py --from DIR --out OUT`` makes OUT/half0, half1, together (both halves) and shared (a transfer set, of
which no model sees a label), as links to the files of DIR/train, with DIR/test in each. It never copies an image.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np


def split(
    names: list[str], generator: np.random.Generator, num_models: int, alpha: float, share: float
) -> tuple[list[list[str]], list[str]]:
    """Images of one class: those of each model, at least one, and those of the transfer set.

    Args:
        names: of all images of the class.
        generator: draws.
        num_models: among which a Dirichlet distribution decides who has how much of the class.
        alpha: its concentration; small: nearly all images of a class belong to one model.
        share: of the images that make up the transfer set.

    Raises:
        ValueError: fewer images than models.
    """
    shuffled = [names[place] for place in generator.permutation(len(names))]
    num_shared = round(share * len(shuffled))
    shared, rest = shuffled[:num_shared], shuffled[num_shared:]
    if len(rest) < num_models:
        raise ValueError(f"{len(names)} images of a class are too few for {num_models} models")
    parts = generator.dirichlet([alpha] * num_models)
    ends = np.round(np.cumsum(parts) * (len(rest) - num_models)).astype(int) + np.arange(1, num_models + 1)
    starts = [0, *ends[:-1]]
    return [rest[start:end] for start, end in zip(starts, ends, strict=True)], shared


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="holds train/ and test/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.3, help="of the Dirichlet distribution")
    parser.add_argument("--share", type=float, default=0.1, help="part of the images that the transfer set takes")
    parser.add_argument("--limit", type=int, default=0, help="take so many images of each class; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    folders = [*(f"half{model}" for model in range(options.models)), "together", "shared"]
    counts = dict.fromkeys(folders, 0)
    for source in sorted(path for path in (options.source / "train").iterdir() if path.is_dir()):
        names = sorted(entry.name for entry in source.iterdir())
        names = names[: options.limit or None]
        try:
            own, shared = split(names, generator, options.models, options.alpha, options.share)
        except ValueError as error:
            sys.exit(f"{source}: {error}; give a larger --limit, or fewer --models")
        for folder, chosen in zip(folders, [*own, [name for part in own for name in part], shared], strict=True):
            into = options.out / folder / ("train" if folder != "shared" else "") / source.name
            into.mkdir(parents=True)
            for name in chosen:
                os.symlink((source / name).resolve(), into / name)
            counts[folder] += len(chosen)
    for folder in folders[:-1]:
        os.symlink((options.source / "test").resolve(), options.out / folder / "test")
    print(", ".join(f"{folder}: {count} images" for folder, count in counts.items()))


if __name__ == "__main__":
    main()
