"""Owns a launch that SLURM has yet to start: the batch script, its submission, and the wait for its end.

The script runs ``codistill-launch`` once more, inside the allocation (:mod:`~fairseq_codistill.launch.slurm`). A job
that SLURM starts again goes on from its checkpoints, with the same keys.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.slurm import Layout, exit_path

OURS = ("nodes", "N", "ntasks", "n", "ntasks-per-node", "output", "o", "error", "e", "parsable", "wrap", "array", "a")
ELSEWHERE = ("clusters", "M")  # the job would have a number of another cluster, which is not asked for it
POLL_S = 1.0
GONE_S = 30.0  # an exit code may take so long to be seen through a file system of the network
# What "sbatch --test-only" says of a job that could never start; without EnforcePartLimits sbatch itself would take it.
NEVER = re.compile("node configuration is not available|Node count specification|More processors requested")
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)


def batch_script(
    layout: Layout,
    folder: str,
    slurm_options: str,
    grace_s: float,
    wants_gpus: bool,
    command: Sequence[str],
    cpus_per_device: int | None = None,
) -> str:
    """The text of the script.

    Args:
        layout: nodes and tasks to ask for.
        folder: of the run, where the output of the job goes.
        slurm_options: ``--slurm``, passed through.
        grace_s: the models are asked to save so long, and half a minute, before the time of the job is up.
        wants_gpus: a device is a GPU.
        command: ``codistill-launch`` and its arguments.
        cpus_per_device: cores of each task; None leaves it to SLURM, or to ``slurm_options``.

    Raises:
        ConfigError: an option that the launcher sets, or one without a value's other quote.
    """
    try:
        given = shlex.split(slurm_options)
    except ValueError as error:
        raise ConfigError(f"--slurm {slurm_options!r}: {error}") from error
    for word in given:
        match = re.match(r"--([a-z-]+)|-([A-Za-z])", word)
        if match and (match[1] or match[2]) in OURS:
            raise ConfigError(
                f"--slurm {slurm_options!r}: {word.partition('=')[0]} is set by codistill-launch, from --num-models, "
                "--devices-per-model and --devices-per-node; leave it out"
            )
        if match and (match[1] or match[2]) in ELSEWHERE:
            raise ConfigError(
                f"--slurm {slurm_options!r}: {word.partition('=')[0]} would send the job to another cluster, where it "
                "cannot be followed; submit on a host of that cluster, or set SLURM_CONF to its configuration"
            )
    asked = [
        f"--nodes={layout.num_nodes}",
        f"--ntasks-per-node={layout.devices_per_node}",
        *([f"--gpus-per-node={layout.devices_per_node}"] if wants_gpus else []),
        *([f"--cpus-per-task={cpus_per_device}"] if cpus_per_device else []),
        "--job-name=codistill",
        "--no-kill",  # a node that dies ends the step of its model, and the others go on
        "--requeue",
        "--open-mode=append",
        f"--signal=B:TERM@{int(grace_s) + 30}",
        f"--output={os.path.join(os.path.abspath(folder), 'slurm-%j.log')}",
    ]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {shlex.quote(option)}" for option in asked)]
    lines += [f"#SBATCH {option}" for option in _grouped(given)]
    # exec: the signal before the end of the job's time goes to the launcher itself.
    return "\n".join([*lines, "", f"exec {shlex.join(command)}", ""])


def _grouped(words: Sequence[str]) -> Iterator[str]:
    """Each option with its value."""
    option: list[str] = []
    for word in words:
        if word.startswith("-") and option:
            yield shlex.join(option)
            option = []
        option.append(word)
    if option:
        yield shlex.join(option)


def submit(script: str, folder: str) -> str:
    """Write the script into the folder of the run and hand it to SLURM; returns the number of the job.

    Raises:
        ConfigError: SLURM is not there, or does not take it: the plan does not fit the cluster.
    """
    path = os.path.join(folder, "launch.sbatch")
    os.makedirs(folder, exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:  # names as they are in the system
        file.write(script)
    tried = _sbatch("--test-only", path)
    if tried.returncode and NEVER.search(tried.stderr):
        raise ConfigError(f"--on slurm: no part of the cluster has room: {tried.stderr.strip()}; the script is {path}")
    done = _sbatch("--parsable", path)
    if done.returncode:
        raise ConfigError(f"--on slurm: {done.stderr.strip()}; the script is {path}")
    return done.stdout.strip().partition(";")[0]


def _sbatch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(["sbatch", *arguments], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--on slurm: sbatch cannot be run here ({error})") from error


class Follower:
    """Shows what a job writes until it ends. Ctrl-C ends the job as it ends a local launch: first it may save.

    Args:
        job: its number.
        folder: of the run.
    """

    def __init__(self, job: str, folder: str):
        self._job, self._folder = job, folder
        self._log = os.path.join(folder, f"slurm-{job}.log")
        self._num_shown = 0
        self._signals: list[int] = []

    def run(self) -> int:
        """Until the end of the job; returns the exit code of its launch, or 128 + that of a signal that ended it."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            num_passed_on = 0
            while (state := self._state()) not in ENDED:
                self._show()
                if len(self._signals) > num_passed_on and (state != "UNKNOWN" or len(self._signals) > 1):
                    self._pass_on(state, len(self._signals))
                    num_passed_on = len(self._signals)
                time.sleep(POLL_S)
            self._show()
            code = self._exit_code(state)
            return 128 + self._signals[0] if self._signals else code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def _pass_on(self, state: str, count: int) -> None:
        if count == 1 and state == "RUNNING":
            command = ["scancel", "--batch", "--signal=TERM", self._job]
            print(f"[launch] job {self._job} is asked to end; again to cancel it", file=sys.stderr, flush=True)
        else:
            command = ["scancel", self._job]
        subprocess.run(command, capture_output=True, timeout=60, start_new_session=True)

    def _state(self) -> str:
        """As SLURM calls it; one that it has forgotten is over."""
        command = ["scontrol", "show", "job", self._job]
        try:
            # In a session of its own: Ctrl-C, which a terminal sends to all of this one, is not for it.
            shown = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
        except subprocess.TimeoutExpired:
            return "UNKNOWN"
        if shown.returncode and "Invalid job id" in shown.stderr:
            return "COMPLETED"
        found = re.search(r"JobState=(\w+)", shown.stdout)
        return found[1] if found else "UNKNOWN"  # the controller is away

    def _show(self) -> None:
        with contextlib.suppress(FileNotFoundError), open(self._log, "rb") as log:
            log.seek(self._num_shown)
            text = log.read()
            # in one go, or a reader that is slow would get halves of lines
            self._num_shown += len(text)
            try:
                sys.stdout.buffer.write(text)
                sys.stdout.buffer.flush()
            except BrokenPipeError:  # as of `| head`: who reads has seen enough; the job, and its exit code, go on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _exit_code(self, state: str) -> int:
        # A launch that failed, or was stopped, leaves its code; one that was cancelled may leave none.
        deadline = time.monotonic() + (GONE_S if state in ("COMPLETED", "FAILED", "TIMEOUT") else 2 * POLL_S)
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError), open(exit_path(self._folder, self._job)) as file:
                return int(file.read())
            if time.monotonic() > deadline:
                print(
                    f"[launch] job {self._job} is {state} and left no exit code; see {self._log}",
                    file=sys.stderr,
                    flush=True,
                )
                return 1
            time.sleep(POLL_S)
