"""Owns every workaround for a version of fairseq or torch; each names what it works around and when it can go."""

import argparse

import torch

from fairseq_codistill.config import ConfigError


def apply() -> None:
    """Make fairseq and this torch work together. Idempotent."""
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace])


def check_world(world_size: int) -> None:
    """Raises:
    ConfigError: the environment speaks of several processes but fairseq trains alone.
    """
    import os

    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if expected > 1 and world_size == 1:
        raise ConfigError(f"WORLD_SIZE is {expected} but fairseq trains on 1 device")
