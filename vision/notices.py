"""Owns what a user should know before the first update: settings that work, and do something else than one may think.

Pure functions of the options; who calls them writes the lines. What cannot work at all is an error elsewhere.
"""

from typing import Any

from fairseq_codistill.config import flag_name, split_codec

from .config import VisionConfig

# Options of codistillation that change what is learned when a run goes on with others.
WATCHED = tuple(
    f"codistill_{name}"
    for name in (
        "num_models weight weight_growth weight_max burn_in divergence codec interval exchange "
        "replica_mode replica_wait"
    ).split()
)


def of_run(config: VisionConfig, num_updates: int, num_classes: int) -> list[str]:
    """That nothing, hardly anything, or everything will be exchanged.

    Args:
        config: validated options.
        num_updates: length of the run.
        num_classes: of the data set.
    """
    if not config.is_codistilled:
        return []
    found = []
    if config.codistill_burn_in >= num_updates:
        found.append(
            f"--codistill-burn-in is {config.codistill_burn_in} and the run has {num_updates} updates: nothing will be "
            "exchanged"
        )
    elif config.codistill_interval >= num_updates:
        found.append(
            f"--codistill-interval is {config.codistill_interval} and the run has {num_updates} updates: nothing will "
            "be exchanged after the first one"
        )
    name, size = split_codec(config.codistill_codec)
    if config.codistill_exchange == "predictions" and size >= num_classes and name in ("columns", "topk"):
        found.append(
            f"--codistill-codec is {config.codistill_codec} and there are {num_classes} classes: all of them will be "
            "sent, for which fp16 or int8 take fewer bits"
        )
    return found


def of_resumption(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Options of codistillation that a run goes on with, and began without.

    Args:
        before: options by name, as stored; those that came later are missing.
        now: likewise, in force.
    """
    return [
        f"{flag_name(name)} is {now[name]!r}; up to the checkpoint it was {before[name]!r}"
        for name in WATCHED
        if name in before and name in now and before[name] != now[name]
    ]
