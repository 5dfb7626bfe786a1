"""Owns the small form of an image data set: fewer training images, all of them smaller, drawn with a fixed seed.

``python recipes/tools/shrink_images.py --from DIR --out SMALL`` reads ``cifar10:DIR`` as ``codistill-vision`` does and
writes ``SMALL/train/<class>/<number>.png`` and ``SMALL/test/<class>/<number>.png``: what two CPU cores train on.
Every class keeps its share. PNG keeps the pixels as they are after resizing. With ``--held-out`` other training images
go to ``SMALL/val``: to choose settings on, so that the test images are looked at once.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

import torch
from fairseq_codistill.vision.config import DataConfig
from fairseq_codistill.vision.datasets import load_images
from PIL import Image

from fairseq_codistill.config import ConfigError

OURS = re.compile(r"(unfinished: )?\d+ training images of \d+ pixels, seed \d+\n")  # what the stamp of a folder says


def chosen(targets: torch.Tensor, num_images: int, seed: int, skipped: int = 0) -> list[int]:
    """Numbers of ``num_images`` images, as many of each class as of any other; all of them where there are fewer.

    Args:
        targets: (num_stored,) int64, the class of each stored image.
        num_images: how many to keep; rounded down to a multiple of the number of classes.
        seed: of the drawing.
        skipped: leave out those that ``chosen(targets, skipped, seed)`` keeps.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = targets.unique().tolist()
    kept: list[int] = []
    for target in classes:
        of_class = (targets == target).nonzero().flatten()  # (images of the class,)
        drawn = of_class[torch.randperm(len(of_class), generator=generator)]
        kept += drawn[skipped // len(classes) :][: num_images // len(classes)].tolist()
    return sorted(kept)


def main() -> None:
    """Write the small form; a folder that is complete already is left alone, one of other settings is made anew."""
    parser = argparse.ArgumentParser(description="Fewer and smaller images of CIFAR-10.")
    parser.add_argument("--from", dest="source", required=True, help="as torchvision unpacks it, or train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train-images", type=int, default=10000, help="training images to keep; test keeps all")
    parser.add_argument("--held-out", type=int, default=0, help="other training images, written to val; 0")
    parser.add_argument("--size", type=int, default=16, help="side of the images in pixels")
    args = parser.parse_args()
    settings = f"{args.train_images} training images of {args.size} pixels, seed 0\n"
    if args.held_out:
        settings += f"{args.held_out} held out\n"
    stamp = args.out / "settings.txt"
    written = stamp.read_text(encoding="utf-8", errors="replace") if stamp.is_file() else ""
    if written == settings:
        return
    try:
        images = load_images(DataConfig(dataset=f"cifar10:{args.source}"))
    except ConfigError as error:
        sys.exit(f"shrink_images.py: --from is {args.source!r}: {error}")
    there = [args.out / name for name in ("train", "val", "test") if (args.out / name).exists()]
    if there and not OURS.match(written):
        sys.exit(
            f"shrink_images.py: --out is '{args.out}', whose {there[0].name} is not from here; give another folder"
        )
    targets = images.train.targets
    held_out = chosen(targets, args.held_out, 0, args.train_images) if args.held_out else []
    num_classes = len(targets.unique())
    if args.held_out and len(held_out) < max(args.held_out // num_classes, 1) * num_classes:
        sys.exit(
            f"shrink_images.py: --held-out is {args.held_out}, but beside --train-images {args.train_images} there are "
            f"only {len(held_out)} of {len(targets)} images for it, as many of each of {num_classes} classes; give "
            "less of one of them, and at least one image of a class"
        )
    for folder in there:  # of other settings: what was trained on there may be held out here
        shutil.rmtree(folder)
    args.out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(f"unfinished: {settings}")
    splits = {
        "train": (images.train, chosen(targets, args.train_images, 0)),
        "val": (images.train, held_out),
        "test": (images.valid, range(len(images.valid))),
    }
    for name, (split, kept) in splits.items():
        if not kept:
            continue
        for number in kept:
            pixels, target = split[number]
            folder = args.out / name / str(target)
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((args.size,) * 2, Image.Resampling.BOX)
            small.save(folder / f"{number}.png")
        print(f"{name}: {len(kept)} images of {args.size} x {args.size} pixels")
    stamp.write_text(settings)


if __name__ == "__main__":
    main()
