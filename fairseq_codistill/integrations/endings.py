"""Owns what a model says at the end of a process whose host tells its adapter of no end: finished, or nothing.

Where it says nothing, the exchange itself says that its process ended, which is a failure to the other models.
"""

import atexit
import sys

from fairseq_codistill.codistiller import Codistiller
from fairseq_codistill.sampling import CoordinatedBatches


def finish_at_exit(peers: Codistiller, batches: CoordinatedBatches) -> None:
    """Call it once the models have met: what they register for the end themselves comes after it then.

    Args:
        peers: whose training is finished where the process ends between two epochs, and not by an error.
        batches: that it is trained on.
    """
    atexit.register(_finish, peers, batches)


def _finish(peers: Codistiller, batches: CoordinatedBatches) -> None:
    if batches.elapsed % len(batches) == 0 and not hasattr(sys, "last_value"):  # of an error that nobody handled
        peers.close()
