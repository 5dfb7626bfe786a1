"""Owns what is said of settings that can work and may not be what was meant. It never refuses but what cannot go on.

Nothing here imports torch.
"""

import logging
from collections.abc import Mapping
from typing import Any

from fairseq_codistill.choices import split_codec
from fairseq_codistill.config import CodistillationConfig, ConfigError, flag_name

logger = logging.getLogger(__name__)
# What a run should not change on its way without a word: who teaches, how much, and by what.
RESUMED = (
    "codistill_num_models",
    "codistill_exchange",
    "codistill_codec",
    "codistill_divergence",
    "codistill_interval",
    "codistill_weight",
    "codistill_weight_growth",
    "codistill_weight_max",
    "codistill_burn_in",
    "codistill_lookahead",
    "codistill_transfer",
    "codistill_own_data",
    "codistill_data_seed",
    "codistill_peers_per_position",
    "codistill_budget_mbit",
    "codistill_divergence_beta",
    "codistill_temperature",
    "codistill_peer_weights",
    "codistill_replica_mode",
    "codistill_replica_wait",
    "codistill_teacher",
)


# Of the time that the ranks of a model wait for each other: what a peer may cost, and something is left for the step.
LARGEST_SHARE = 0.8


def check_timeout(config: CodistillationConfig, group_timeout_s: float | None) -> None:
    """Refuse a wait for peers that would outlast that of the other ranks of this model.

    Args:
        config: validated options.
        group_timeout_s: of the model's process group; None where it has none.

    Raises:
        ConfigError: naming both, and what to set.
    """
    if group_timeout_s is None or config.codistill_timeout < LARGEST_SHARE * group_timeout_s:
        return
    raise ConfigError(
        f"--codistill-timeout is {config.codistill_timeout:g} s, and the ranks of this model wait "
        f"{group_timeout_s:g} s for each other: one that waits for a late peer would be given up by the others. Set "
        f"--codistill-timeout below {LARGEST_SHARE * group_timeout_s:g}, or give torch.distributed.init_process_group "
        "a longer timeout"
    )


def changed_settings(before: Mapping[str, Any], now: CodistillationConfig) -> list[str]:
    """What a run that goes on from a checkpoint does otherwise than the one that wrote it.

    Args:
        before: field name -> value, as the checkpoint has it; fields that it lacks are not compared.
        now: validated options of the run that goes on.

    Returns:
        one text for each setting that differs: ``--codistill-codec was 'fp16' and is 'topk:8'``.

    Raises:
        ConfigError: the number of models differs where checkpoints are exchanged: the copies that were saved would no
            longer be those of the peers.
    """
    num_models = before.get("codistill_num_models", now.codistill_num_models)
    exchanges = {before.get("codistill_exchange", now.codistill_exchange), now.codistill_exchange}
    if num_models != now.codistill_num_models and exchanges == {"checkpoints"}:
        raise ConfigError(
            f"--codistill-num-models was {num_models} and is {now.codistill_num_models}: with --codistill-exchange "
            "checkpoints the copies of the peers are saved with the model, so a run goes on with as many models as it "
            f"had. Give it {num_models} again, or start anew from the parameters alone"
        )
    return [
        f"{flag_name(name)} was {before[name]!r} and is {getattr(now, name)!r}"
        for name in RESUMED
        if name in before and before[name] != getattr(now, name)
    ]


def idle_settings(config: CodistillationConfig, num_updates: int | None) -> list[str]:
    """Why nothing, or next to nothing, will be exchanged, as one warning each.

    Args:
        config: validated options.
        num_updates: updates of the whole run, None where nobody knows.
    """
    if config.codistill_num_models == 1:
        return []
    if config.codistill_weight == 0:
        return [
            "--codistill-weight is 0 on all models: they meet, and nothing will be exchanged or distilled; give alpha "
            "a value above 0 to codistil"
        ]
    if num_updates is None:
        return []
    interval, burn_in = config.codistill_interval, config.codistill_burn_in
    if burn_in >= num_updates:
        return [f"--codistill-burn-in is {burn_in}, and the run has {num_updates} updates: nothing will be exchanged"]
    num_exchanges = (num_updates - 1) // interval - (burn_in - 1) // interval
    if num_exchanges > 1 or num_updates == 1:
        return []
    return [
        f"--codistill-interval is {interval}, and the run has {num_updates} updates"
        + (f", {burn_in} of them burn-in" if burn_in else "")
        + f": {'one exchange will be made' if num_exchanges else 'nothing will be exchanged'}"
    ]


def of_batches(
    config: CodistillationConfig,
    settings: Mapping[str, Any],
    num_batches: int,
    update_freq: int,
    has_transfer_set: bool,
) -> list[str]:
    """What is odd about the batches of a run, as one warning each.

    Args:
        config: validated options.
        settings: that the others are told, by name.
        num_batches: of one rank in an epoch; 0 where nobody counts.
        update_freq: batches of an update.
        has_transfer_set: whether batches of a transfer set are exchanged.
    """
    found = []
    drawn_by = settings.get("data_seed of CoordinatedBatches")
    if drawn_by is not None and config.codistill_data_seed not in (CodistillationConfig.codistill_data_seed, drawn_by):
        found.append(
            f"--codistill-data-seed is {config.codistill_data_seed}, and CoordinatedBatches draws by {drawn_by}: the "
            "order of the batches is that of the latter; give it the same data_seed"
        )
    if not num_batches and config.codistill_weight_growth != 1:
        found.append(
            f"--codistill-weight-growth is {config.codistill_weight_growth:g}, and the batches are one epoch without "
            "end: alpha never grows; give meet() the number of batches in an epoch, or leave the growth at 1"
        )
    if has_transfer_set and num_batches % update_freq:
        found.append(
            f"an epoch has {num_batches} batches, and an update {update_freq}: the last update of an epoch exchanges "
            "fewer batches of the transfer set, and where one is due then, models with epochs of another length wait; "
            "let --update-freq divide the batches of an epoch on every model"
        )
    return found


def whole_predictions(config: CodistillationConfig, num_classes: int) -> str | None:
    """Why a codec that is meant to send a part will send everything, as a warning; None where it sends a part."""
    name, size = split_codec(config.codistill_codec)
    if name not in ("columns", "topk") or size < num_classes:
        return None
    return (
        f"--codistill-codec is {config.codistill_codec!r}, and there are {num_classes} classes: all of them are sent, "
        "which fp16 does with fewer bits; choose a smaller size to save any"
    )


class Unused:
    """What is set and only a method does that a loop of one's own may never call.

    Args:
        config: validated options.
    """

    def __init__(self, config: CodistillationConfig):
        self._of: dict[str, str] = {}
        if config.is_codistilled and config.codistill_lookahead:
            self._of["look_ahead"] = "lookahead is set, and look_ahead() or forward_backward(following=...) does it"
        if config.is_codistilled and config.codistill_parts not in ("1", "auto"):
            self._of["forward_backward"] = f"parts is {config.codistill_parts}, and forward_backward() cuts batches"
        self._num_batches = 0

    def discard(self, method: str) -> None:
        """It was called."""
        self._of.pop(method, None)

    def after_a_batch(self) -> None:
        """Warn once, at the second batch, of each that was not called by then."""
        self._num_batches += 1
        if self._num_batches == 2:
            for text in self._of.values():
                logger.warning("codistillation: %s, which this loop has not called: the setting does nothing", text)
