"""Codistillation for any PyTorch loop, fairseq and timm: n models that teach each other through their predictions.

``from fairseq_codistill import Codistiller, CoordinatedBatches`` is all that a loop of one's own needs. For fairseq
this package is a ``--user-dir``: fairseq imports :mod:`fairseq_codistill.tasks` by itself, and that registers the tasks
``codistill_*`` and the criterion ``codistillation``. Importing the package alone imports neither torch nor fairseq.

Source: "A Closer Look at Codistillation for Distributed Training" (Sodhani et al. 2021).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairseq_codistill.codistiller import Codistiller
    from fairseq_codistill.config import CodistillationConfig, ConfigError
    from fairseq_codistill.coordinator.coordinator import AlignmentError
    from fairseq_codistill.lookahead import with_next
    from fairseq_codistill.sampling import CoordinatedBatches

__version__ = "0.2.0"
__all__ = ["AlignmentError", "CodistillationConfig", "Codistiller", "ConfigError", "CoordinatedBatches", "with_next"]

_HOMES = {
    "AlignmentError": "coordinator.coordinator",
    "CodistillationConfig": "config",
    "Codistiller": "codistiller",
    "ConfigError": "config",
    "CoordinatedBatches": "sampling",
    "with_next": "lookahead",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are asked for, so that the launcher and shells need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
