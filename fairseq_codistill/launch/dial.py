"""Owns the one dial: from the speed of a link to codec, interval, parts and peers, and why. It starts nothing.

What it knows of quality is the order of ``results/codecs`` and ``results/leaderboard``: dense logits, then sixteen
drawn classes a row, then fewer.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from fairseq_codistill.choices import split_codec
from fairseq_codistill.option import ConfigError

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
LADDER = ("fp16", "int8", "counts:16", "counts:8")  # best first
ALLOWED = 0.03  # share of a step that waiting may cost
# Share of a step for which messages of a step in two parts are under way while something is computed: the forward pass
# of the second part, or the backward pass of the first (docs/performance.md).
HIDDEN = {1: 0.0, 2: 1 / 3}
# Bits of a row of counts:K are about this times K to that power, on predictions with 2.2 bits of entropy
# (results/codecs/counts.txt); what plain formulas take is known exactly.
COUNTS_BITS, COUNTS_POWER = 6.5, 0.74


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What to run with.

    Attributes:
        settings: option -> value.
        why: one sentence for each thing that was decided.
    """

    settings: dict[str, str]
    why: list[str]


def parse_link(text: str) -> float:
    """Bits a second.

    Raises:
        ConfigError: no speed.

    >>> parse_link("20mbit"), parse_link("1.5 Gbit/s")
    (20000000.0, 1500000000.0)
    """
    found = re.fullmatch(r"([0-9.]+)\s*(kbit|mbit|gbit)(/s)?", text.strip().lower())
    try:
        speed = float(found[1]) * UNITS[found[2]] if found else 0.0
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise ConfigError(f"--link is {text!r}; it must be a speed in kbit, mbit or gbit a second: 20mbit")
    return speed


def bits_per_row(codec: str, num_classes: int) -> float:
    """Of one row: exact for plain codecs, late in training for those that are entropy coded."""
    name, size = split_codec(codec)
    if name in ("counts", "label", "vote"):
        return COUNTS_BITS * max(size, 1) ** COUNTS_POWER
    from fairseq_codistill.coordinator.codecs.choice import make_codec

    return 8 * make_codec(codec).num_bytes(1000, num_classes) / 1000


def propose(link: float, step_s: float, num_rows: int, num_classes: int, num_models: int, whole: str = "") -> Proposal:
    """The best codec that a link carries at every update, or the shortest interval at which it carries one.

    Args:
        link: bits a second that one device can send.
        step_s: seconds of an update without communication.
        num_rows: of one device in one update.
        num_classes: of the predictions.
        num_models: n, 2 or more.
        whole: why no batch is cut; empty where one may be.
    """
    cuts = {parts: hidden for parts, hidden in HIDDEN.items() if parts == 1 or not whole}
    peers = [num_models - 1] + ([1] if num_models > 2 and num_models % 2 == 0 else [])
    for receivers in peers:
        for codec in LADDER:
            seconds = receivers * num_rows * bits_per_row(codec, num_classes) / link
            for parts, hidden in cuts.items():
                if seconds <= (hidden + ALLOWED) * step_s:
                    return _proposal(codec, 1, parts, receivers, seconds, step_s, num_models, whole)
    codec, receivers = LADDER[-2], peers[-1]
    seconds = receivers * num_rows * bits_per_row(codec, num_classes) / link
    parts = max(cuts)
    interval = math.ceil((seconds - cuts[parts] * step_s) / (ALLOWED * step_s))
    return _proposal(codec, interval, parts, receivers, seconds, step_s, num_models, whole)


def _proposal(
    codec: str, interval: int, parts: int, receivers: int, seconds: float, step_s: float, num_models: int, whole: str
) -> Proposal:
    settings = {"--codistill-codec": codec}
    takes = f"{seconds * 1e3:,.3g} ms of {step_s * 1e3:,.4g} ms"
    why = [f"{codec}: sending one update's predictions takes {takes}"]
    better: Sequence[str] = LADDER[: LADDER.index(codec)]
    if better:
        why[0] += f"; {' and '.join(better)} would take more than the link carries at every update"
    if split_codec(codec)[0] == "counts":
        settings["--codistill-divergence"] = "kl"
        why.append("kl: drawn classes give an unbiased estimate of it alone")
    if interval > 1:
        settings["--codistill-interval"] = str(interval)
        why.append(f"T = {interval}: what is not hidden then costs at most {ALLOWED:.0%} of {interval} updates")
    if parts > 1:
        settings["--codistill-parts"] = str(parts)
        why.append(
            f"{parts} parts: up to {HIDDEN[parts]:.0%} of an update of it travels while something is computed; not for "
            "models with batch normalisation, where every part would have statistics of its own"
        )
    elif interval == 1:
        why.append(f"1 part: the wait is at most {ALLOWED:.0%} of an update, nothing need be hidden")
    else:
        why.append(f"1 part: {whole}")
    if receivers < num_models - 1:
        settings["--codistill-peers-per-position"] = str(receivers)
        why.append(f"{receivers} peer a position: to all {num_models - 1} it would be {num_models - 1} times as much")
    return Proposal(settings, why)


def report(link: float, proposal: Proposal) -> str:
    """For ``--dry-run``."""
    lines = [f"Proposed for a link of {link / 1e6:,.4g} Mbit/s for each device:"]
    lines.append("  " + " ".join(f"{name} {value}" for name, value in proposal.settings.items()))
    return "\n".join(lines + [f"  - {reason}" for reason in proposal.why])
