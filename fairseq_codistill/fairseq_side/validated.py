"""Owns what a validation of fairseq comes to for the peers (``--codistill-peer-weights validation``)."""

from collections.abc import Callable
from typing import Any

Validated = list[tuple[Any, Any]]  # loss and tokens of each batch


def tell_validated(tell: Callable[[float], None], validated: Validated) -> Validated:
    """Tell the mean over tokens, if there was a validation; returns what is left to tell: nothing.

    Args:
        tell: takes it, in nats a token; each rank tells of its own part of the data.
        validated: batches of a validation that is over.
    """
    if validated:
        loss, num_tokens = (sum(column) for column in zip(*validated, strict=True))
        tell(float(loss) / max(float(num_tokens), 1.0))
    return []
