"""Owns the marking of batches: each leaves the data iterator with its position and fingerprint.

The mark is made where the batch comes out of the shared order, on the CPU, before anything that differs between
models (precision, device, skipped updates) can touch it.
"""

from collections.abc import Iterator
from typing import Any

from fairseq.data.iterators import CountingIterator, EpochBatchIterator

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator import BatchKey, fingerprint

TAG = "codistill"


def mark_batches(epoch_iterator: EpochBatchIterator, update_freq: list[int], padding_idx: int) -> EpochBatchIterator:
    """Make every iterator of ``epoch_iterator`` put a mark into its batches, under ``TAG``:

    ``key`` (a BatchKey), ``elapsed`` (updates' worth of batches since the start of training, from 0) and
    ``fingerprint``. Empty batches, by which fairseq fills ragged shards, stay empty.

    Args:
        epoch_iterator: what the task returned; changed in place, since fairseq keeps a reference.
        update_freq: fairseq's ``--update-freq``, one value an epoch, the last one for all that follow.
        padding_idx: index of the padding symbol in the targets.
    """
    if getattr(epoch_iterator, "_codistill_marked", False):
        return epoch_iterator
    epoch_iterator._codistill_marked = True
    make_iterator = epoch_iterator._get_iterator_for_epoch

    def make_marked_iterator(epoch: int, *args: Any, **kwargs: Any) -> CountingIterator | None:
        iterator = make_iterator(epoch, *args, **kwargs)
        if iterator is None:
            return None
        marked = _marked(iterator, epoch, update_freq, padding_idx)
        return CountingIterator(marked, start=iterator.n, total=len(iterator))

    epoch_iterator._get_iterator_for_epoch = make_marked_iterator
    return epoch_iterator


def _marked(iterator: CountingIterator, epoch: int, update_freq: list[int], padding_idx: int) -> Iterator[Any]:
    def frequency(of_epoch: int) -> int:
        return update_freq[min(of_epoch, len(update_freq)) - 1]

    before = sum(-(-len(iterator) // frequency(earlier)) for earlier in range(1, epoch))
    index = iterator.n
    for batch in iterator:
        if batch:
            position, micro_batch = divmod(index, frequency(epoch))
            batch[TAG] = {
                "key": BatchKey(epoch, position, micro_batch),
                "elapsed": before + position,
                "fingerprint": _fingerprint(batch, padding_idx),
            }
        index += 1
        yield batch


def _fingerprint(batch: dict, padding_idx: int) -> bytes:
    try:
        sample_ids, target = batch["id"], batch["target"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"this task's batches have no {error}; codistillation needs 'id' and 'target' to tell batches apart, so "
            "--task cannot be codistilled"
        ) from error
    return fingerprint(sample_ids, target[target.ne(padding_idx)])
