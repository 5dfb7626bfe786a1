"""Owns what this process asks torch.distributed about its model: its rank in it, and what all its ranks agree on."""

import torch
import torch.distributed as dist


def rank_and_world_size() -> tuple[int, int]:
    """Of this process inside its model; (0, 1) where there is no process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def group_timeout_s() -> float | None:
    """How long the ranks of this model wait for each other; None where there is one rank, or no telling."""
    if rank_and_world_size()[1] == 1:
        return None
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    try:
        timeout = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # a backend that does not say
        return None
    return float(timeout.total_seconds())


def largest_of_all_ranks(value: int) -> int:
    """Of this model; every rank must ask at the same point, and all get the same answer."""
    if rank_and_world_size()[1] == 1:
        return value
    largest = torch.tensor([value], dtype=torch.int64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
