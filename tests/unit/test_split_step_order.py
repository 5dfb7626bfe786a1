"""The order and the gradient of a step in parts: with a loss scale, with DistributedDataParallel, with odd sizes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fairseq_codistill.option import ConfigError
from fairseq_codistill.split_step import has_batch_norm, is_checkpointed, part_bounds, run_split_step, why_whole

SIZE = 7


@pytest.fixture
def alone(tmp_path):
    """A process group of this process only: what a wrapper reduces over."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def losses_of(model, number, scaler=None, micro_batches=1, is_told=True):
    """Gradients of a batch in parts, as a loop with a loss scale takes them, and the order of what was done."""
    generator = torch.Generator().manual_seed(5)
    done = []

    def scaled(loss):
        return loss if scaler is None else scaler.scale(loss)

    for _ in range(micro_batches):
        inputs, targets = torch.randn(SIZE, 4, generator=generator), torch.randint(3, (SIZE,), generator=generator)
        bounds = part_bounds(SIZE, number)

        def forward(part, inputs=inputs, bounds=bounds):
            done.append(f"forward {part}")
            return model(inputs[slice(*bounds[part])])

        def finish(part, logits, targets=targets, bounds=bounds):
            done.append(f"finish {part}")
            return nn.functional.cross_entropy(logits, targets[slice(*bounds[part])], reduction="sum") / SIZE

        run_split_step(
            len(bounds), forward, finish, lambda loss: scaled(loss).backward(), model, scaled if is_told else None
        )
    return [parameter.grad.clone() for parameter in model.parameters()], done


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize(("scale", "is_told"), [(None, True), (1024.0, True), (1024.0, False)])
def test_the_gradient_of_the_parts_is_that_of_the_whole(alone, number, is_wrapped, scale, is_told):
    whole, _ = losses_of(make_model(), 1, micro_batches=2)
    model = make_model()
    wrapped = DistributedDataParallel(model) if is_wrapped else model
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    found, _ = losses_of(wrapped, number, scaler, micro_batches=2, is_told=is_told)
    for one, other in zip(whole, found, strict=True):
        torch.testing.assert_close(other / (scale or 1), one, atol=1e-6, rtol=0)


class Added(nn.Module):
    """Two parameters with one gradient, and one whose gradient is a number in many places."""

    def __init__(self):
        super().__init__()
        self.base, self.delta, self.bias = (nn.Parameter(value) for value in torch.randn(3, 4, 3).unbind())

    def forward(self, inputs):
        return inputs @ (self.base + self.delta) + self.bias.sum() * inputs[:, :3]


@pytest.mark.parametrize("number", [2, 4])
def test_parameters_that_share_a_gradient_each_get_their_own(alone, number):
    def gradients(number):
        torch.manual_seed(3)
        return losses_of(DistributedDataParallel(Added()), number, micro_batches=2)[0]

    for one, other in zip(gradients(1), gradients(number), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=0)


def test_a_backward_that_does_not_tell_its_factor_is_refused_with_what_helps(alone):
    model = make_model()
    wrapped, inputs = DistributedDataParallel(model), torch.randn(2, 4)
    steps = [lambda part: wrapped(inputs[part]), lambda part, logits: logits.square().sum()]
    named = lambda loss: loss.backward(inputs=list(model.parameters()))  # noqa: E731
    with pytest.raises(ConfigError, match="give scaled="):
        run_split_step(2, *steps, named, wrapped)
    wrapped.zero_grad()
    run_split_step(2, *steps, named, wrapped, scaled=lambda loss: loss)
    found = model[0].weight.grad.clone()
    model.zero_grad()
    model(inputs).square().sum().backward()
    torch.testing.assert_close(found, model[0].weight.grad)


def test_a_part_whose_loss_backward_leaves_out_leaves_no_trace(alone):
    model, inputs = make_model(), torch.randn(4, 4)
    forward = lambda part: wrapped(inputs[part : part + 1])  # noqa: E731
    finish = lambda part, logits: logits.square().sum() * (float("nan") if part == 1 else 1.0)  # noqa: E731
    wrapped = DistributedDataParallel(model)
    run_split_step(4, forward, finish, lambda loss: loss.backward() if loss.isfinite() else None, wrapped)
    found = model[0].weight.grad.clone()
    model.zero_grad()
    model(inputs[[0, 2, 3]]).square().sum().backward()
    torch.testing.assert_close(found, model[0].weight.grad)


def test_all_forward_passes_come_before_anything_is_waited_for():
    _, done = losses_of(make_model(), 4)
    assert done == [f"{what} {part}" for what in ("forward", "finish") for part in range(4)]


def test_a_wrapper_reduces_once_a_step_whatever_the_number_of_parts(alone):
    wrapped, reduced = DistributedDataParallel(make_model()), []

    def hook(state, bucket):
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    losses_of(wrapped, 4)
    assert len(reduced) == len(set(reduced)) > 0


@pytest.mark.parametrize("number", [1, 2, 4])
def test_parts_cover_a_batch_and_differ_by_one_sample_at_most(number):
    for size in range(1, 12):
        bounds = part_bounds(size, number)
        assert [sample for start, stop in bounds for sample in range(start, stop)] == list(range(size))
        sizes = {stop - start for start, stop in bounds}
        assert max(sizes) - min(sizes) <= 1
        assert len(bounds) == (number if size >= number else 1)


def test_batch_normalisation_is_found_wherever_it_is():
    assert has_batch_norm(nn.Sequential(nn.Sequential(nn.BatchNorm2d(3))))
    assert has_batch_norm(nn.SyncBatchNorm(3))
    assert not has_batch_norm(nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3)))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.block, self.use_reentrant = nn.Linear(4, 6), nn.Linear(6, 3), use_reentrant

    def forward(self, inputs):
        return checkpoint(self.block, self.first(inputs), use_reentrant=self.use_reentrant)


def test_checkpoints_that_the_gradients_of_parts_do_not_survive_are_told_of_with_what_helps(alone):
    whole = losses_of(Checkpointed(False), 1)[0]
    in_parts = losses_of(DistributedDataParallel(Checkpointed(False)), 2)[0]
    assert len(in_parts) == len(whole) == 4
    with pytest.raises(ConfigError, match="give --codistill-parts 1, or torch's checkpoint use_reentrant=False"):
        losses_of(DistributedDataParallel(Checkpointed(True)), 2)


@pytest.mark.parametrize("mark", ["precheckpoint_forward", "gradient_checkpointing", "grad_checkpointing"])
def test_with_several_ranks_no_batch_of_a_model_with_checkpoints_is_cut_by_itself(mark):
    model = nn.Sequential(make_model())
    assert not is_checkpointed(model)
    setattr(model[0], mark, False if mark.endswith("ing") else model[0].forward)
    if mark.endswith("ing"):
        assert not is_checkpointed(model)
        setattr(model[0], mark, True)
    assert is_checkpointed(model)
    assert why_whole(model, 1) == ""
    assert "checkpointed" in why_whole(model, 2)
