"""Owns drawing classes from the softmax of each row. It knows neither bytes nor peers."""

import torch
from torch import Tensor

# Probabilities made at a time: those of all rows would double the memory. On a CPU they should stay in the cache, in
# pages that the process has already: larger chunks take twice as long. An accelerator wants few, large kernels.
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS = 2**19, 2**24
BLOCK = 32  # classes whose probabilities are summed before any of them is looked at alone
BELOW_ONE = 1 - 2**-40  # a point that rounding has put at the end of the last class would be in none


def draw_systematically(predictions: Tensor, num_draws: int, seed: int) -> Tensor:
    """K classes a row: one uniform number, and K points at equal distance on the cumulative softmax.

    A class of probability p is drawn ⌊K p⌋ or ⌈K p⌉ times, K p on average, so a mean over the draws is as unbiased as
    that over independent ones. The count of each class varies as little as that of any unbiased draw can, and never
    more than under independent draws; with K = 1 the two are the same.

    Args:
        predictions: (num_rows, num_classes) logits, any float dtype, any device.
        num_draws: K.
        seed: of the uniform numbers; what they are depends on the device too.

    Returns:
        (num_rows, K) int64 in ascending order on the device of the predictions, -1 throughout a row whose softmax is
        not finite.

    >>> draw_systematically(torch.tensor([[0.0, 0.0, -100.0], [9.0, 0.0, float("nan")]]), 4, seed=1).tolist()
    [[0, 0, 1, 1], [-1, -1, -1, -1]]
    """
    generator = torch.Generator(predictions.device).manual_seed(seed % 2**63)
    num_rows, num_classes = predictions.shape
    if num_rows == 0:
        return torch.empty(0, num_draws, dtype=torch.int64, device=predictions.device)
    elements = CHUNK_ELEMENTS_CPU if predictions.device.type == "cpu" else CHUNK_ELEMENTS
    size = max(1, elements // max(num_classes, num_draws * BLOCK))  # of the largest tensor of a row
    starts = torch.rand(num_rows, 1, generator=generator, device=predictions.device, dtype=torch.float64)
    chunks = zip(predictions.detach().split(size), starts.split(size), strict=True)
    return torch.cat([_draw(rows, num_draws, start) for rows, start in chunks])


def _draw(logits: Tensor, num_draws: int, start: Tensor) -> Tensor:
    """(R, C) logits, (R, 1) uniform numbers -> (R, K) classes, by sums of blocks first: over all it takes longer."""
    num_rows, num_classes = logits.shape
    logits = logits.float()
    weights = (logits - logits.amax(dim=1, keepdim=True)).exp_()
    if num_classes % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -num_classes % BLOCK))
    blocks = weights.unflatten(1, (-1, BLOCK))  # (R, B, BLOCK)
    sums = blocks.sum(dim=2)
    finite = torch.isfinite(sums).all(dim=1, keepdim=True)
    ends = torch.where(finite, sums, 1.0).double().cumsum(dim=1)  # (R, B)
    steps = torch.arange(num_draws, device=logits.device, dtype=torch.float64)
    points = (start + steps) / num_draws * BELOW_ONE * ends[:, -1:]  # (R, K)
    block = torch.searchsorted(ends, points, right=True).clamp_(max=ends.size(1) - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    share = (points - before) / (ends.gather(1, block) - before)  # how far into the block
    rows = torch.arange(num_rows, device=logits.device).unsqueeze(1)
    inner = blocks[rows, block].double().cumsum(dim=2)  # (R, K, BLOCK)
    target = share.clamp_(0.0, BELOW_ONE).unsqueeze(2) * inner[:, :, -1:]
    within = torch.searchsorted(inner, target, right=True).squeeze(2)
    classes = (block * BLOCK + within).clamp_(max=num_classes - 1)
    return torch.where(finite, classes, -1)
