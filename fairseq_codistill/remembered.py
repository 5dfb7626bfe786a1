"""Owns what of the exchange goes into a model's checkpoint: the copies of the peers, and settings to compare with."""

import logging
from collections.abc import Mapping
from typing import Any

from fairseq_codistill import advice
from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.replicas import Replicas

logger = logging.getLogger("fairseq_codistill.exchanger")


class Remembered:
    """Part of an :class:`~fairseq_codistill.exchanger.Exchanger`."""

    config: CodistillationConfig
    _replicas: Replicas | None = None
    _saved_replicas: dict[str, Any]  # of the checkpoint that training goes on from

    def replicas_state(self) -> dict[str, Any]:
        """For this model's checkpoint: the copies of the peers, which are part of what it learns from next."""
        return self._saved_replicas if self._replicas is None else self._replicas.state_dict()

    def load_replicas_state(self, state: dict[str, Any] | None) -> None:
        """What :meth:`replicas_state` gave; before the models meet."""
        self._saved_replicas = state or {}

    def settings_state(self) -> dict[str, Any]:
        """For this model's checkpoint: what a run that goes on from it should not change without a word."""
        return {name: getattr(self.config, name) for name in advice.RESUMED}

    def compare_settings(self, before: Mapping[str, Any]) -> None:
        """Warn of each setting that differs from those of the checkpoint that training goes on from.

        Args:
            before: what :meth:`settings_state` gave, or options by their names; those that it lacks are not compared.

        Raises:
            ConfigError: the number of models differs where their checkpoints are exchanged.
        """
        for change in advice.changed_settings(before, self.config):
            logger.warning("codistillation: going on otherwise than up to the checkpoint: %s", change)
