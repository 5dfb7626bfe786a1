"""Codistillers that share something: models a process group, trainings a process and a name."""

import pytest
import torch

from fairseq_codistill import CodistillationConfig, Codistiller, ConfigError
from fairseq_codistill.coordinator.introductions import Identity, Introduction
from fairseq_codistill.testing import Script, ScriptedTransport

ADDRESSES = "127.0.0.1:29600,127.0.0.1:29700"
NUM_CLASSES = 5


class TestModelsInOneProcessGroup:
    """Every process of the default group is a model of one rank, as under one torchrun."""

    @pytest.fixture(autouse=True)
    def _group(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a collective of all models")

        monkeypatch.setattr("fairseq_codistill.ranks.rank_and_world_size", lambda: (1, 2))
        monkeypatch.setattr("fairseq_codistill.ranks.dist.all_reduce", refuse)

    def test_no_model_is_asked_how_far_it_is_in_a_collective(self):
        transport = ScriptedTransport(Script(1, ADDRESSES, lambda key, logits: logits, None, codec="fp32"))
        peers = Codistiller(num_models=2, addresses=ADDRESSES, codec="fp32", transport=transport, rank=0, world_size=1)
        peers.meet(torch.nn.Linear(2, NUM_CLASSES))
        assert peers.skip() == 0

    def test_ranks_of_a_model_that_share_the_group_with_another_are_refused(self, monkeypatch):
        monkeypatch.setattr("fairseq_codistill.ranks.rank_and_world_size", lambda: (1, 4))
        with pytest.raises(ConfigError, match="world_size is 2, but the default process group has 4 processes"):
            Codistiller(num_models=2, addresses=ADDRESSES, rank=1, world_size=2)


def test_a_second_training_in_a_process_is_told_to_take_another_name(caplog):
    def number_of_warnings(run_id):
        caplog.clear()
        config = CodistillationConfig(codistill_num_models=2, codistill_addresses=ADDRESSES, codistill_run_id=run_id)
        Introduction(config, Identity({}, {}, "", 0), world_size=1)
        return sum("was in a run of this name before" in record.message for record in caplog.records)

    assert number_of_warnings("first stage") == 0
    assert number_of_warnings("first stage") == 1
    assert number_of_warnings("second stage") == 0
