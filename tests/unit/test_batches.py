"""The shared order of the batches: moving and skipping in it, against fairseq's own iterators."""

import inspect
import threading

import pytest
import torch
from fairseq.data import iterators

from fairseq_codistill.coordinator.keys import DataOrder
from fairseq_codistill.fairseq_side import compat
from fairseq_codistill.fairseq_side.batches import SharedBatches

NUM_BATCHES = 11


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return NUM_BATCHES

    def __getitem__(self, index):
        return index


def collate(indices):
    return {"id": torch.tensor(indices), "target": torch.tensor(indices)[:, None] + 2}


def epoch_iterator():
    return iterators.EpochBatchIterator(Sentences(), collate, [[i] for i in range(NUM_BATCHES)], seed=3, buffer_size=2)


class Run:
    """Reads batches as fairseq's training loop does: groups of micro-batches, epoch after epoch."""

    def __init__(self, update_freq=(1,), **settings):
        compat.apply()
        self.iterator = epoch_iterator()
        self.update_freq = update_freq
        self.batches = SharedBatches(self.iterator, DataOrder(NUM_BATCHES, update_freq), padding_idx=1, **settings)

    def epoch(self):
        """The groups of the next epoch."""
        inner = self.iterator.next_epoch_itr(shuffle=True)
        return iterators.GroupedIterator(inner, self.batches.order.batches_per_update(self.iterator.epoch))

    def ids(self, num_epochs):
        return {
            self.batches.order.elapsed(*batch["codistill"]["key"][:2]): [b["id"].tolist() for b in group]
            for _ in range(num_epochs)
            for group in self.epoch()
            for batch in group[:1]
        }


@pytest.mark.parametrize("update_freq", [(1,), (3,), (1, 4)])
def test_where_it_stands_is_where_the_next_batch_comes_from(update_freq):
    run = Run(update_freq)
    seen = []
    for _ in range(3):
        assert run.batches.elapsed == len(seen)
        for group in run.epoch():
            assert group[0]["codistill"]["elapsed"] == len(seen)
            seen.append(group)
            if len(seen) != run.batches.order.elapsed(run.iterator.epoch + 1, 0):
                assert run.batches.elapsed == len(seen)


@pytest.mark.parametrize("update_freq", [(1,), (3,), (2, 5)])
@pytest.mark.parametrize("target", [1, 4, 6, 11, 13, 22])
def test_moving_goes_on_with_the_batches_that_come_there_without_moving(update_freq, target):
    everything = Run(update_freq).ids(8)
    moved = Run(update_freq, before_epoch=lambda batches: batches.elapsed or batches.move_to(target))
    seen = moved.ids(2)
    assert min(seen) == target
    assert seen == {elapsed: everything[elapsed] for elapsed in seen}


@pytest.mark.parametrize("update_freq", [(1,), (3,), (4,)])
@pytest.mark.parametrize("num_skipped", [1, 2, 100])
def test_skipping_leaves_the_other_batches_and_ends_the_epoch_where_it_ends(update_freq, num_skipped):
    everything = Run(update_freq).ids(2)
    run = Run(update_freq)
    updates = run.batches.order.updates_per_epoch(1)
    groups = run.epoch()
    next(groups)
    assert run.batches.skip(num_skipped) == min(num_skipped, updates - 1)
    assert run.iterator.iterations_in_epoch == min((1 + num_skipped) * update_freq[0], NUM_BATCHES)
    rest = [[batch["id"].tolist() for batch in group] for group in groups]
    assert rest == [everything[elapsed] for elapsed in range(1 + num_skipped, updates)]
    assert not groups.has_next()
    assert run.iterator.end_of_epoch()
    assert run.ids(1) == {elapsed: ids for elapsed, ids in everything.items() if elapsed >= updates}


def test_epochs_of_the_curriculum_are_not_shuffled_wherever_one_comes_from():
    straight = [[[i]] for i in range(NUM_BATCHES)]
    run = Run(curriculum=2, before_epoch=lambda batches: batches.elapsed or batches.move_to(NUM_BATCHES))
    assert list(run.ids(1).values()) == straight
    run = Run(curriculum=1, before_epoch=lambda batches: batches.elapsed or batches.move_to(NUM_BATCHES))
    run.iterator.epoch = 1
    assert list(run.ids(1).values()) != straight


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_what_an_epoch_does_without_at_its_end_is_not_loaded_either(looks_ahead):
    """``--skip-remainder-batch``: a thread that has loaded it would wait for ever to hand it out."""
    before, run = set(threading.enumerate()), Run((4,), looks_ahead=looks_ahead)
    for epoch in (1, 2):
        inner = run.iterator.next_epoch_itr(shuffle=True)
        groups = list(iterators.GroupedIterator(inner, 4, skip_remainder_batch=True))
        assert [len(group) for group in groups] == [4, 4]
        assert ["codistill_ahead" in batch for batch in sum(groups, [])] == [looks_ahead] * 7 + [False]
        assert run.iterator.end_of_epoch()
        assert run.iterator.epoch == epoch
    for loader in set(threading.enumerate()) - before:
        loader.join(10)
        assert not loader.is_alive()


def test_other_groups_count_as_fairseq_counts():
    compat.apply()
    groups = iterators.GroupedIterator(iterators.CountingIterator(range(7)), 3)
    assert [(groups.n, group) for group in groups] == [(1, [0, 1, 2]), (2, [3, 4, 5]), (3, [6])]
    assert not groups.has_next()


def test_without_the_mend_fairseq_looks_for_what_was_skipped():
    """What the mend is for; when this fails, fairseq can skip and the mend can go."""
    stock = iterators.GroupedIterator.__mro__[1]
    inner = iterators.CountingIterator(range(7))
    groups = stock(inner, 1)
    next(groups)
    inner.skip(6)
    assert groups.has_next()


@pytest.mark.skipif(
    "reuse_dataloader" not in inspect.signature(iterators.EpochBatchIterator).parameters, reason="fairseq 0.12.2"
)
def test_a_curriculum_ends_and_is_gone_on_with_alike_although_fairseq_uses_loaders_again():
    def read(iterator, first, last):
        found = []
        for epoch in range(first, last + 1):
            batches = iterator.next_epoch_itr(shuffle=epoch > 1)
            found.append([int(batch["id"]) for batch in batches])
        return found

    def made():
        sentences = [[i] for i in range(NUM_BATCHES)]
        iterator = iterators.EpochBatchIterator(Sentences(), collate, sentences, seed=3, reuse_dataloader=True)
        compat.make_loaders_anew(iterator)
        return iterator

    straight = read(made(), 1, 3)
    assert straight[0] == sorted(straight[0]) != straight[1]
    resumed = made()
    resumed.load_state_dict({"version": 2, "epoch": 2, "iterations_in_epoch": 0, "shuffle": True})
    assert read(resumed, 2, 3) == straight[1:]
