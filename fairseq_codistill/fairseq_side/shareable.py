"""Owns what of a fairseq task's batches cannot be shared, or not counted alike: told before anything is exchanged."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from fairseq.data.denoising_dataset import DenoisingDataset

from fairseq_codistill.config import CodistillationConfig, ConfigError

logger = logging.getLogger(__name__)


def refuse_what_differs(config: CodistillationConfig, serves_all_epochs: bool, dataset: Any) -> None:
    """Of the batches that are trained on.

    Args:
        config: validated options.
        serves_all_epochs: whether one iterator does; else batches are made anew for every epoch.
        dataset: of the batches.

    Raises:
        ConfigError: models would see other sources, or updates that are to be counted are not.
    """
    if not config.is_codistilled:
        return
    has_own = bool(config.codistill_transfer or config.codistill_own_data)
    if not has_own and draws_sources(dataset):
        raise ConfigError(
            "--task: this one draws the noise of its sources from torch's random numbers, so every model would see "
            "others; such a task (denoising) cannot be codistilled"
        )
    if not serves_all_epochs and (config.codistill_burn_in or config.codistill_interval > 1):
        _warn_of_changing_epochs()
    if not serves_all_epochs and has_own:
        given = "--codistill-transfer" if config.codistill_transfer else "--codistill-own-data"
        raise ConfigError(
            f"{given} is set, and batches are made anew for every epoch (shards, virtual epochs, --grouped-shuffling), "
            "over which updates are not counted; give one data folder, no --virtual-epoch-size, no --grouped-shuffling "
            "and no --update-epoch-batch-itr"
        )


def of_whole_passes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of fairseq's iterator less those with which a pass ends before its length says so."""
    return {name: value for name, value in options.items() if name not in ("skip_remainder_batch", "grouped_shuffling")}


def draws_sources(dataset: Any) -> bool:
    """Whether what a data set gives as source is drawn from torch's numbers, of which each model has its own."""
    inside = getattr(dataset, "datasets", [getattr(dataset, "dataset", None)])
    inside = inside.values() if isinstance(inside, dict) else inside
    return isinstance(dataset, DenoisingDataset) or any(draws_sources(one) for one in inside if one is not None)


@functools.cache
def _warn_of_changing_epochs() -> None:
    logger.warning(
        "codistillation: batches are made anew for every epoch (shards, virtual epochs, --grouped-shuffling). Where "
        "those differ "
        "in length, --codistill-burn-in and --codistill-interval count as if all were as long as the one at hand"
    )
