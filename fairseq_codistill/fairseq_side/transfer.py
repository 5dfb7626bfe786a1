"""Owns the batches of a transfer set: which goes beside which batch that is trained on, and the mark of a batch.

Their order is that of the data seed, the same on all models, wherever each of them is in data of its own.
"""

from typing import Any

from fairseq.data.iterators import CountingIterator, EpochBatchIterator

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.keys import fingerprint
from fairseq_codistill.fairseq_side.parts import counted_rows

TAG = "codistill"  # of a batch: what the models call it
SHARED = "codistill_transfer"  # of a batch: one of the transfer set, which goes to the device with it
AHEAD = "codistill_ahead"  # of a batch: the one that comes next, likewise


class TransferBatches:
    """The transfer set of one rank, without end.

    Args:
        iterator: over it, in the order of the data seed.
        interval: T.
        batches_per_update: of this rank, the same in every epoch; each of an update that is due takes one.
        padding_idx: index of the padding symbol in the targets.

    Attributes:
        num_batches: of this rank in one pass.
    """

    def __init__(self, iterator: EpochBatchIterator, interval: int, batches_per_update: int, padding_idx: int):
        self._iterator, self._interval, self._padding_idx = iterator, interval, padding_idx
        self._batches_per_update = batches_per_update
        self.num_batches = len(iterator)
        self._current: CountingIterator | None = None
        self._next = -1

    def beside(self, tag: dict) -> dict:
        """What to add to a batch that is trained on: nothing, or a batch of the transfer set.

        Args:
            tag: of that batch.
        """
        if tag["elapsed"] % self._interval:
            return {}
        number = tag["elapsed"] // self._interval * self._batches_per_update + tag["key"].micro_batch
        batch = self._at(number)
        if not batch:  # fairseq fills ragged shards with nothing
            return {}
        own = {"fingerprint": fingerprint_of(batch, self._padding_idx)}
        return {SHARED: {**batch, TAG: {**tag, **own, **counted_rows(batch["target"], self._padding_idx)}}}

    def _at(self, number: int) -> Any:
        passes, offset = divmod(number, self.num_batches)
        if number != self._next or offset == 0 or self._current is None:
            move_iterator(self._iterator, passes + 1, offset, True)
            self._current = self._iterator.next_epoch_itr(shuffle=True)
        self._next = number + 1
        return next(self._current)


def move_iterator(iterator: EpochBatchIterator, epoch: int, num_batches: int, is_shuffled: bool) -> None:
    """Let the next epoch of an iterator be that one, from behind so many batches of it on.

    Args:
        iterator: of fairseq; inside an epoch workers may start at once, with the epoch that its data set is in.
        epoch: from 1.
        num_batches: of this rank.
        is_shuffled: whether the batches of that epoch are.
    """
    if hasattr(iterator.dataset, "set_epoch"):
        iterator.dataset.set_epoch(epoch)
    iterator._cur_epoch_itr = None
    iterator.load_state_dict({"version": 2, "epoch": epoch, "iterations_in_epoch": num_batches, "shuffle": is_shuffled})


def fingerprint_of(batch: dict, padding_idx: int) -> bytes:
    """Of a batch of fairseq, whatever its padding.

    Raises:
        ConfigError: the task's batches do not say what they are.
    """
    try:
        sample_ids, target = batch["id"], batch["target"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"this task's batches have no {error}; codistillation needs 'id' and 'target' to tell batches apart, so "
            "--task cannot be codistilled"
        ) from error
    return fingerprint(sample_ids, target[target.ne(padding_idx)])
