"""Owns the keys of a launch once they were made: they are there for every start, wherever their folder has gone.

The runtime directory of a login session goes with it, a cache is emptied, and a launch outlives both. What a key is
good for is not known here.
"""

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from fairseq_codistill.launch.plan import Job
from fairseq_codistill.launch.runtime import claim, run_folder

logger = logging.getLogger(__name__)


class KeptKeys:
    """The files of a folder, as they are now.

    Args:
        folder: in that of a launch, of :func:`~fairseq_codistill.launch.runtime.run_folder`.
        environment: says where another one may be.
    """

    def __init__(self, folder: str, environment: Mapping[str, str]):
        self._folders = [Path(folder)]  # where they were, and last where they are
        self._contents = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        self._environment = environment
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()

    def for_job(self, job: Job) -> Job:
        """The job with keys that are there; as it was where it has others, or where they cannot be put back."""
        with self._lock:
            words = [*job.command, *job.environment.values()]
            if not any(str(folder) in word for folder in self._folders for word in words):
                return job
            try:
                self._put_back()
            except OSError as error:
                logger.warning("[launch] the keys of the run are gone, and cannot be put back: %s", error)
                return job
            return dataclasses.replace(
                job,
                command=tuple(map(self._moved, job.command)),
                environment={name: self._moved(value) for name, value in job.environment.items()},
            )

    def close(self) -> None:
        """Remove what was put elsewhere."""
        self._stack.close()

    def _moved(self, word: str) -> str:
        for folder in self._folders[:-1]:
            word = word.replace(str(folder), str(self._folders[-1]))
        return word

    def _put_back(self) -> None:
        try:
            self._write(self._folders[-1])
        except OSError:  # what a session leaves is not the user's to make
            root = self._stack.enter_context(run_folder(self._environment))
            self._folders.append(Path(root) / self._folders[0].name)
            self._write(self._folders[-1])

    def _write(self, folder: Path) -> None:
        missing = [name for name in self._contents if not (folder / name).exists()]
        if not missing:
            return
        for place in [*reversed([parent for parent in folder.parents if not parent.exists()]), folder]:
            place.mkdir(mode=0o700, exist_ok=True)
        self._stack.enter_context(claim(str(folder.parent)))  # or the next launch would take it for a dead one's
        for name in missing:
            part = folder / f"{name}.part"
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(self._contents[name])
            os.replace(part, folder / name)
