"""Owns what a device sent in an update, from a run's log: counted for an exchange, by formulas for averaged gradients.

It imports torch only for PowerSGD, whose traffic depends on the shapes of the parameters.
"""

from fairseq_codistill.vision.plan import parameter_shapes

from fairseq_codistill.launch.traffic import powersgd_numbers
from fairseq_codistill.report.runs import ModelLog

MEGABITS_PER_NUMBER = 2 * 32 / 1e6  # all_reduce sends every fp32 number twice: section 3.1 of the paper


def megabits_per_update(model: ModelLog, within: int = 1) -> float:
    """Mean over the training: what a device sent to peers, or for the average of gradients; 0 for one model alone.

    What the devices of one model that codistils send each other counts for nothing, as in the paper: it stays in one
    server. So it does where a model alone has no more of them.

    ``--comm-hook`` is counted as torch's hooks send: fp16 halves; PowerSGD averages two factors of a matrix, post-local
    SGD parameters once in a period, both after ``--hook-start`` updates of plain all_reduce.

    Args:
        within: devices of one model of those that codistil beside it.

    Source: section 3.1 of the paper; ``torch.distributed.algorithms.ddp_comm_hooks``.
    """
    if sent := model.sent_megabits_per_update:
        return sent
    if model.world_size <= within:
        return 0.0
    plain = MEGABITS_PER_NUMBER * model.num_parameters
    hook = model.settings.get("comm_hook", "none")
    if hook == "none":
        return plain
    if hook == "fp16":
        return plain / 2
    if hook == "post_localsgd":
        hooked = plain / int(model.settings["localsgd_period"])
    else:
        rank = int(model.settings["powersgd_rank"])
        hooked = MEGABITS_PER_NUMBER * sum(powersgd_numbers(shape, rank) for shape in _shapes(model))
    start = min(int(model.settings["hook_start"]), model.furthest_update)
    return (start * plain + (model.furthest_update - start) * hooked) / model.furthest_update


def _shapes(model: ModelLog) -> list[tuple[int, ...]]:
    from fairseq_codistill.vision.config import VisionConfig

    return parameter_shapes(VisionConfig(model=model.settings["model"]), model.num_classes)
