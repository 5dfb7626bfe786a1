"""Owns this process's place inside its model: rank, device, process group, and how ranks average gradients.

Ranks of *different* models never meet here; they exchange predictions through the coordinator.
"""

import dataclasses
import os
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from fairseq_codistill.config import ConfigError

from .config import OptimizationConfig

ONE_BUCKET_MB = 2**20
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: inside the model.
        world_size: X, ranks of the model.
        device: it computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether it is the rank that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor on ``device`` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank. All ranks must ask at the same point."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)) > 0)

    def largest(self, value: int) -> int:
        """The largest value of any rank. All ranks must ask at the same point."""
        if self.world_size == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def gather(self, mine: T) -> list[T]:
        """What all ranks have, by rank. All ranks must ask at the same point."""
        if self.world_size == 1:
            return [mine]
        found: list[T | None] = [None] * self.world_size
        dist.all_gather_object(found, mine)
        return [item for item in found if item is not None]

    def from_first(self, mine: T) -> T:
        """What the first rank has. All ranks must ask at the same point."""
        return self.gather((mine,))[0][0]

    @torch.no_grad()
    def average(self, model: nn.Module) -> None:
        """Give all ranks the mean of their parameters, and of their statistics of batch normalisation."""
        numbers = [value for value in model.state_dict().values() if value.is_floating_point()]
        means = self.sum(torch.cat([value.reshape(-1) for value in numbers])) / self.world_size
        for value, mean in zip(numbers, means.split([value.numel() for value in numbers]), strict=True):
            value.copy_(mean.view_as(value))  # in place: a layout for tensor cores stays

    def share_buffers(self, model: nn.Module) -> None:
        """Give all ranks the buffers of rank 0, whose batch normalisation statistics are the ones that count."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def take_place(cpu: bool) -> Place:
    """Join the process group of this model, as torchrun or codistill-launch set it up in the environment.

    Args:
        cpu: whether to stay on the CPU although there is a GPU.

    Raises:
        ConfigError: there are more ranks on this host than GPUs.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if not cpu and torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK is {local_rank}, but only {torch.cuda.device_count()} GPUs are visible; start fewer "
                "ranks, or pass --cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # images of one size
    if world_size > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return Place(rank, world_size, device)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap_model(
    config: OptimizationConfig, place: Place, model: nn.Module, optimizer: torch.optim.Optimizer, num_updates: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make gradients average over the ranks at every update, in the way that ``--comm-hook`` names.

    Args:
        num_updates: updates already done: a hook with a warm-up does not begin anew when training is resumed.

    Returns:
        what to call in place of the model, and what to step in place of the optimizer.

    Raises:
        ConfigError: a hook is asked for, but there is only one rank.
    """
    if place.world_size == 1:
        if config.comm_hook != "none":
            raise ConfigError(
                f"--comm-hook is {config.comm_hook!r}, but this model has one rank; start it with --devices-per-model "
                "2 or more (codistill-launch), or by torchrun"
            )
        return model, optimizer
    device_ids = [place.device] if place.device.type == "cuda" else None
    # Each rank has its own statistics of batch normalisation, as in Goyal et al. 2017; those of rank 0 are kept.
    # PowerSGD averages the factors of a bucket when those of its first one are there. Over gloo that happens on threads
    # of its own, for two buckets in an order that differs between the ranks: so there is one bucket.
    is_at_risk = config.comm_hook == "powersgd" and dist.get_backend() == "gloo"
    wrapped = DistributedDataParallel(
        model, device_ids=device_ids, broadcast_buffers=False, bucket_cap_mb=ONE_BUCKET_MB if is_at_risk else None
    )
    if config.comm_hook == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif config.comm_hook == "powersgd":
        start = max(config.hook_start - num_updates, 2)
        power_state = powerSGD_hook.PowerSGDState(None, config.powersgd_rank, start_powerSGD_iter=start)
        wrapped.register_comm_hook(power_state, powerSGD_hook.powerSGD_hook)
    elif config.comm_hook == "post_localsgd":
        local_state = post_localSGD_hook.PostLocalSGDState(
            None, None, max(config.hook_start - num_updates, 0), post_local_gradient_allreduce=False
        )
        wrapped.register_comm_hook(local_state, post_localSGD_hook.post_localSGD_hook)
        averager = PeriodicModelAverager(period=config.localsgd_period, warmup_steps=config.hook_start)
        averager.step = num_updates
        return wrapped, PostLocalSGDOptimizer(optimizer, averager)
    return wrapped, optimizer
