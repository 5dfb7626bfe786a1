"""The average of checkpoints: the mean of parameters, and nothing else changed."""

import resource
import signal
import sys

import pytest
import torch

from fairseq_codistill.fairseq_side import average
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


def test_an_average_that_cannot_be_written_leaves_the_one_before_and_one_line(tmp_path, monkeypatch):
    for epoch in (1, 2):
        torch.save({"model": {"a": torch.full((50_000,), float(epoch))}}, tmp_path / f"checkpoint{epoch}.pt")
    out = tmp_path / "new/average.pt"
    monkeypatch.setattr(sys, "argv", ["average", "--checkpoint-dir", str(tmp_path), "--last", "2", "--out", str(out)])
    average.main()
    assert torch.load(out, weights_only=True)["model"]["a"][0] == 1.5
    before = out.read_bytes()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a disk that is full
    try:
        with pytest.raises(SystemExit, match="average: cannot write .*average.pt"):
            average.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["average.pt"]


def test_last_epochs_are_taken_in_the_order_of_numbers(tmp_path):
    for name in ("checkpoint2.pt", "checkpoint9.pt", "checkpoint10.pt", "checkpoint_best.pt", "checkpoint_1_5.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in last_checkpoints(tmp_path, 2)] == ["checkpoint9.pt", "checkpoint10.pt"]
    with pytest.raises(ValueError, match="holds 3 checkpoints of epochs"):
        last_checkpoints(tmp_path, 4)
