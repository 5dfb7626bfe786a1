"""Owns the exchange over validation batches: what the peers predict for them, for figures and nothing else.

A peer that validates at another time costs at most one timeout a validation: neither the run nor what is known of the
peer depends on it. It decides nothing about when a model validates.
"""

import logging
import time

from torch import Tensor

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.alignment import Judge
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.mailbox import Mailbox
from fairseq_codistill.coordinator.outgoing import Outgoing
from fairseq_codistill.coordinator.predictions import Exchange

logger = logging.getLogger(__name__)
# Validation batches are numbered from here on, as if they were micro-batches of the update before them: their keys lie
# between those of the training on both sides, so that a peer which goes on without validating is past them.
FIRST = 1 << 30


def validation_key(last: BatchKey, number: int) -> BatchKey:
    """Of a batch of the validation that follows the position ``last``; ``number`` from 0."""
    return last._replace(micro_batch=FIRST + number)


class ValidationExchange:
    """Of one rank.

    Args:
        config: validated options.
        mailbox: to post to.
        judge: of what comes.
        outgoing: encodes predictions.
    """

    def __init__(self, config: CodistillationConfig, mailbox: Mailbox, judge: Judge, outgoing: Outgoing):
        self._config, self._mailbox, self._judge, self._outgoing = config, mailbox, judge, outgoing
        self._position: tuple[int, int] | None = None  # of the validation that is under way
        self._missed: set[int] = set()  # models that it waits for no more
        self._warned: set[int] = set()

    def exchange(
        self, key: BatchKey, batch_fingerprint: bytes, predictions: Tensor, targets: Tensor | None = None
    ) -> Exchange:
        """Post what this model predicts, and collect what the peers do that are at the same batch.

        Args:
            key: from :func:`validation_key`.
            batch_fingerprint: of the batch.
            predictions: (num_rows, num_classes) logits.
            targets: (num_rows,) int64 classes of the batch, which are part of its fingerprint.
        """
        if key[:2] != self._position:
            self._position, self._missed = (key.epoch, key.position), set()
        peers, exchange = self._mailbox.peers, Exchange(predictions={})
        num_rows, num_classes = predictions.shape
        audience = self._judge.audience(peers)
        if audience:
            payload = self._outgoing.encode(key, predictions, targets, elapsed=None)
            what = (batch_fingerprint, num_rows, num_classes, self._outgoing.codec.code)
            exchange.sent_bytes = self._mailbox.post(key, *what, payload, audience)
        wanted, started = self._judge.wanted(peers), time.monotonic()
        messages = self._mailbox.collect(
            key, wanted, self._config.codistill_timeout, excused=self._missed, is_required=False
        )
        exchange.wait_s = time.monotonic() - started
        for model in wanted:
            if model not in messages and peers[model].is_waited_for and not peers[model].is_past(key):
                self._missed.add(model)
        for model, message in messages.items():
            found = self._judge.read(message, batch_fingerprint, (num_rows, num_classes), targets)
            if not isinstance(found, str):
                exchange.predictions[model] = found
            elif model not in self._warned:
                self._warned.add(model)
                logger.warning("codistillation: not compared in validation with model %d: %s", model, found)
        exchange.num_skipped = len(peers) - len(exchange.predictions)
        return exchange
