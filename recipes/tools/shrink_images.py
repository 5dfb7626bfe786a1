"""Owns the small form of an image data set: fewer training images, all of them smaller, drawn with a fixed seed.

``python recipes/tools/shrink_images.py --from DIR --out SMALL`` reads ``cifar10:DIR`` as ``codistill-vision`` does and
writes ``SMALL/train/<class>/<number>.png`` and ``SMALL/test/<class>/<number>.png``: what two CPU cores train on.
Every class keeps its share. PNG keeps the pixels as they are after resizing.
"""

import argparse
import sys
from pathlib import Path

import torch
from fairseq_codistill.vision.config import DataConfig
from fairseq_codistill.vision.datasets import load_images
from PIL import Image

from fairseq_codistill.config import ConfigError


def chosen(targets: torch.Tensor, num_images: int, seed: int) -> list[int]:
    """Numbers of ``num_images`` images, as many of each class as of any other; all of them where there are fewer.

    Args:
        targets: (num_stored,) int64, the class of each stored image.
        num_images: how many to keep; rounded down to a multiple of the number of classes.
        seed: of the drawing.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = targets.unique().tolist()
    kept: list[int] = []
    for target in classes:
        of_class = (targets == target).nonzero().flatten()  # (images of the class,)
        kept += of_class[torch.randperm(len(of_class), generator=generator)][: num_images // len(classes)].tolist()
    return sorted(kept)


def main() -> None:
    """Write the small form; a folder that is complete already is left alone."""
    parser = argparse.ArgumentParser(description="Fewer and smaller images of CIFAR-10.")
    parser.add_argument("--from", dest="source", required=True, help="as torchvision unpacks it, or train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train-images", type=int, default=10000, help="training images to keep; test keeps all")
    parser.add_argument("--size", type=int, default=16, help="side of the images in pixels")
    args = parser.parse_args()
    settings = f"{args.train_images} training images of {args.size} pixels, seed 0\n"
    stamp = args.out / "settings.txt"
    if stamp.exists() and stamp.read_text() == settings:
        return
    try:
        images = load_images(DataConfig(dataset=f"cifar10:{args.source}"))
    except ConfigError as error:
        sys.exit(f"shrink_images.py: --from is {args.source!r}: {error}")
    for name, split in (("train", images.train), ("test", images.valid)):
        kept = chosen(split.targets, args.train_images, 0) if name == "train" else range(len(split))
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
