"""How fast images for training are loaded: decoded, augmented as Goyal et al. 2017, batched, with their fingerprint.

    python benchmarks/vision_loader.py [--images 400] [--workers 0 1 2] [--out FILE.json] [--tiny]

The images are made up: JPEGs of 500 x 375 pixels, the usual size on ImageNet, smooth enough to compress as photographs
do (about 100 KB). Columns: images a second, over all workers, with and without the fingerprint of the pixels. A run
counts from the first batch, so that starting the workers is not in it.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fairseq_codistill.vision.data import train_loader
from fairseq_codistill.vision.datasets import load_images
from fairseq_codistill.vision.options import parse_options
from PIL import Image

from fairseq_codistill.sampling import Timetable


def write_images(folder: Path, num_images: int, width: int, height: int) -> int:
    """Two classes of made-up photographs; returns their mean size in bytes."""
    generator, sizes = np.random.default_rng(0), []
    for split, count in (("train", num_images), ("val", 2)):
        for number in range(count):
            path = folder / split / str(number % 2) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
            noisy = smooth + generator.integers(-12, 13, smooth.shape)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
            sizes.append(path.stat().st_size)
    return sum(sizes) // len(sizes)


def images_per_second(folder: Path, size: int, num_workers: int, with_fingerprint: bool, batch_size: int) -> float:
    """One run through the images."""
    flags = f"--no-save --dataset imagefolder:{folder} --image-size {size} --batch-size {batch_size}".split()
    codistilled = "--codistill-num-models 2 --codistill-addresses h:1,h:2".split() if with_fingerprint else []
    config = parse_options([*flags, *codistilled, "--num-workers", str(num_workers)])
    images = load_images(config)
    table = Timetable(len(images.train), 1, batch_size, 1, 1)
    loader = iter(train_loader(config, images, table, 0, 0, table.updates_per_pass, pin_memory=False))
    next(loader)
    started = time.perf_counter()
    num_images = sum(len(batch.targets) for batch in loader)
    return num_images / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_images, width, height, size, batch_size = (args.images, 500, 375, 224, 32)
    if args.tiny:
        num_images, width, height, size, batch_size, args.workers = 12, 60, 48, 16, 4, [0]
    lines = []
    with tempfile.TemporaryDirectory() as name:
        mean_bytes = write_images(Path(name), num_images, width, height)
        print(f"{'workers':>7} {'fingerprint':>11} {'images/s':>9}   (JPEGs of {mean_bytes / 1000:.0f} KB)")
        for num_workers in args.workers:
            for with_fingerprint in (False, True):
                speed = images_per_second(Path(name), size, num_workers, with_fingerprint, batch_size)
                lines.append({"workers": num_workers, "fingerprint": with_fingerprint, "images_per_s": speed})
                print(f"{num_workers:>7} {'yes' if with_fingerprint else 'no':>11} {speed:>9.0f}", flush=True)
    if args.out:
        about = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
        about.update(load=os.getloadavg()[0], images=num_images, mean_bytes=mean_bytes)
        Path(args.out).write_text(json.dumps({"about": about, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
