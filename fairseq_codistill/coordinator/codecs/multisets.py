"""Owns ascending sequences as one whole number each, which saves what the order of their values would take."""

import functools
import math

import numpy as np

from fairseq_codistill.coordinator.codecs.coder import MAX_UNIFORM, Ints


def num_multisets(num_values: int, length: int) -> int:
    """Ascending sequences of ``length`` values below ``num_values``, repetitions included.

    >>> num_multisets(3, 2)  # 00 01 02 11 12 22
    6
    """
    return math.comb(num_values + length - 1, length)


def longest(num_values: int) -> int:
    """The longest sequence whose number the coder still takes."""
    length = 1
    while num_multisets(num_values, length + 1) <= MAX_UNIFORM:
        length += 1
    return length


def rank(sequences: Ints, num_values: int) -> Ints:
    """(m, length) ascending values below ``num_values`` -> (m,) int64 numbers below :func:`num_multisets`.

    >>> rank(np.array([[0, 0], [0, 1], [1, 1], [2, 2]]), 3).tolist()
    [0, 1, 2, 5]
    """
    ranks = np.zeros(len(sequences), np.int64)
    for place in range(sequences.shape[1]):
        ranks += _column(num_values + place, place + 1)[sequences[:, place] + place]
    return ranks


def unrank(ranks: Ints, num_values: int, length: int) -> Ints:
    """The inverse of :func:`rank`: (m, length) int64."""
    left = ranks.astype(np.int64)
    sequences = np.empty((len(ranks), length), np.int64)
    for place in reversed(range(length)):
        column = _column(num_values + place, place + 1)
        chosen = np.searchsorted(column, left, side="right") - 1
        left = left - column[chosen]
        sequences[:, place] = chosen - place
    return sequences


@functools.lru_cache(maxsize=256)
def _column(size: int, chosen: int) -> Ints:
    """(size,) int64: in how many ways ``chosen`` things can be chosen out of 0, 1, ... ``size`` - 1."""
    return np.array([math.comb(number, chosen) for number in range(size)], np.int64)
