"""fairseq with --find-unused-parameters, whose search sees one forward and one backward pass of a step."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from fairseq.distributed import ModuleProxyWrapper
from test_fairseq_traps import Job

from fairseq_codistill.config import ConfigError


class Searched(ModuleProxyWrapper):
    """A model as fairseq wraps it with --find-unused-parameters."""

    def __init__(self, model):
        wrapper = torch.nn.Module()
        wrapper.module, wrapper.forward, wrapper.find_unused_parameters = model, model.forward, True
        super().__init__(wrapper)


def test_no_batch_is_cut_whose_wrapper_looks_for_unused_parameters(toy_data, tmp_path):
    job = Job(toy_data, tmp_path, "--codistill-parts", "auto")
    job.trainer._wrapped_model = Searched(job.trainer._model)
    parting = job.criterion.peers._parting
    parting.hear(1, {"splits": True, "schedule": [1, 0, 2, 1]})
    job.step()
    assert job.peer.keys == [(1, 0, 0)]
    assert parting.status()["parts"]["splits"] is False  # so that no other model waits for parts


@pytest.mark.parametrize(
    ("extra", "backend", "ranks", "message"),
    [
        (["--codistill-parts", "2"], "pytorch_ddp", 2, "--codistill-parts is 2 with --find-unused-parameters"),
        (["--codistill-transfer", "shared"], "c10d", 2, "--codistill-transfer is 'shared' with --find-unused-param"),
        (["--codistill-parts", "2"], "legacy_ddp", 2, None),
        (["--codistill-transfer", "shared"], "c10d", 1, None),
        (["--codistill-parts", "auto"], "c10d", 2, None),
    ],
)
def test_where_unused_parameters_are_looked_for_a_step_is_one_pass(toy_data, tmp_path, extra, backend, ranks, message):
    job = Job(toy_data, tmp_path, "--find-unused-parameters", "--ddp-backend", backend, *extra)
    trainer = SimpleNamespace(cfg=job.trainer.cfg, data_parallel_world_size=ranks)
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        job.task.begin_training(trainer)
