"""Owns what becomes of image files that cannot be read: found before training, named, and left out on request.

What is left out is a function of the files alone, so models with the same files leave out the same. No file is changed.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from fairseq_codistill.config import ConfigError

from .distributed import Place

logger = logging.getLogger("vision.broken")
KEPT_NAME, KEPT_TRANSFER_NAME = "checked_images.json", "checked_transfer_images.json"
NUM_NAMED = 3  # files in a message
# What Pillow raises for a file that is cut off, is no image, or is one that would fill the memory.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError)


class BrokenImageError(RuntimeError):
    """An image cannot be read; the message names its file.

    A loading process hands an error on inside its traceback, of which the last line is kept.
    """

    def __init__(self, message: str):
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


def read_image(path: str) -> Image.Image:
    """Decode an image file.

    Returns:
        in RGB.

    Raises:
        BrokenImageError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return _in_rgb(Image.open(file))
    except UNREADABLE as error:
        raise BrokenImageError(
            f"{path} cannot be read: {_said(error)}; mend it, or put a readable image in its place, and the same "
            "--save-dir goes on. Without it, removed or left out by --skip-broken, a training goes on only if it is a "
            "validation image: with other training images it begins anew, in another --save-dir. (Is --skip-broken "
            f"set? Remove {KEPT_NAME} from --save-dir, and all files are checked anew)"
        ) from error


def _in_rgb(image: Image.Image) -> Image.Image:
    """In 8 bits. Of 16 bits the upper ones count: Pillow itself makes everything above 255 white.

    Raises:
        ValueError: as for :func:`_refuse_unknown_range`.
    """
    _refuse_unknown_range(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _refuse_unknown_range(image: Image.Image) -> None:
    """What a header tells.

    Raises:
        ValueError: numbers whose range nobody knows.
    """
    # Of 16 bits: PNG as older Pillow has it, and PGM, which Pillow stretches to all of them whatever its largest value.
    is_known = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("I", "F") and not is_known:
        raise ValueError(f"its numbers are of mode {image.mode}, whose range is not known; save it in 8 or 16 bits")


def check_folders(
    folders: Sequence[ImageFolder], skip_broken: bool, place: Place | None, num_threads: int, kept_in: Path | None
) -> int:
    """See that every file is an image, as far as its first bytes tell; or leave out those that cannot be decoded.

    Every rank looks at its share of the files. The result is kept in a file, so that going on takes no time; files that
    were left out are looked at again.

    Args:
        folders: whose ``samples``, ``imgs`` and ``targets`` become shorter where something is left out.
        skip_broken: decode all images, and leave out those that cannot be.
        place: of this process in its model; None for a process by itself.
        num_threads: to read with.
        kept_in: the file; None keeps nothing.

    Returns:
        how many were left out.

    Raises:
        ConfigError: there are files that are no images, or none is left.
    """
    paths = [path for folder in folders for path, _ in folder.samples]
    known = _kept(kept_in, _digest(paths), skip_broken)
    # The first rank's file counts, whether or not all can see it.
    known = known if place is None else place.from_first(known)
    look_at = paths if known is None else known
    found = _unreadable(look_at, _decode if skip_broken else _open, place, num_threads)
    if known is None and kept_in is not None and (place is None or place.is_first):
        _keep(kept_in, _digest(paths), skip_broken, found)
    if not found:
        return 0
    named = "; ".join(f"{path} ({reason})" for path, reason in list(found.items())[:NUM_NAMED])
    more = f" and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
    if not skip_broken:
        raise ConfigError(
            f"{len(found)} of {len(paths)} files cannot be opened as images: {named}{more}; mend or remove them, or "
            "leave them out by --skip-broken (what was trained before in this --save-dir goes on with as many training "
            "images as it had: mend or replace those)"
        )
    if place is None or place.is_first:
        logger.warning("%d of %d images are broken and left out: %s%s", len(found), len(paths), named, more)
    for folder in folders:
        folder.samples = folder.imgs = [sample for sample in folder.samples if sample[0] not in found]
        folder.targets = [target for _, target in folder.samples]
        if not folder.samples:
            raise ConfigError(f"--skip-broken left out every image of {folder.root}; the first ones: {named}")
    return len(found)


def _open(path: str) -> None:
    with Image.open(path) as image:
        _refuse_unknown_range(image)


def _decode(path: str) -> None:
    with Image.open(path) as image:
        _in_rgb(image)


def _unreadable(
    paths: Sequence[str], look: Callable[[str], None], place: Place | None, num_threads: int
) -> dict[str, str]:
    """Path -> why it cannot be read, in the order of ``paths``, the same on all ranks."""
    rank, world_size = (0, 1) if place is None else (place.rank, place.world_size)
    mine = paths[rank::world_size]

    def reason(path: str) -> str:
        try:
            look(path)
        except UNREADABLE as error:
            return _said(error)
        return ""

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        # A list of a million futures would fill the memory: a batch of them at a time.
        reasons = [found for part in _parts(mine, rank == 0) for found in pool.map(reason, part)]
    found = [(path, why) for path, why in zip(mine, reasons, strict=True) if why]
    shares = [found] if place is None else place.gather(found)
    broken = dict(pair for share in shares for pair in share)
    return {path: broken[path] for path in paths if path in broken} if broken else {}


def _parts(paths: Sequence[str], is_shown: bool, size: int = 4096) -> Iterable[Sequence[str]]:
    starts = range(0, len(paths), size)
    return (paths[at : at + size] for at in tqdm(starts, "checking images", disable=None if is_shown else True))


def _digest(paths: Sequence[str]) -> str:
    """Of which files there are, and of when a file was added to their folders or taken away."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(path.encode(errors="surrogateescape") + b"\0")
    for folder in sorted({os.path.dirname(path) for path in paths}):
        digest.update(f"{folder} {os.stat(folder).st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _kept(file: Path | None, digest: str, decoded: bool) -> list[str] | None:
    """The files that could not be read last time; None where these files were not looked at, or not as closely."""
    if file is None:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["digest"] == digest and kept["decoded"] >= decoded:
            return list(kept["broken"])
    return None


def _keep(file: Path, digest: str, decoded: bool, broken: dict[str, str]) -> None:
    unfinished = file.with_name(f"{file.name}.tmp")
    try:
        unfinished.write_text(
            json.dumps({"digest": digest, "decoded": decoded, "broken": broken}, indent=1), encoding="utf-8"
        )
        os.replace(unfinished, file)
    except OSError:  # it only saves time
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _said(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
