"""Owns how a checkpoint is written: whole under its final name, or not at all.

What is in a file, and when one is written, is decided elsewhere.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".tmp"


class SaveError(RuntimeError):
    """A file cannot be written: what was written last under its name is still there."""


@contextlib.contextmanager
def whole_file(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """A file to write, which takes its name once it is written, and is on the disk.

    Args:
        path: its name.
        writer: tells several that may write it at the same time from each other.

    Raises:
        SaveError: it cannot be written (a full disk, for one); nothing of it is left.
    """
    unfinished = path.with_name(path.name + writer + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave an empty file under the final name
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by the latter
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        kept = "the one before it is still there" if path.exists() else "there is none yet"
        raise SaveError(f"cannot write {path}: {reason(error)}; {kept}") from error


def reason(error: BaseException) -> str:
    """What an error says, without its traceback and file name: where torch hides what the disk said, the latter."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
