"""Owns the schedules of codistillation: pure functions of training progress, numbers in, numbers out.

Progress is counted by data position wherever two models must agree (see ``coordinator.keys``), and by a model's own
updates or epochs where only that model is concerned. Epochs count from 1, as fairseq's do.
"""


def distill_weight(weight: float, growth: float, epoch: int, position: int = 0, burn_in: int = 0) -> float:
    """The weight α at a data position: ``weight · growth^(epoch − 1)``, and 0 during the burn-in.

    Args:
        weight: α of the first epoch.
        growth: factor per epoch; the paper's translation experiments use 1.1.
        epoch: current epoch, from 1.
        position: data positions (updates' worth of batches) passed since the start of training.
        burn_in: positions without distillation.

    Source: section 4.2.
    """
    if position < burn_in:
        return 0.0
    return weight * growth ** (epoch - 1)


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
