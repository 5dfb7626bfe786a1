"""Owns the folder of a launch in the user's runtime directory: made for the user alone, removed at the end.

A launcher that is killed removes nothing, so the next one does: a folder whose lock nobody holds belongs to nobody.
What lies in the folder (the keys of the run) is not known here.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping

LOCK = "lock"


def runtime_directories(environment: Mapping[str, str]) -> list[str]:
    """Where such folders may lie, the best first: gone with the session, then in the home folder, then in /tmp."""
    candidates = []
    if environment.get("XDG_RUNTIME_DIR"):
        candidates.append(os.path.join(environment["XDG_RUNTIME_DIR"], "codistill"))
    cache = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(cache):  # "~" stays where nobody knows the user
        candidates.append(os.path.join(cache, "codistill"))
    candidates.append(os.path.join(tempfile.gettempdir(), f"codistill-{os.getuid()}"))
    return candidates


def private_directory(candidates: list[str]) -> str:
    """The first that can be made, or is there, as a folder that is the user's own and that nobody else may read.

    Raises:
        OSError: none of them can.
    """
    reasons = []
    for path in candidates:
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise PermissionError(f"{path} is not a folder of this user")
            if stat.S_IMODE(found.st_mode) & 0o077:
                os.chmod(path, 0o700)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(f"{path} is not writable")
            return path
        except OSError as error:
            reasons.append(str(error))
    raise OSError("no folder for the keys of the run: " + "; ".join(reasons) + "; set XDG_RUNTIME_DIR to one")


@contextlib.contextmanager
def run_folder(environment: Mapping[str, str]) -> Iterator[str]:
    """A new folder for this launch, readable by the user alone; those that dead launchers left are removed first.

    Raises:
        OSError: there is no place for it.
    """
    root = private_directory(runtime_directories(environment))
    # Held while folders are looked at and made, or a new one that is not locked yet would be taken for a stale one.
    with open(os.path.join(root, LOCK), "a") as door:
        if _lock(door.fileno()):
            _remove_stale(root)
        folder = tempfile.mkdtemp(prefix=_prefix(), dir=root)
        lock = os.open(os.path.join(folder, LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        _lock(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def claim(folder: str) -> Iterator[None]:
    """Keep a folder of this launch from being taken for a dead one's."""
    lock = os.open(os.path.join(folder, LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it may be this process that has it
    try:
        yield
    finally:
        os.close(lock)


def _prefix() -> str:
    """Of this host's folders: on a home folder that hosts share a lock may hold on the host alone that took it."""
    return f"run-{socket.gethostname()}@"


def _lock(descriptor: int) -> bool:
    """Whether it is locked: some file systems of clusters know no locks; there nothing is taken for stale either."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _remove_stale(root: str) -> None:
    for name in os.listdir(root):
        folder = os.path.join(root, name)
        is_old = name.startswith("run-") and "@" not in name  # of an earlier version, which did not name the host
        if not (name.startswith(_prefix()) or is_old) or not os.path.isdir(folder):
            continue
        # A file system that knows no locks, or a folder that another host removes meanwhile: leave it alone.
        with contextlib.suppress(OSError), open(os.path.join(folder, LOCK), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
