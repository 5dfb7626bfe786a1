"""Owns the schedules of codistillation: pure functions of training progress, numbers in, numbers out.

Progress is counted by data position wherever two models must agree (see ``coordinator.keys``), and by a model's own
updates or epochs where only that model is concerned. Epochs count from 1, as fairseq's do; ``progress`` is the time
since the start in epochs, a fraction inside one (30.5 is the middle of the 31st).
"""

import math
from collections.abc import Sequence


def distill_weight(
    weight: float, growth: float, epoch: int, position: int = 0, burn_in: int = 0, ceiling: float = 0.0
) -> float:
    """The weight α at a data position: ``weight · growth^(epoch − 1)`` up to a ceiling, and 0 during the burn-in.

    Args:
        weight: α of the first epoch.
        growth: factor per epoch; the paper's translation experiments use 1.1.
        epoch: current epoch, from 1.
        position: data positions (updates' worth of batches) passed since the start of training.
        burn_in: positions without distillation.
        ceiling: largest α; 0 for none. A growth of 1.1 passes 100 after 49 epochs and 5,000 after 90.

    Source: section 4.2.
    """
    if position < burn_in or not weight:
        return 0.0
    try:
        grown = weight * growth ** (epoch - 1)
    except OverflowError:  # 1.1 from epoch 7,449 on
        grown = math.inf
    return min(grown, ceiling) if ceiling else grown


def label_smoothing(
    start: float,
    end: float,
    epoch: int,
    num_updates: int,
    decay_updates: int = 0,
    decay_epochs: int = 0,
    drop_epoch: int = 0,
) -> float:
    """The label smoothing ε in force: constant, decayed linearly, or dropped to 0 from an epoch on.

    Args:
        start: ε at the start.
        end: ε after the decay.
        epoch: current epoch, from 1.
        num_updates: updates done so far.
        decay_updates: length of the decay in updates; 0 for none.
        decay_epochs: length of the decay in epochs: epoch 1 uses ``start``, epoch ``decay_epochs + 1`` uses ``end``.
        drop_epoch: first epoch with ε = 0; 0 for never.

    Source: section 4.2 (decayed), appendices A.3 and A.5 (removed).
    """
    if drop_epoch and epoch >= drop_epoch:
        return 0.0
    if decay_updates:
        done = min(num_updates / decay_updates, 1.0)
    elif decay_epochs:
        done = min((epoch - 1) / decay_epochs, 1.0)
    else:
        return start
    return start + (end - start) * done


def scaled_learning_rate(learning_rate: float, batch_size: int, reference_batch_size: int) -> float:
    """Linear scaling rule: a batch k times as large takes steps k times as long.

    Args:
        learning_rate: for a batch of ``reference_batch_size`` images.
        batch_size: of one model, over all its devices.
        reference_batch_size: 0 leaves the rate as it is.

    Source: Goyal et al. 2017, section 2.1.
    """
    return learning_rate * batch_size / reference_batch_size if reference_batch_size else learning_rate


def warm_up(target: float, start: float, progress: float, num_epochs: float) -> float:
    """The rate on its linear way from ``start`` to ``target`` during the first epochs, then ``target``.

    Source: Goyal et al. 2017, section 2.2.
    """
    if progress >= num_epochs:
        return target
    return start + (target - start) * progress / num_epochs


def step_decay(progress: float, milestones: Sequence[float], factor: float) -> float:
    """1, times ``factor`` for every milestone (in epochs, ascending) that has been reached."""
    return factor ** _num_reached(progress, milestones)


def half_cosine(progress: float, num_epochs: float) -> float:
    """1 at the start, 1/2 half way, 0 at the end and after it: half a period of a cosine.

    Source: Loshchilov and Hutter 2017, without restarts.
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(progress / num_epochs, 1.0)))


def staircase(values: Sequence[float], progress: float, milestones: Sequence[float]) -> float:
    """The value in force: the first one at the start, the next one from each milestone on.

    The weight decay of codistillation is one: 5e-4, then 1e-5, then 0, at the first two drops of the learning rate.

    Args:
        values: one more than there are milestones.
        progress: epochs since the start.
        milestones: in epochs, ascending.

    Raises:
        ValueError: the numbers of values and milestones do not fit.

    Source: section 4.1 and appendix A.4.
    """
    if len(values) != len(milestones) + 1:
        raise ValueError(f"{len(values)} values with {len(milestones)} milestones; give one value more than milestones")
    return values[_num_reached(progress, milestones)]


def _num_reached(progress: float, milestones: Sequence[float]) -> int:
    return sum(progress >= milestone for milestone in milestones)
