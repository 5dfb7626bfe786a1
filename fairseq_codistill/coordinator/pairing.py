"""Owns who exchanges with whom at a position: a pure function of the data seed and the position, the same everywhere.

It knows nothing of who is there: a partner that is away costs its term, as any peer does.
"""

import functools
import hashlib

import numpy as np

from fairseq_codistill.coordinator.keys import BatchKey


def partners(num_models: int, per_position: int, data_seed: int, key: BatchKey, model: int) -> frozenset[int]:
    """The models that ``model`` exchanges with at a position.

    It is symmetric, and every other model is among them equally often, so the mean over the partners is an unbiased
    estimate of the mean over all peers. All ranks, micro-batches and parts of an update have the same.

    Args:
        num_models: n.
        per_position: p, how many; 0 for all others.
        data_seed: that all models share.
        key: position.
        model: whose partners.

    >>> [sorted(partners(4, 1, 7, BatchKey(1, 0), model)) for model in range(4)]
    [[2], [3], [0], [1]]
    """
    if not 0 < per_position < num_models - 1:
        return frozenset(range(num_models)) - {model}
    return _table(num_models, per_position, data_seed, key.epoch, key.position)[model]


@functools.lru_cache(maxsize=64)
def _table(num_models: int, per_position: int, data_seed: int, epoch: int, position: int) -> list[frozenset[int]]:
    """Partners of each model: the models sit in a circle in an order drawn anew, and each talks to those next to it."""
    name = repr((data_seed, epoch, position)).encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=4, person=b"partners").digest(), "little")
    seats = np.random.RandomState(seed).permutation(num_models).tolist()  # draws alike in every release of numpy
    offsets = {offset for near in range(1, per_position // 2 + 1) for offset in (near, -near)}
    if per_position % 2:
        offsets.add(num_models // 2)  # whoever sits opposite; n is even then
    found: list[frozenset[int]] = [frozenset()] * num_models
    for seat, model in enumerate(seats):
        found[model] = frozenset(seats[(seat + offset) % num_models] for offset in offsets)
    return found
