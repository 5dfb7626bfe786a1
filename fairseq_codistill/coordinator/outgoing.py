"""Owns what leaves of predictions: encoded for their position, and never larger than the peers would take."""

import hashlib
import logging

from torch import Tensor

from fairseq_codistill.advice import whole_predictions
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.budget import Budget
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.codecs.counts import CountsCodec
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.late import Payload

logger = logging.getLogger(__name__)


def seed_at(config: CodistillationConfig, rank: int, key: BatchKey) -> int:
    """Of the draws at one position: the same on all models, another one for every rank."""
    name = repr((config.codistill_data_seed, tuple(key), rank)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


class Outgoing:
    """Encodes one rank's predictions.

    Args:
        config: validated options.
        rank: rank inside this model.

    Attributes:
        codec: that the options name.
        budget: of the bits; None without one.
    """

    def __init__(self, config: CodistillationConfig, rank: int):
        self.codec = make_codec(config.codistill_codec, salt=config.codistill_model_index)
        self.budget: Budget | None = None
        self._config, self._rank = config, rank
        self._is_first = True

    @property
    def spacing(self) -> int:
        """Updates between two positions that the budget lets anything be sent at; 1 without one."""
        return 1 if self.budget is None else self.budget.spacing()

    def encode(
        self, key: BatchKey, predictions: Tensor, targets: Tensor | None = None, elapsed: int | None = 0
    ) -> Payload:
        """As they travel.

        Args:
            key: data position.
            predictions: (num_rows, num_classes) logits, any float dtype and device.
            targets: (num_rows,) int64 classes of the batch, where it has any.
            elapsed: position, in updates' worth of batches; for a budget. None where the budget has no say.

        Raises:
            ConfigError: they are larger than ``--codistill-max-message-mb``.
        """
        if self._is_first and (warning := whole_predictions(self._config, predictions.size(1))):
            logger.warning("codistillation: %s", warning)
        self._is_first = False
        if self._config.takes_temperature(self._config.codistill_codec):
            predictions = predictions.float() / self._config.codistill_temperature
        seed = seed_at(self._config, self._rank, key)
        if self.budget is not None and elapsed is not None and isinstance(self.codec, CountsCodec):
            payload: Payload = self.budget.encode(self.codec, predictions, seed, targets, elapsed)
        else:
            payload = self.codec.encode(predictions, seed, targets)
        if len(payload) > self._config.codistill_max_message_mb * 2**20:
            raise ConfigError(
                f"--codistill-max-message-mb is {self._config.codistill_max_message_mb}, but the predictions of {key} "
                f"take {len(payload) / 2**20:.0f} MiB; raise it on every model, or send less: a smaller "
                "--codistill-codec or --max-tokens"
            )
        return payload
