"""Owns telling the surviving models that one has died, in its name: they need not wait until they miss it.

The launcher sees at once what they would notice after a timeout. Nothing here decides who has died, and nothing waits.
"""

import importlib
import logging
import os
import threading
from collections.abc import Callable, Sequence

from fairseq_codistill.config import environment_name
from fairseq_codistill.launch.plan import Job, last_value

HERALD = "fairseq_codistill.coordinator.herald"
SECONDS = 2.0  # of a survivor that does not answer
logger = logging.getLogger(__name__)


def announcer(jobs: Sequence[Job], num_models: int, world_size: int) -> Callable[[int, str], None]:
    """A function that announces the death of a model, with what happened to it, in a thread of its own.

    Args:
        jobs: of the launch, as they were started: addresses, keys and the name of the run are theirs.
        num_models: n.
        world_size: ranks of a model.
    """

    def announce(model: int, reason: str) -> None:
        job = next(job for job in jobs if job.model == model)
        if _setting(job, "--codistill-transport") != "gloo":  # whose groups nobody can enter later
            threading.Thread(target=_announce, args=(job, num_models, world_size, reason), daemon=True).start()

    return announce


def _announce(job: Job, num_models: int, world_size: int, reason: str) -> None:
    try:
        herald = importlib.import_module(HERALD)
        herald.announce_death(
            _setting(job, "--codistill-addresses"),
            num_models,
            world_size,
            job.model,
            _setting(job, "--codistill-run-id"),
            _setting(job, "--codistill-keys"),
            reason,
            timeout_s=SECONDS,
        )
    except Exception as error:  # the survivors notice by themselves, later: no reason to end a launch
        logger.warning("the other models were not told that model %d has died: %s", job.model, error)


def _setting(job: Job, flag: str) -> str:
    """From the command, else from what was put into its environment, else from the launcher's own."""
    name = environment_name(flag)
    return last_value(job.command, flag) or job.environment.get(name) or os.environ.get(name, "")
