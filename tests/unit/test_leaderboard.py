"""The leaderboard's kept burn-in: rows are the same with it and without, whatever a run before has left."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import leaderboard_methods
import leaderboard_tasks
import translation_task

SETTING = leaderboard_tasks.Translation(
    num_pieces=40, width=32, sentences=4, updates=5, burn_in=2
)  # passes of three batches


def some_pairs():
    numbers = torch.randint(4, 40, (14, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return translation_task.Pairs(numbers, numbers[::-1])


def parameters(num_models, folder):
    models, bits = leaderboard_methods.codistil(
        SETTING, some_pairs(), 1, num_models, begun=folder, codec="counts:4", divergence="kl"
    )
    assert bits > 0
    return [torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in models]


@pytest.mark.parametrize("left_by", [2, 3])
def test_a_kept_burn_in_changes_no_parameter_even_where_some_models_have_none(tmp_path, left_by):
    parameters(left_by, tmp_path)
    assert len(list(tmp_path.glob("begun_*"))) == left_by
    for expected, found in zip(parameters(3, None), parameters(3, tmp_path), strict=True):
        assert torch.equal(expected, found)
