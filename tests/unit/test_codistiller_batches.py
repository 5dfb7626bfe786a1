"""What a Codistiller takes as batches at the meeting and after it, and what it refuses."""

import numpy as np
import pytest
import torch
from test_codistiller import met
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fairseq_codistill import Codistiller, ConfigError, CoordinatedBatches, plain_loop, sampling
from fairseq_codistill.coordinator.keys import ENDLESS
from fairseq_codistill.plain_loop import Rows
from fairseq_codistill.testing import Script, ScriptedTransport

ADDRESSES = "127.0.0.1:29600,127.0.0.1:29700"
NUM_CLASSES = 5


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.zeros(2)])


def test_a_loader_that_shuffles_is_refused_and_one_that_is_coordinated_is_not():
    data = TensorDataset(torch.zeros(20))
    model = torch.nn.Linear(2, NUM_CLASSES)
    with pytest.raises(ConfigError, match="RandomSampler.*batch_sampler=CoordinatedBatches"):
        Codistiller(num_models=1).meet(model, DataLoader(data, batch_size=2, shuffle=True))
    with pytest.raises(ConfigError, match="is a stream.*give meet"):
        Codistiller(num_models=1).meet(model, DataLoader(Stream()))
    with pytest.raises(ConfigError, match="batches is a generator"):
        Codistiller(num_models=1).meet(model, (batch for batch in [1]))
    with pytest.raises(ConfigError, match="an epoch needs at least one batch"):
        Codistiller(num_models=1).meet(model, 0)
    Codistiller(num_models=1).meet(model, DataLoader(data, batch_sampler=CoordinatedBatches(20, 2)))


@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("is_stream", [False, True])
def test_data_of_ones_own_may_come_from_any_loader_alone_as_well(is_stream, num_models):
    data = TensorDataset(torch.zeros(20, 2), torch.arange(20))
    own = DataLoader(Stream()) if is_stream else DataLoader(data, batch_size=2, shuffle=True)
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits + 1, codec="fp32"))
    peers = Codistiller(num_models=num_models, addresses=ADDRESSES, codec="fp32", transport=transport)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES), own, transfer=DataLoader(data, batch_sampler=CoordinatedBatches(20, 2)))
    assert peers._clock.order.num_batches == (ENDLESS if is_stream else 10)


def test_checkpoints_need_no_transfer_set():
    peers = Codistiller(num_models=2, addresses=ADDRESSES, exchange="checkpoints")
    shared = DataLoader(TensorDataset(torch.zeros(20)), batch_sampler=CoordinatedBatches(20, 2))
    with pytest.raises(ConfigError, match="exchange is 'checkpoints', and a transfer set is exchanged"):
        peers.meet(torch.nn.Linear(2, NUM_CLASSES), 10, transfer=shared)


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_a_target_that_is_ignored_counts_in_a_term_no_more_than_in_a_loss(ignore_index):
    seen = []
    logits = torch.zeros(2, 3, NUM_CLASSES, requires_grad=True)
    targets = torch.tensor([[ignore_index, 1, 2], [ignore_index, ignore_index, 3]])
    peers = met(predict=lambda key, mine: seen.append(len(mine)) or mine + 1)
    peers.term(logits, range(2), torch.ones(2, 3), targets=targets, ignore_index=ignore_index).backward()
    assert seen == [3]
    assert torch.equal(logits.grad.abs().sum(-1) > 0, targets != ignore_index)


def test_batches_may_be_counted_by_whole_numbers_of_numpy():
    batches = CoordinatedBatches(np.int64(20), np.int32(2))
    assert list(batches) == list(CoordinatedBatches(20, 2))
    assert type(batches.num_samples) is int
    with pytest.raises(ConfigError, match="batch_size is 2.0; it must be a whole number"):
        CoordinatedBatches(20, 2.0)


@pytest.mark.parametrize("as_transfer_set", [False, True])
def test_batches_that_were_made_before_the_ranks_know_each_other_are_refused(as_transfer_set):
    """Each rank would train on those of the first, and no other model could tell."""
    peers = Codistiller(num_models=2, addresses=ADDRESSES, rank=1, world_size=2)
    batches = CoordinatedBatches(20, 2)
    loader = DataLoader(TensorDataset(torch.zeros(20)), batch_sampler=batches)
    of_rank = CoordinatedBatches(20, 2, rank=1, world_size=2)
    with pytest.raises(ConfigError, match="of rank 0 of 1, and the Codistiller is of rank 1 of 2 of its model; make C"):
        peers.meet(torch.nn.Linear(2, 3), *((of_rank,) if as_transfer_set else (batches,)),
                   transfer=loader if as_transfer_set else None)  # fmt: skip


def test_ranks_may_have_batches_of_their_own_where_no_other_model_has_them():
    own = CoordinatedBatches(10, 2, rank=0, world_size=1)  # of a shard of its own
    Codistiller(num_models=1, own_data=True, exchange="checkpoints", rank=1, world_size=2).meet(
        torch.nn.Linear(2, 3), own
    )
    with pytest.raises(ConfigError, match="of rank 0 of 1, and the Codistiller is of rank 1 of 2"):
        Codistiller(num_models=2, addresses=ADDRESSES, rank=1, world_size=2).meet(torch.nn.Linear(2, 3), own)


def test_whoever_was_made_before_the_process_group_is_named(monkeypatch):
    early = Codistiller(num_models=2, addresses=ADDRESSES), Codistiller(num_models=1)
    for module in (sampling, plain_loop):
        monkeypatch.setattr(module, "rank_and_world_size", lambda: (1, 2))
    batches = CoordinatedBatches(10, 2)
    with pytest.raises(ConfigError, match="make Codistiller after torch.distributed.init_process_group"):
        early[0].meet(torch.nn.Linear(2, 3), batches)
    early[1].meet(torch.nn.Linear(2, 3), batches)  # alone it is asked for nothing that a rank would change


def test_a_term_without_targets_is_of_the_rows_that_its_mask_chose():
    logits = torch.zeros(2, 3, NUM_CLASSES)
    masks = [torch.tensor(mask) for mask in ([[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]])]
    known_by = [Rows.of(logits, None, mask).known_by.tolist() for mask in masks]
    assert known_by == [[0, 1, 3], [0, 3, 4], []]
    targets = torch.tensor([[7, 8, 9], [1, 2, 3]])
    assert Rows.of(logits, targets, masks[1]).known_by.tolist() == [7, 1, 2]
