"""Owns one task of a job step: it fills in its rank, which SLURM tells it alone, and hands on the request to end.

srun hands on SIGUSR1 to every process of a step; at SIGTERM it would kill them. So SIGUSR1 asks: the command gets
SIGTERM, saves and ends, and its task ends well, since the step of a task that does not is killed, also under those that
still save (``--kill-on-bad-exit``). When SLURM itself asks everything to end (a requeue, a preemption), the task stays
until the others have had time to save. It is run as a script, and imports nothing beyond the standard library.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

SAVED = (128 + signal.SIGTERM, -signal.SIGTERM)  # how a command ends that was asked to
LINGER_S = 20.0  # SLURM kills what is left 30 seconds (KillWait) after it asked


def filled(words: Sequence[str], rank: str, local_rank: str) -> list[str]:
    """The command of a rank: ``{rank}`` and ``{local_rank}`` are filled in, every other brace stays."""
    return [word.replace("{rank}", rank).replace("{local_rank}", local_rank) for word in words]


def run(command: Sequence[str]) -> int:
    """Run the command of one rank until its end.

    Returns:
        0 for one that was asked to end by SIGUSR1 and did, or its exit code; 128 + the signal that killed it.
    """
    asked: set[int] = set()
    process: subprocess.Popen[bytes] | None = None

    def on_signal(number: int, _frame: FrameType | None) -> None:
        asked.add(number)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, on_signal)
    # It and all that it starts get SIGUSR1 too, and would die of it.
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN))
    if asked:
        process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code in SAVED and signal.SIGUSR1 in asked:
        return 0
    if code in SAVED and asked:
        time.sleep(LINGER_S)
    return code if code >= 0 else 128 - code


def main(words: Sequence[str]) -> int:
    """``slurm_task.py COMMAND...``; ends as the command did."""
    try:
        return run(filled(words, os.environ["SLURM_PROCID"], os.environ["SLURM_LOCALID"]))
    except OSError as error:
        print(f"{words[0]} cannot be started: {error}", file=sys.stderr, flush=True)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
