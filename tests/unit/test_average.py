"""The average of checkpoints: the mean of parameters, and nothing else changed."""

import pytest
import torch

from fairseq_codistill.fairseq_side.average import average_parameters, last_checkpoints


def test_floating_point_tensors_are_averaged_in_their_own_dtype():
    states = [{"a": torch.tensor([1.0, 2.0]), "h": torch.tensor([1.0], dtype=torch.float16)} for _ in range(3)]
    states[2] = {"a": torch.tensor([4.0, 8.0]), "h": torch.tensor([4.0], dtype=torch.float16)}
    averaged = average_parameters(states)
    torch.testing.assert_close(averaged["a"], torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(averaged["h"], torch.tensor([2.0], dtype=torch.float16))


def test_the_sum_of_large_half_precision_values_does_not_overflow():
    large = [{"w": torch.tensor([60000.0], dtype=torch.float16)} for _ in range(10)]
    assert average_parameters(large)["w"].item() == 60000.0


def test_counters_keep_the_last_value():
    averaged = average_parameters([{"version": torch.tensor([2])}, {"version": torch.tensor([3])}])
    assert averaged["version"].tolist() == [3]


def test_inputs_stay_as_they_are():
    states = [{"a": torch.ones(2)}, {"a": torch.zeros(2)}]
    average_parameters(states)["a"] += 1
    assert states[0]["a"].tolist() == [1, 1]
    assert states[1]["a"].tolist() == [0, 0]


@pytest.mark.parametrize("other", [{"b": torch.ones(2)}, {"a": torch.ones(3)}, {}])
def test_checkpoints_of_different_models_are_refused(other):
    with pytest.raises(ValueError, match="different models"):
        average_parameters([{"a": torch.ones(2)}, other])


def test_last_epochs_are_taken_in_the_order_of_numbers(tmp_path):
    for name in ("checkpoint2.pt", "checkpoint9.pt", "checkpoint10.pt", "checkpoint_best.pt", "checkpoint_1_5.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in last_checkpoints(tmp_path, 2)] == ["checkpoint9.pt", "checkpoint10.pt"]
    with pytest.raises(ValueError, match="holds 3 checkpoints of epochs"):
        last_checkpoints(tmp_path, 4)
