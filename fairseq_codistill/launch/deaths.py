"""Owns telling the other models that one has died or finished, in its name: they need not wait until they miss it.

The launcher sees at once what they would notice after a timeout. It says nothing of a model that it starts again: the
others wait for that one, at most their timeout, and do not run away from it. One that has finished says so itself, but
not to a model that is started after it. Nothing here decides who has died or finished.
"""

import logging
import threading
from collections.abc import Callable, Sequence

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.peers import IN_ORDER
from fairseq_codistill.environment import environment_name
from fairseq_codistill.launch.plan import Job, last_value, setting_of

logger = logging.getLogger(__name__)


class Deaths:
    """Of one launch.

    Args:
        jobs: as they were started: addresses, keys and the name of the run are theirs.
        num_models: n.
        world_size: ranks of a model.
        with_keys: gives a job whose keys are there.
    """

    def __init__(
        self, jobs: Sequence[Job], num_models: int, world_size: int, with_keys: Callable[[Job], Job] = lambda job: job
    ):
        self._with_keys = with_keys
        self._jobs = {job.model: job for job in jobs}
        self._num_models, self._world_size = num_models, world_size
        self._is_over = threading.Event()
        self._superseded: dict[int, threading.Event] = {}
        self._threads: list[threading.Thread] = []

    def announce(self, model: int, reason: str) -> None:
        """Tell the others, in a thread of its own: who still loads its data is told as soon as it listens.

        Args:
            model: that has ended.
            reason: for the logs of the others; ``IN_ORDER`` after all of its training, so that nobody who requires it
                fails for want of it.
        """
        if self._num_models == 1 or _setting(self._jobs[model], "--codistill-transport") == "gloo":
            return  # over gloo a connection that breaks is noticed by itself
        # Who has not heard of it yet may hear the newer word alone: the older one was for the process before.
        self._superseded.get(model, threading.Event()).set()
        self._superseded[model] = superseded = threading.Event()
        self._threads.append(threading.Thread(target=self._announce, args=(model, reason, superseded), daemon=True))
        self._threads[-1].start()

    def close(self) -> None:
        """The launch is over, and there is nobody to tell."""
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=2.0)

    def _announce(self, model: int, reason: str, superseded: threading.Event) -> None:
        from fairseq_codistill.coordinator import herald  # loads ZeroMQ, which most launches never need

        job = self._with_keys(self._jobs[model])
        relay = _setting(job, "--codistill-relay")
        try:
            (herald.announce_death_through_relay if relay else herald.announce_death)(
                relay or _setting(job, "--codistill-addresses"),
                self._num_models,
                self._world_size,
                model,
                _setting(job, "--codistill-run-id"),
                _setting(job, "--codistill-keys"),
                reason,
                timeout_s=_start_timeout(job),
                stop=lambda: self._is_over.is_set() or superseded.is_set(),
            )
        except Exception as error:  # the survivors notice by themselves, later: no reason to end a launch
            level = logging.INFO if reason == IN_ORDER else logging.WARNING  # most have it from the model itself
            logger.log(level, "[launch] the other models were not told that model %d has ended: %s", model, error)


def _start_timeout(job: Job) -> float:
    """How long the others may take until they listen."""
    try:
        return float(_setting(job, "--codistill-start-timeout"))
    except ValueError:
        return CodistillationConfig().codistill_start_timeout


def _setting(job: Job, flag: str) -> str:
    """From the command, else from what was put into its environment, else what the program itself would find."""
    return last_value(job.command, flag) or job.environment.get(environment_name(flag)) or setting_of(job.command, flag)
