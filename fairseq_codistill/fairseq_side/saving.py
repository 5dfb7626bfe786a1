"""Owns how fairseq writes its checkpoints here: each stands whole under its name, or is not there; and whether it can.

What is saved, when, and what is removed, stays with fairseq. A folder that is not local (fairseq's path handlers) and
``--write-checkpoints-asynchronously`` are left as they are.
"""

import functools
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from fairseq_codistill.config import ConfigError
from fairseq_codistill.whole_files import UNFINISHED, SaveError, reason, whole_file

logger = logging.getLogger(__name__)
NUM_TRIES = 3
PAUSE_S = 2.5


def write_whole_checkpoints() -> None:
    """Wrap the functions by which fairseq puts a checkpoint under its name, and looks at the folder. Idempotent.

    It writes the first beside and renames it, but tries again behind what was written in vain; copies of it
    (``checkpoint_best.pt``, ``checkpoint_last.pt``) it writes under the final name at once. On a full disk, or when the
    process is killed meanwhile, a part of a checkpoint is left in place of the one before.

    Seen with fairseq 0.12.2 and fairseq-fixed 0.12.3.1. Can go when fairseq copies as it saves.
    """
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    if hasattr(checkpoint_utils.torch_persistent_save, "_codistill_wrapped"):
        return
    original, original_copy = checkpoint_utils.torch_persistent_save, PathManager.copy

    @functools.wraps(original)
    def torch_persistent_save(obj: Any, filename: Any, async_write: bool = False) -> None:
        if async_write or not isinstance(filename, str) or not PathManager.supports_rename(filename):
            original(obj, filename, async_write)
            return
        for left in reversed(range(NUM_TRIES)):
            try:
                with whole_file(Path(filename)) as file:
                    torch.save(obj, file)
                return
            except SaveError as error:
                if not left:
                    raise
                logger.warning("codistillation: %s; trying again", error)
                time.sleep(PAUSE_S)  # as fairseq does: a network's folder may come back

    @functools.wraps(original_copy)
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if not overwrite or not (PathManager.supports_rename(src_path) and PathManager.supports_rename(dst_path)):
            return original_copy(src_path, dst_path, overwrite)
        with open(src_path, "rb") as source, whole_file(Path(dst_path)) as file:
            shutil.copyfileobj(source, file, 1 << 20)
        return dst_path

    verify = checkpoint_utils.verify_checkpoint_directory

    @functools.wraps(verify)
    def verify_checkpoint_directory(save_dir: str) -> None:
        try:
            verify(save_dir)
        except OSError as error:
            raise ConfigError(f"--save-dir is {save_dir!r}, which cannot be written to: {reason(error)}") from error

    checkpoint_utils.verify_checkpoint_directory = verify_checkpoint_directory
    torch_persistent_save._codistill_wrapped = True  # type: ignore[attr-defined]
    checkpoint_utils.torch_persistent_save = torch_persistent_save
    PathManager.copy = staticmethod(copy)


def remove_unfinished(save_dir: Path) -> None:
    """Remove what a process that was killed while it saved left behind."""
    for path in save_dir.glob(f"checkpoint*.pt{UNFINISHED}"):
        path.unlink(missing_ok=True)
