"""Owns where the launcher keeps what the models write: LOG_DIR/model-0.log, model-1.log and so on, appended.

A line is stored as the model wrote it, after ``[model 0 rank 1] `` where it has several ranks; lines of the launcher
about it (its command, how it ended, that it is started again) begin with ``[launch] ``. It never reads a log.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.plan import has_flag, last_value


def default_log_dir(commands: Sequence[Sequence[str]]) -> str | None:
    """The folder that the models' save-dirs have in common; None where they name none, or have only the root."""
    folders = []
    for command in commands:
        folder = last_value(command, "--save-dir")
        if folder is None or has_flag(command, "--no-save"):
            return None
        folders.append(os.path.dirname(os.path.abspath(folder)))
    common = os.path.commonpath(folders)
    return None if common == os.path.dirname(common) else os.path.relpath(common)


def log_path(folder: str, model: int) -> str:
    return os.path.join(folder, f"model-{model}.log")


@contextlib.contextmanager
def model_logs(folder: str | None, num_models: int) -> Iterator[dict[int, int]]:
    """Descriptors of the models' logs, open to append; none where there is no folder for them.

    Raises:
        ConfigError: the folder or a log in it cannot be written.
    """
    descriptors: dict[int, int] = {}
    try:
        if folder is not None:
            try:
                os.makedirs(folder, exist_ok=True)
                for model in range(num_models):
                    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                    descriptors[model] = os.open(log_path(folder, model), flags, 0o666)
            except OSError as error:
                raise ConfigError(
                    f"--log-dir {folder} (by default what the models' --save-dir have in common): {error}; "
                    "give a folder that can be written"
                ) from error
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
