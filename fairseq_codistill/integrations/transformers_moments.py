"""Owns what happens between the updates of a Hugging Face trainer: the models meet, poll, tell their losses, save.

When each of them is due the trainer says.
"""

import logging
import os
from typing import Any

from transformers import TrainerCallback

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.coordinator import NoPeersError
from fairseq_codistill.integrations.transformers_arguments import OWN_LOADER
from fairseq_codistill.integrations.transformers_checkpoints import write_state

logger = logging.getLogger(__name__)


class Moments(TrainerCallback):
    """Of one trainer.

    Args:
        trainer: a ``CodistillMixin``.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if self._trainer.features is None:
            raise ConfigError(OWN_LOADER)
        try:
            self._trainer.meet()
        except NoPeersError as error:
            if state.global_step < state.max_steps:
                raise
            logger.info("codistillation: nothing is left to train, so no other model is needed: %s", error)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        state.epoch = self._trainer.place.epoch(state.global_step)  # the trainer counts what it was given of this one

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        if self._trainer.peers is not None:
            self._trainer.peers.poll()  # so that no peer waits while this model evaluates

    def on_evaluate(self, *_: Any, metrics: dict[str, float] | None = None, **__: Any) -> None:
        """Say how this model does; of several data sets each is told, and the last one counts."""
        sets, found = self._trainer.eval_dataset, metrics or {}
        for name in [f"eval_{name}_loss" for name in sets] if isinstance(sets, dict) else ["eval_loss"]:
            if self._trainer.peers is not None and name in found:
                self._trainer.peers.tell_validation(found[name])

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and os.path.isdir(folder) and self._trainer.peers is not None:
            write_state(folder, self._trainer.peers.state_dict())
