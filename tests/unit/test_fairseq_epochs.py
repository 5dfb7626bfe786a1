"""What a fairseq task hands out in an epoch is the same, whichever epoch it was first asked for: training resumes."""

import types

import numpy as np
import pytest
import torch
from fairseq.data import FairseqDataset
from fairseq.data.denoising_dataset import DenoisingDataset
from fairseq.tasks.fairseq_task import FairseqTask

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.keys import DataOrder
from fairseq_codistill.fairseq_side.shareable import refuse_what_differs
from fairseq_codistill.fairseq_side.transfer import TAG, TransferBatches
from fairseq_codistill.tasks.codistillation import CodistillationTaskMixin

PAD, NUM_SENTENCES, BATCH_SIZE = 1, 12, 2


class Drawn(FairseqDataset):
    """Sentences that are drawn anew for every epoch, as those of denoising are; their lengths are not."""

    can_reuse_epoch_itr_across_epochs = True
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return NUM_SENTENCES

    def __getitem__(self, index):
        return index, self.epoch

    def num_tokens(self, index):
        return 1

    size = num_tokens

    def ordered_indices(self):
        return np.random.permutation(NUM_SENTENCES)  # noqa: NPY002 - fairseq has seeded it

    def collater(self, samples):
        ids, epochs = torch.tensor(samples).T
        return {"id": ids, "target": epochs[:, None] + 10, "net_input": {}}


class Task(CodistillationTaskMixin, FairseqTask):
    """A task and its criterion, without any model."""

    stock_name = "drawn"
    target_dictionary = types.SimpleNamespace(pad=lambda: PAD)

    def __init__(self, **settings):
        super().__init__(types.SimpleNamespace())
        self.datasets["train"] = Drawn()
        config = types.SimpleNamespace(
            is_taught=True, is_codistilled=True, train_subset="train", codistill_transfer="", update_freq=[1],
            curriculum=0, most_parts=1, codistill_lookahead=False, codistill_own_data=False, max_epoch=0,
            update_ordered_indices_seed=False,
        )  # fmt: skip
        vars(config).update(settings)
        peers = types.SimpleNamespace(
            teachers=types.SimpleNamespace(has_cache=False),
            coordinator=None,
            has_met=True,
            world_size=1,
            num_behind=lambda *_, **__: 0,
        )
        self._criterion = types.SimpleNamespace(config=config, peers=peers, ignore_prefix_size=0)

    def iterator(self, epoch, seed=1, **settings):
        return self.get_batch_iterator(
            self.datasets["train"], seed=seed, epoch=epoch, max_sentences=BATCH_SIZE, **settings
        )


def drawn_for(batches):
    return {int(epoch) - 10 for batch in batches for epoch in batch["target"].flatten()}


def test_sources_that_every_model_draws_for_itself_are_refused_wherever_they_are_inside():
    denoising = DenoisingDataset.__new__(DenoisingDataset)
    wrapped = types.SimpleNamespace(dataset=types.SimpleNamespace(datasets=[object(), denoising]))
    settings = {"codistill_num_models": 2, "codistill_addresses": "a:1,b:2"}
    with pytest.raises(ConfigError, match="denoising.* cannot be codistilled"):
        refuse_what_differs(CodistillationConfig(**settings), True, wrapped)
    refuse_what_differs(CodistillationConfig(**settings), True, types.SimpleNamespace(datasets={"a": object()}))
    refuse_what_differs(CodistillationConfig(**settings, codistill_own_data=True), True, wrapped)
    refuse_what_differs(CodistillationConfig(), True, wrapped)


@pytest.mark.parametrize("buffer_size", [0, 2])
def test_a_training_that_resumes_inside_an_epoch_has_what_is_drawn_for_that_epoch(buffer_size):
    iterator = Task().iterator(epoch=5, num_workers=1, data_buffer_size=buffer_size)
    iterator.load_state_dict({"version": 2, "epoch": 5, "iterations_in_epoch": 2, "shuffle": True})
    batches = list(iterator.next_epoch_itr(shuffle=True))
    assert len(batches) == NUM_SENTENCES // BATCH_SIZE - 2
    assert drawn_for(batches) == {5}
    assert drawn_for(iterator.next_epoch_itr(shuffle=True)) == {6}


@pytest.mark.parametrize("buffer_size", [0, 2])
def test_a_model_that_goes_where_the_others_are_has_what_is_drawn_for_that_epoch(buffer_size):
    task = Task()
    iterator = task.iterator(epoch=1, num_workers=1, data_buffer_size=buffer_size)
    assert drawn_for(iterator.next_epoch_itr(shuffle=True)) == {1}
    task._batches.move_to(DataOrder(NUM_SENTENCES // BATCH_SIZE).elapsed(4, 3))
    assert drawn_for(iterator.next_epoch_itr(shuffle=True)) == {4}


def test_a_transfer_set_that_is_entered_inside_a_pass_has_what_is_drawn_for_that_pass():
    iterator = Task(train_subset="other").iterator(epoch=1, num_workers=1)
    batches = TransferBatches(iterator, interval=1, batches_per_update=1, padding_idx=PAD)
    of_update = {"elapsed": 2 * batches.num_batches + 1, "key": types.SimpleNamespace(micro_batch=0)}
    found = batches.beside(of_update)["codistill_transfer"]
    assert drawn_for([found]) == {3}
    assert found[TAG]["elapsed"] == 2 * batches.num_batches + 1


def test_an_epoch_has_its_batches_where_fairseq_adds_the_epoch_to_the_seed():
    """``--update-ordered-indices-seed``: it adds that for which the iterator is asked first."""

    def batches_of_epoch_3(first_epoch):
        iterator = Task(update_ordered_indices_seed=True).iterator(first_epoch, seed=1 + first_epoch)
        iterator.epoch = 3
        return [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=True)]

    assert batches_of_epoch_3(1) == batches_of_epoch_3(2) == batches_of_epoch_3(3)
