"""Owns the transfer set of a loop of one's own: which batch of it belongs to which update, and what is learned of it.

Its order is that of the data seed, the same on all models, wherever each of them is in data of its own.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fairseq_codistill import figures
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.keys import fingerprint
from fairseq_codistill.exchanger import Exchanger
from fairseq_codistill.lesson import Batch
from fairseq_codistill.plain_loop import Rows, batch_sampler_of, check_ids

Predict = Callable[[Any], tuple[Tensor, ...]]


def shared_set_of(
    transfer: Any, config: CodistillationConfig, batches_per_update: int, ranks: tuple[int, int]
) -> "SharedSet | None":
    """The transfer set of a loop that leaves it to us; None where there is none, or the loop looks after it itself.

    Args:
        transfer: as given to :meth:`Codistiller.meet`.
        config: validated options.
        batches_per_update: of this rank.
        ranks: this rank of how many.

    Raises:
        ConfigError: it is no loader of such batches, is named where the loop has no such names, or cannot be exchanged
            with the other options.
    """
    if not config.is_codistilled:
        return None
    if transfer is not None and config.codistill_lookahead:
        raise ConfigError(
            "--codistill-lookahead is set, and a transfer set is exchanged: only batches that are trained on are "
            "predicted ahead; leave one of the two out"
        )
    if transfer is not None and config.codistill_exchange != "predictions":
        raise ConfigError(
            f"--codistill-exchange is {config.codistill_exchange!r}, and a transfer set is exchanged, of which only "
            "predictions travel; take predictions, or leave transfer= out and set --codistill-own-data"
        )
    if isinstance(transfer, Mapping):
        return None
    if transfer is None and config.codistill_transfer:
        raise ConfigError(
            f"--codistill-transfer is {config.codistill_transfer!r}, and this training loop has no data by that name; "
            "give its loader: meet(..., transfer=loader)"
        )
    return None if transfer is None else SharedSet(transfer, config.codistill_interval, batches_per_update, ranks)


class SharedSet:
    """The second loader of a loop.

    Args:
        loader: a ``DataLoader`` whose ``batch_sampler`` is a ``CoordinatedBatches``.
        interval: T, updates of which one takes batches of it.
        batches_per_update: of this rank; each of an update that is due takes one.
        ranks: this rank of how many.

    Raises:
        ConfigError: it is something else.
    """

    def __init__(self, loader: Any, interval: int, batches_per_update: int, ranks: tuple[int, int]):
        sampler = batch_sampler_of(loader, ranks) if isinstance(loader, DataLoader) else None
        if sampler is None:
            raise ConfigError(
                f"transfer is a {type(loader).__name__}; give a DataLoader of the shared data with "
                "batch_sampler=CoordinatedBatches(len(dataset), batch_size=...)"
            )
        self._loader, self._sampler = loader, sampler
        self._interval, self._batches_per_update = interval, batches_per_update
        self._batches: Iterator[Any] = iter(())
        self._next = -1

    def settings(self) -> dict[str, Any]:
        """What must be equal on all models."""
        table = self._sampler.table
        return {
            "num_samples of the transfer set": self._sampler.num_samples,
            "batch_size of the transfer set": table.batch_size,
            "data_seed of the transfer set": table.data_seed,
            "update_freq": self._batches_per_update,
        }

    def at(self, elapsed: int, micro_batch: int) -> Any:
        """The batch that belongs to an update that is due.

        Args:
            elapsed: updates since the start of training.
            micro_batch: index inside the update.
        """
        number = elapsed // self._interval * self._batches_per_update + micro_batch
        if number != self._next:
            self._begin(number)
        try:
            batch = next(self._batches)
        except StopIteration:  # the next pass, in another order
            self._begin(number)
            batch = next(self._batches)
        self._next = number + 1
        return batch

    def learn(
        self,
        exchanger: Exchanger,
        batch: Batch,
        num_own_rows: int,
        predict: Predict | None,
    ) -> Tensor | None:
        """Exchange what is due at an update, and add its figures to those of the batch that is trained on.

        Args:
            exchanger: of this rank.
            batch: that is trained on, which has the position.
            num_own_rows: what the loop's loss is the mean over.
            predict: a batch of the loader -> (logits, ids) or (logits, ids, mask).

        Returns:
            () α · mean over the peers of D, the mean over rows; None where nothing is due or nobody answered.

        Raises:
            ConfigError: no ``predict``.
            ValueError: what it returns does not belong together.
        """
        if predict is None:
            raise ConfigError(
                "a transfer set was given to meet(): give loss() or term() transfer=lambda batch: (logits, ids)"
            )
        shared = dataclasses.replace(batch, is_shared=True)
        if exchanger.weight(shared) == 0.0:
            return None
        own = exchanger.sums
        logits, ids, *mask = predict(self.at(batch.elapsed, batch.key[2]))
        rows = Rows.of(logits, None, mask[0] if mask else None)
        which = rows.known_by if len(rows.known_by) else torch.tensor([rows.num_rows])
        mark = fingerprint(check_ids(ids, logits.size(0)), which)
        found = exchanger.step(dataclasses.replace(shared, fingerprint=mark), rows.logits, rows.index)
        scale = num_own_rows / max(rows.num_rows, 1)  # the figures are divided by the loop's own rows
        exchanger.sums = figures.with_shared(own, exchanger.sums, scale)
        return None if found is None else found.total / max(rows.num_rows, 1)

    def _begin(self, number: int) -> None:
        self._sampler.move_to(number)
        self._batches = iter(self._loader)
