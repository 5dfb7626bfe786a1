"""Owns every workaround for a version of fairseq or torch; each names what it works around and when it can go.

Nothing here may weaken a check: ``torch.load`` keeps ``weights_only``, and only plain data is allow-listed.
"""

import argparse
import functools
import os
from typing import Any

import numpy as np
import torch

from fairseq_codistill.config import ConfigError


def apply() -> None:
    """Make fairseq and this torch work together. Idempotent; called when fairseq imports the user-dir."""
    allow_fairseq_checkpoints()
    send_plain_configuration()
    mend_nan_detector()


def allow_fairseq_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read what fairseq writes, and sends between ranks, beside tensors.

    torch 2.6 made ``weights_only`` the default, and fairseq's checkpoints hold an ``argparse.Namespace`` (the model's
    arguments) and, after ``--eval-bleu``, numpy arrays (the n-gram counts of the running BLEU). When several ranks
    resume, what rank 0 sends holds a placeholder for each tensor. All are plain data: a Namespace stores attributes, a
    placeholder an index, and numpy's reconstruction makes an array of a listed dtype from bytes.

    Upstream: https://github.com/facebookresearch/fairseq/issues/5610. Can go when fairseq allow-lists these itself.
    """
    if not hasattr(torch.serialization, "add_safe_globals"):
        return  # torch < 2.4, where weights_only is not the default either
    from fairseq.distributed.utils import _TensorPlaceholder

    core = getattr(np, "_core", None) or np.core
    dtypes = {type(np.dtype(kind)) for kind in (np.int32, np.int64, np.float32, np.float64, np.bool_)}
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            _TensorPlaceholder,
            np.ndarray,
            np.dtype,
            core.multiarray._reconstruct,
            core.multiarray.scalar,
            *dtypes,
        ]
    )


def send_plain_configuration() -> None:
    """When several ranks resume, let rank 0 send the checkpoint's configuration as plain containers.

    fairseq turns it into an omegaconf object on loading, whose many classes are better not allow-listed; no rank
    reads it from what it received. Same origin and end condition as :func:`allow_fairseq_checkpoints`.
    """
    from fairseq.distributed import utils
    from omegaconf import OmegaConf

    original = utils.broadcast_object
    if getattr(original, "_codistill_wrapped", False):
        return

    @functools.wraps(original)
    def broadcast_object(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, dict) and OmegaConf.is_config(obj.get("cfg")):
            obj = {**obj, "cfg": OmegaConf.to_container(obj["cfg"], resolve=True, enum_to_str=True)}
        return original(obj, *args, **kwargs)

    broadcast_object._codistill_wrapped = True  # type: ignore[attr-defined]
    utils.broadcast_object = broadcast_object


def mend_nan_detector() -> None:
    """Let fairseq's NaN detector look at models whose encoder returns a dict of lists, as every transformer does.

    fairseq hooks the backward pass of each module with ``register_backward_hook``, for which torch takes the first
    tensor out of a module's output; a dict that holds only lists has none, and ``StopIteration`` hides the report
    that gradients became NaN. Here backward hooks go on modules without children, whose outputs are tensors.

    Seen with fairseq 0.12.2 and fairseq-fixed 0.12.3.1 on torch 2.15. Can go when the detector uses full hooks.
    """
    from fairseq.nan_detector import NanDetector

    def add_hooks(self: NanDetector, module: torch.nn.Module) -> None:
        if self.forward:
            self.fhooks.append(module.register_forward_hook(self.fhook_fn))
        if self.backward and not list(module.children()):
            self.bhooks.append(module.register_backward_hook(self.bhook_fn))

    NanDetector.add_hooks = add_hooks


def check_world(world_size: int) -> None:
    """Refuse to train several independent models where one data-parallel model was meant.

    fairseq takes its world size from ``--distributed-world-size``, whose default is the number of visible GPUs. Under
    torchrun with none or one visible, every process therefore trains alone, and all write the same checkpoints.

    Args:
        world_size: devices that fairseq trains this model on.

    Raises:
        ConfigError: the environment was made by torchrun for several processes, and fairseq is alone.

    Seen with fairseq 0.12.2 and fairseq-fixed 0.12.3.1. Can go when fairseq reads WORLD_SIZE before its default.
    """
    by_torchrun = all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    expected = int(os.environ["WORLD_SIZE"]) if by_torchrun else 1
    if expected > 1 and world_size == 1:
        raise ConfigError(
            f"WORLD_SIZE is {expected} (set by torchrun), but fairseq trains this model on 1 device, so {expected} "
            f"independent models would overwrite each other; pass --distributed-world-size {expected} on GPUs, or "
            f"start the ranks with codistill-launch --devices-per-model {expected}"
        )
