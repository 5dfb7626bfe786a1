"""What a Codistiller takes as batches at the meeting, and what it refuses."""

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fairseq_codistill import Codistiller, ConfigError, CoordinatedBatches
from fairseq_codistill.coordinator.keys import ENDLESS
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


@pytest.mark.parametrize("is_stream", [False, True])
def test_data_of_ones_own_may_come_from_any_loader(is_stream):
    data = TensorDataset(torch.zeros(20, 2), torch.arange(20))
    own = DataLoader(Stream()) if is_stream else DataLoader(data, batch_size=2, shuffle=True)
    transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits + 1, codec="fp32"))
    peers = Codistiller(num_models=2, addresses=ADDRESSES, codec="fp32", transport=transport)
    peers.meet(torch.nn.Linear(2, NUM_CLASSES), own, transfer=DataLoader(data, batch_sampler=CoordinatedBatches(20, 2)))
    assert peers._clock.order.num_batches == (ENDLESS if is_stream else 10)


def test_checkpoints_need_no_transfer_set():
    peers = Codistiller(num_models=2, addresses=ADDRESSES, exchange="checkpoints")
    shared = DataLoader(TensorDataset(torch.zeros(20)), batch_sampler=CoordinatedBatches(20, 2))
    with pytest.raises(ConfigError, match="exchange is 'checkpoints', and a transfer set is exchanged"):
        peers.meet(torch.nn.Linear(2, NUM_CLASSES), 10, transfer=shared)
