"""Owns what this process asks torch.distributed about its model: its rank in it, and what all its ranks agree on."""

import itertools
from typing import Any

import torch
import torch.distributed as dist

from fairseq_codistill.option import ConfigError


def rank_and_world_size() -> tuple[int, int]:
    """Of this process inside its model; (0, 1) where there is no process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rank_in_model(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """What was given, by default what torch.distributed says.

    Raises:
        ConfigError: several ranks of a model, in a process group with others than them, where they cannot agree.
    """
    here, everywhere = rank_and_world_size()
    rank, world_size = here if rank is None else rank, everywhere if world_size is None else world_size
    if 1 < world_size != everywhere > 1:
        raise ConfigError(
            f"world_size is {world_size}, but the default process group has {everywhere} processes: the ranks of a "
            "model agree in it, so it must hold them and no others; start every model for itself (codistill-launch)"
        )
    return rank, world_size


def group_timeout_s(world_size: int) -> float | None:
    """How long the ranks of this model wait for each other; None where there is one rank, or no telling."""
    if min(world_size, rank_and_world_size()[1]) == 1:
        return None
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    try:
        timeout = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # a backend that does not say
        return None
    return float(timeout.total_seconds())


def largest_of_all_ranks(value: int, world_size: int) -> int:
    """Of this model; every rank must ask at the same point, and all get the same answer."""
    if min(world_size, rank_and_world_size()[1]) == 1:  # the processes of a group may be models of one rank each
        return value
    largest = torch.tensor([value], dtype=torch.int64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


_instances = itertools.count()  # of notes in this process: every rank makes them in the same order


class Notes:
    """What rank 0 leaves for the other ranks of its model; nobody waits for anybody.

    What it leaves before it takes part in a collective, the others find after that collective.

    Args:
        store: a ``torch.distributed.Store`` that all ranks share, such as that of the process group.
        rank: of this process.
        name: of these notes, the same on all ranks and no other's.

    Attributes:
        leads: whether this is the rank that leaves them.
    """

    def __init__(self, store: Any, rank: int, name: str):
        self.leads = rank == 0
        self._store, self._name = store, name
        self._next = 0

    def leave(self, content: str) -> None:
        """For the others, which find it in this order."""
        self._store.set(f"{self._name}/{self._next}", content)
        self._next += 1

    def find(self) -> list[str]:
        """What is new since the last call, oldest first; nothing where the store has gone with rank 0."""
        found: list[str] = []
        try:
            while self._store.check([key := f"{self._name}/{self._next}"]):
                found.append(self._store.get(key).decode())
                self._next += 1
        except RuntimeError:  # of torch.distributed; the next collective says it better
            pass
        return found


def notes_of_ranks(world_size: int) -> Notes | None:
    """Of this process's model; None where it has one rank, or where its process group does not give its store away."""
    rank, world_size = rank_and_world_size()[0], min(world_size, rank_and_world_size()[1])
    store = getattr(dist.distributed_c10d, "_get_default_store", None) if world_size > 1 else None
    return None if store is None else Notes(store(), rank, f"codistill_notes_{next(_instances)}")
