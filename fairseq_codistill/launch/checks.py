"""Owns what is checked of a command before it starts: its ``--codistill-*`` options, and that it takes them.

fairseq would say the same 7 to 20 seconds later, once a model, or not understand the options at all. A program that
says what it will do reads its options for that; any other checks its own. Nothing here imports fairseq or torch.
"""

import logging
import os
from collections.abc import Iterable, Sequence

from fairseq_codistill.command_line import read_options
from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch.plan import Job, last_value
from fairseq_codistill.launch.programs import fairseq_arguments, is_run_itself, program_plan, takes_options

logger = logging.getLogger(__name__)
CRITERION = "codistillation"
TASK_PREFIX = "codistill_"


def check_jobs(jobs: Iterable[Job], starts_here: bool = True) -> None:
    """Of every model, its identity filled in.

    Args:
        jobs: of all models.
        starts_here: in this folder; elsewhere the files that a command names may be others.

    Raises:
        ConfigError: the first option that cannot work, and of which model where they differ.
    """
    seen: set[tuple[str, ...]] = set()
    for job in jobs:
        arguments = fairseq_arguments(job.command)
        if tuple(job.command) in seen:
            continue
        seen.add(tuple(job.command))
        try:
            if arguments is not None:
                _check(arguments)
            elif starts_here and is_run_itself(job.command):
                program_plan(job.command)
        except ConfigError as error:
            raise ConfigError(f"model {job.model}: {error}" if job.model else str(error)) from error
        except Exception as error:  # what cannot be found out here the program says itself
            logger.debug("the options of %s were not checked: %s", job.command[0], error)


def refuse_beginning_again(command: Sequence[str]) -> None:
    """Of a model that is to be started again where it was.

    Raises:
        ConfigError: fairseq would begin at another file, from nothing, or without its optimizer or place in the data,
            and overwrite what was learned.
    """
    for flag in ("--no-save", "--no-last-checkpoints") if takes_options(command) else ():
        if flag in command:
            raise ConfigError(
                f"{flag} is given with --max-restarts: there would be no checkpoint_last.pt to go on from, and a model "
                "that is started again would begin anew; leave one of them out"
            )
    arguments = fairseq_arguments(command)
    if arguments is None:
        return
    restored = last_value(arguments, "--restore-file")
    folder = last_value(arguments, "--save-dir") or "checkpoints"
    own = os.path.normpath(os.path.join(folder, "checkpoint_last.pt"))
    if restored not in (None, "checkpoint_last.pt") and os.path.normpath(restored) != own:
        raise ConfigError(
            f"--restore-file is {restored!r} with --max-restarts: a model that is started again would begin there "
            "again, and overwrite its checkpoint_last.pt; give --finetune-from-model, which is for a first start alone"
        )
    for flag in ("--reset-optimizer", "--reset-dataloader", "--reset-lr-scheduler", "--reset-meters"):
        if flag in arguments:
            raise ConfigError(
                f"{flag} is given with --max-restarts: it would act at every start; leave one of them out"
            )
    if "--no-save-optimizer-state" in arguments:
        raise ConfigError(
            "--no-save-optimizer-state is given with --max-restarts: a model that is started again would begin without "
            "its optimizer, at update 0 of every schedule, and overwrite its checkpoint_last.pt; leave one of them out"
        )


def _check(arguments: list[str]) -> None:
    config, smoothing = read_options(arguments)
    config.validate()
    criterion, task = last_value(arguments, "--criterion"), last_value(arguments, "--task")
    if criterion == CRITERION:
        smoothing.validate()
    if last_value(arguments, "--user-dir") is None:
        raise ConfigError(
            "--user-dir is not in the command: fairseq-train does not know codistillation without it; add --user-dir "
            '"$(fairseq-codistill-path)"'
        )
    if criterion is None:
        raise ConfigError(
            f"--criterion is not in the command, and fairseq's default exchanges nothing; add --criterion {CRITERION}"
        )
    if criterion == CRITERION and (task is None or not task.startswith(TASK_PREFIX)):
        name = task or "translation"
        raise ConfigError(
            f"--task is {task or 'not in the command'}: the batches of the models would not be the same; use --task "
            f"{TASK_PREFIX}{name}"
        )
