"""Owns a launch on this machine: free ports, the devices that are here, a process a model or a rank."""

import os
from collections.abc import Sequence

from fairseq_codistill.launch.plan import Job, make_jobs
from fairseq_codistill.launch.resources import pick_ports, visible_devices


def local_jobs(
    commands: Sequence[Sequence[str]],
    devices_per_model: int,
    base_port: int | None = None,
    share_devices: bool = False,
    keys: str | None = None,
) -> list[Job]:
    """The processes to start.

    Args:
        commands: of :func:`~fairseq_codistill.launch.plan.model_commands`.
        devices_per_model: X.
        base_port: ``--base-port``.
        share_devices: ``--share-devices``.
        keys: folder of the run's keys.

    Raises:
        ConfigError: ports or devices do not suffice.
    """
    ports = pick_ports(len(commands), devices_per_model, base_port)
    devices = visible_devices(commands[0], os.environ, count_cuda_devices)
    return make_jobs(commands, ports, devices, share_devices, keys)


def count_cuda_devices() -> int:
    """Asked only where neither ``--cpu`` nor CUDA_VISIBLE_DEVICES decides: it loads torch."""
    import torch

    return torch.cuda.device_count()
