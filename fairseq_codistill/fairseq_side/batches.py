"""Owns the shared order of the batches: each leaves the data iterator marked with its position and fingerprint, and a
model that fell behind skips ahead in it.

The mark is made where the batch comes out of the shared order, on the CPU, before anything that differs between
models (precision, device, skipped updates) can touch it.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from fairseq.data.iterators import CountingIterator, EpochBatchIterator

from fairseq_codistill.coordinator.keys import BatchKey, DataOrder, SampleMarks, sample_marks
from fairseq_codistill.fairseq_side.parts import counted_rows, num_tokens_each
from fairseq_codistill.fairseq_side.transfer import AHEAD, TAG, TransferBatches, fingerprint_of, move_iterator
from fairseq_codistill.lookahead import with_next

logger = logging.getLogger(__name__)


class SharedBatches:
    """The training batches of one rank, in the order that all models share.

    Every iterator of ``epoch_iterator`` puts a mark into its batches, under ``TAG``: ``key`` (a BatchKey), ``elapsed``
    (updates' worth of batches since the start of training, from 0) and ``fingerprint``. Empty batches, by which
    fairseq fills ragged shards, stay empty.

    Args:
        epoch_iterator: what the task returned; changed in place, since fairseq keeps a reference.
        order: counts its batches.
        padding_idx: index of the padding symbol in the targets.
        curriculum: fairseq's ``--curriculum``, the number of epochs whose batches are not shuffled.
        before_epoch: called before the first batch of an epoch is loaded; it may call :meth:`move_to`.
        serves_all_epochs: whether ``epoch_iterator`` does; else it can only be moved within its epoch.
        after_update: called between two updates, before the next batch is loaded, and after the last one of an epoch.
        is_cut: whether a step may cut a batch into parts; then marks hold the number of target tokens of each sentence.
        kept_from: marks say what each sentence is called, for the predictions of teachers that are kept of target
            positions from this one on; None: they do not.
        looks_ahead: beside a batch goes the one that comes next in its epoch.
        transfer: beside the batches of every T-th update goes one of these; the batches themselves have no fingerprint.
    """

    def __init__(
        self,
        epoch_iterator: EpochBatchIterator,
        order: DataOrder,
        padding_idx: int,
        curriculum: int = 0,
        before_epoch: Callable[["SharedBatches"], None] = lambda batches: None,
        serves_all_epochs: bool = True,
        after_update: Callable[[], None] = lambda: None,
        is_cut: bool = False,
        kept_from: int | None = None,
        transfer: TransferBatches | None = None,
        looks_ahead: bool = False,
    ):
        self.order = order
        self._after_update = after_update
        self.serves_all_epochs = serves_all_epochs
        self.iterator = epoch_iterator
        self._padding_idx, self._is_cut, self._kept_from = padding_idx, is_cut, kept_from
        self._curriculum, self._transfer, self._looks_ahead = curriculum, transfer, looks_ahead
        self._before_epoch = before_epoch
        self._make_iterator = epoch_iterator._get_iterator_for_epoch
        self._begin_epoch = epoch_iterator.next_epoch_itr
        self._current: SkippingIterator | None = None
        self._is_in_epoch = False
        epoch_iterator._get_iterator_for_epoch = self._make_marked_iterator
        epoch_iterator.next_epoch_itr = self._next_epoch
        epoch_iterator._codistill_batches = self

    @staticmethod
    def of(epoch_iterator: EpochBatchIterator) -> "SharedBatches | None":
        """What an iterator was given before: fairseq hands the same one out again at every epoch."""
        return getattr(epoch_iterator, "_codistill_batches", None)

    @property
    def elapsed(self) -> int:
        """Updates' worth of batches before the next batch, since the start of training."""
        if self._is_in_epoch and self._current is not None:
            epoch, num_batches = self.iterator.epoch, self._current.n
        else:
            epoch, waiting = self.iterator.next_epoch_idx, self.iterator._next_epoch_itr
            num_batches = waiting.n if waiting is not None else 0
        return self.order.elapsed(epoch, -(-num_batches // self.order.batches_per_update(epoch)))

    def move_to(self, elapsed: int) -> None:
        """Let the epoch that is about to begin be the one of that position, and begin there.

        Args:
            elapsed: updates' worth of batches since the start of training.
        """
        iterator, key = self.iterator, self.order.key(elapsed)
        if callable(iterator.batch_sampler) and key.epoch != iterator.epoch:
            iterator._frozen_batches = None
        num_batches = key.position * self.order.batches_per_update(key.epoch)
        move_iterator(iterator, key.epoch, num_batches, self._is_shuffled(key.epoch))

    def skip(self, num_updates: int) -> int:
        """Drop the next updates' worth of batches, up to the end of the epoch. Call it between two updates.

        Returns:
            how many updates were dropped.
        """
        if self._current is None:
            return 0
        per_update = self.order.batches_per_update(self.iterator.epoch)
        num_batches = min(num_updates * per_update, len(self._current) - self._current.n)
        self._current.skip(num_batches)
        return -(-num_batches // per_update)

    def _is_shuffled(self, epoch: int) -> bool:
        return epoch > self._curriculum

    def _next_epoch(self, shuffle: bool = True, **settings: Any) -> CountingIterator:
        self._is_in_epoch = False
        before = self.iterator.next_epoch_idx
        self._before_epoch(self)
        if self.iterator.next_epoch_idx != before:
            shuffle = self._is_shuffled(self.iterator.next_epoch_idx)
        iterator = self._begin_epoch(shuffle=shuffle, **settings)
        self._is_in_epoch = True
        return iterator

    def _make_marked_iterator(self, epoch: int, *args: Any, **kwargs: Any) -> CountingIterator | None:
        iterator = self._make_iterator(epoch, *args, **kwargs)
        if iterator is None:
            return None
        marked = self._marked(iterator, epoch)
        if self._looks_ahead:
            marked = (_beside(batch, following) for batch, following in with_next(marked))
        self._current = SkippingIterator(marked, start=iterator.n, total=len(iterator))
        self._current.source = iterator
        self._current.after_update = self._after_update
        return self._current

    def _marked(self, iterator: CountingIterator, epoch: int) -> Iterator[Any]:
        before, frequency = self.order.elapsed(epoch, 0), self.order.batches_per_update(epoch)
        index = iterator.n
        for batch in iterator:
            if batch:
                position, micro_batch = divmod(index, frequency)
                batch[TAG] = {
                    "key": BatchKey(epoch, position, micro_batch),
                    "elapsed": before + position,
                    "fingerprint": b"" if self._transfer else fingerprint_of(batch, self._padding_idx),
                }
                batch[TAG].update(counted_rows(batch["target"], self._padding_idx))
                if self._transfer is not None:
                    batch.update(self._transfer.beside(batch[TAG]))
                if self._is_cut:
                    batch[TAG]["tokens"] = num_tokens_each(batch["target"], self._padding_idx)
                if self._kept_from is not None:
                    batch[TAG]["samples"] = _samples(batch, self._padding_idx, self._kept_from)
            index += 1
            yield batch


class SkippingIterator(CountingIterator):
    """fairseq's counting iterator, of which batches may be skipped while an epoch is under way.

    The groups that fairseq makes of it count on their own, and would look for the skipped batches at the end of the
    epoch; see :func:`~fairseq_codistill.fairseq_side.compat.count_groups_by_their_source`.
    """

    after_update: Callable[[], None] | None = None  # for the groups, which fairseq asks for the next one
    source: CountingIterator  # of the batches, before they were marked

    def take(self, n: int) -> CountingIterator:
        """fairseq's own, also for the source: what loads ahead would wait for ever to hand out the rest."""
        self.source.take(n)
        return super().take(n)


def log_skipped(num_updates: int, here: BatchKey, there: BatchKey) -> None:
    """Say that batches were left out, to be where the other models are."""
    logger.warning(
        "codistillation: the other models are ahead; skipped %d updates' worth of batches, from %s to %s",
        num_updates,
        here,
        there,
    )


def _beside(batch: Any, following: Any) -> Any:
    return {**batch, AHEAD: following} if batch and following else batch


def _samples(batch: dict, padding_idx: int, kept_from: int) -> SampleMarks:
    """What each sentence is called, without padding, which depends on the batch."""
    target, sources = batch["target"][:, kept_from:], batch["net_input"]["src_tokens"]
    is_token = target.ne(padding_idx)
    inputs = [source[source.ne(padding_idx)] for source in sources]
    return sample_marks(batch["id"], target[is_token], is_token.sum(dim=1).tolist(), inputs)
