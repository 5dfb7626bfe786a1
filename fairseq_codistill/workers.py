"""Owns how a process that loads data ends: when its parent says so or has ended, and at nobody else's signal.

A terminal sends Ctrl-C to every process of a group, a scheduler SIGTERM to every process of a job. A loader worker that
obeyed would be gone before the training that waits for its batch, and with it what training was about to save. Nothing
here knows what is loaded, or saves anything. Imports no torch.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

# A terminal that goes away sends SIGHUP twice within a moment, its shell and the kernel one each; a scheduler signals
# every process of a job, and a parent passes it on, on a busy machine seconds later. All that is one request.
SAME_REQUEST_S = 2.0
WATCH_S = 1.0  # how often a worker looks whether its parent still lives
_HELD = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Put it around the start of workers: what is forked within takes no SIGINT or SIGTERM until it ignores them.

    The parent's own signals are delivered at the end. In another thread than the main one it does as much.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker_id: int = 0) -> None:
    """As ``worker_init_fn`` of a torch ``DataLoader``: ignore SIGINT and SIGTERM, and end with the parent.

    SIGTERM of the parent itself still ends the worker, at once: multiprocessing ends its workers so, and then waits for
    them. PR_SET_PDEATHSIG is of no use here, since it follows the thread that forked, and loaders fork in threads that
    end before their workers do.

    Where a system cannot tell who sent a signal (macOS), SIGTERM ends a worker as ever; only SIGINT is ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not the parent process of the system where a fork server lies between.
    parent = multiprocessing.parent_process()
    below = os.getppid()
    obeyed = below if parent is None else parent.pid
    # Blocked, and taken by a thread that sees who sent it. Threads that are started from here on block it too.
    can_ask = hasattr(signal, "sigtimedwait")
    if can_ask:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def watch() -> None:
        while os.getppid() == below and (parent is None or parent.is_alive()):
            if not can_ask:
                time.sleep(WATCH_S)
                continue
            received = signal.sigtimedwait({signal.SIGTERM}, WATCH_S)
            if received is not None and received.si_pid == obeyed:
                break
        os._exit(0)

    threading.Thread(target=watch, name="codistill-parent-watch", daemon=True).start()
