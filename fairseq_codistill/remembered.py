"""Owns what of the exchange goes into a model's checkpoint: what it learns from next, and settings to compare with."""

import logging
from collections.abc import Mapping
from typing import Any

from fairseq_codistill import advice
from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.replicas import Replicas

logger = logging.getLogger("fairseq_codistill.exchanger")
VALIDATION = "validation"  # beside the copies: the validation loss that was told last


class Remembered:
    """Part of an :class:`~fairseq_codistill.exchanger.Exchanger`."""

    config: CodistillationConfig
    coordinator: Coordinator | None
    _replicas: Replicas | None = None
    _saved_replicas: dict[str, Any]  # of the checkpoint that training goes on from
    _validation: float | None = None  # that was told last, by this process or the one that wrote the checkpoint

    def replicas_state(self) -> dict[str, Any]:
        """For this model's checkpoint, what it learns from next: the copies of the peers, and by what they weigh."""
        found = self._saved_replicas if self._replicas is None else self._replicas.state_dict()
        return found if self._validation is None else {**found, VALIDATION: self._validation}

    def load_replicas_state(self, state: dict[str, Any] | None) -> None:
        """What :meth:`replicas_state` gave; before the models meet."""
        self._saved_replicas = dict(state or {})
        self._validation = self._saved_replicas.pop(VALIDATION, None)

    def tell_validation(self, loss: float) -> None:
        """Say how this model does, in nats a row, for ``--codistill-peer-weights validation``; on every rank alike."""
        if self.config.codistill_peer_weights == "validation":
            self._validation = float(loss)  # before the models meet: told when they do
            if self.coordinator is not None:
                self.coordinator.tell_validation(loss)

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
