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


def some_images(number=12):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (number, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return torch.utils.data.TensorDataset(pixels, torch.arange(number) % 10)


SMALL_IMAGES = leaderboard_tasks.Images(name="wrn10_1", images=4, updates=4, rate=0.1)


def test_images_are_shifted_and_mirrored_alike_for_one_seed_and_otherwise_for_another():
    pixels, targets = some_images().tensors
    first, again, other = (SMALL_IMAGES.inputs((pixels, targets), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # The middle of an image survives any shift by one pixel, mirrored or not: all its pixels are in what comes out.
    plain = leaderboard_tasks._normalised(pixels)[:, :, 2:6, 2:6].flatten(2).transpose(1, 2)
    for found, expected in zip(first.flatten(2).transpose(1, 2), plain, strict=True):
        assert all((found == pixel).all(dim=1).any() for pixel in expected)


def test_two_image_models_differ_but_see_the_same_batches():
    seen = {0: [], 1: []}
    for index in seen:
        stream = leaderboard_methods.Trainee(SMALL_IMAGES, some_images(), 1, index).endless()
        seen[index] = [next(stream) for _ in range(7)]  # passes of three batches
    for one, other in zip(seen[0], seen[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    passes = [torch.cat([ids for _, _, ids in seen[0][start : start + 3]]) for start in (0, 3)]
    assert [sorted(ids.tolist()) for ids in passes] == [list(range(12))] * 2
    assert not torch.equal(*passes)
    models, bits = leaderboard_methods.codistil(SMALL_IMAGES, some_images(), 1, 2, codec="counts:4", divergence="kl")
    assert bits > 0
    assert not torch.equal(models[0].stem.weight, models[1].stem.weight)


def test_workers_that_average_have_one_model_in_the_end_and_the_mean_of_their_statistics():
    workers = [SMALL_IMAGES.model() for _ in range(2)]
    workers[0].norm.running_mean.fill_(1.0)
    workers[1].norm.running_mean.fill_(3.0)
    numbers = leaderboard_methods.average_statistics(workers)
    assert [float(worker.norm.running_mean[0]) for worker in workers] == [2.0, 2.0]
    assert numbers == sum(one.numel() for one in workers[0].buffers() if one.is_floating_point())
    assert not torch.equal(workers[0].stem.weight, workers[1].stem.weight)


def test_power_sgd_of_full_rank_is_the_mean_of_the_gradients_convolutions_included():
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3, 3, 3), (5, 7), (6,)]
    found = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    expected = [(one + other) / 2 for one, other in zip(*found, strict=True)]
    leaderboard_methods.PowerSgd(5)(found)
    for mean, exact in zip(found[0], expected, strict=True):
        torch.testing.assert_close(mean, exact, atol=1e-5, rtol=1e-4)


def test_power_sgd_of_low_rank_sends_less_and_makes_up_for_its_error_later():
    gradients = [torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    method, sent, steps = leaderboard_methods.PowerSgd(1), torch.zeros(8, 2, 3, 3), 60
    for _ in range(steps):
        found = [[gradient.clone()] for gradient in gradients]
        bits = method(found)
        sent += found[0][0]
    exact = (gradients[0] + gradients[1]) / 2
    assert bits == 2 * 32 * (8 + 18)
    assert (found[0][0] - exact).norm() > 0.5 * exact.norm()  # a single step is far off, their mean is not
    assert (sent / steps - exact).norm() < 0.3 * exact.norm()
