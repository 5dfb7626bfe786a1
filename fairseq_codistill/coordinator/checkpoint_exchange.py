"""Owns the exchange of checkpoints in place of predictions: send this model's, swap in those of the peers.

It never waits longer than it is told to, and never decides when an exchange is due.
"""

import logging
import time
from collections.abc import Iterable

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.mailbox import Mailbox
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import PeerState
from fairseq_codistill.coordinator.predictions import Exchange
from fairseq_codistill.coordinator.replicas import Replicas

logger = logging.getLogger(__name__)

PATIENCE = 10  # exchanges without a checkpoint of a model, after which its copy is that of a dead one
FIRST_TIMEOUTS = 10  # that a second checkpoint of a model may take, while nobody knows how long one does


class CheckpointExchange:
    """One rank's side of it.

    Args:
        mailbox: of this rank.
        meter: counts checkpoints that cannot be used.
        config: ``--codistill-replica-wait``, the interval and the timeout.
    """

    def __init__(self, mailbox: Mailbox, meter: TrafficMeter, config: CodistillationConfig):
        self._mailbox, self._meter, self._config = mailbox, meter, config
        self._waits = config.codistill_replica_wait
        self._came: dict[int, tuple[int, float]] = {}  # model -> position and time here when its copy came
        self._num_passed_over = 0
        self._patience: dict[int, float] = {}  # model -> seconds that its next one may take, by what the last one took

    def why_too_large(self, num_bytes: int) -> ConfigError | None:
        """The error if the way to the peers takes no checkpoint of that size; once they were met, when it is known."""
        limit = self._mailbox.courier.limit_bytes
        if limit is None or num_bytes <= limit:
            return None
        return ConfigError(
            f"a checkpoint has {num_bytes / 2**20:.1f} MiB, and the relay takes {limit / 2**20:.1f} MiB: start it with "
            "a larger codistill-relay --max-message-mb and --memory-mb, of which each rank there has a share, or "
            "exchange predictions"
        )

    def send(
        self, key: BatchKey, replicas: Replicas, exchange: Exchange, audience: list[int], timeout_s: float
    ) -> None:
        """To all of ``audience``; where models wait, wait for theirs of this position.

        Args:
            key: data position.
            replicas: of this model.
            exchange: takes the figures.
            audience: models to send to.
            timeout_s: the longest wait.
        """
        if not audience:
            return
        is_whole = True
        try:
            payload = replicas.encode()
        except CodecError as error:
            logger.error("codistillation: the checkpoint of %s is not sent: %s", key, error)
            if not self._waits:
                exchange.num_skipped = len(audience)
                return
            is_whole, payload = False, memoryview(b"")  # which nobody takes, and nobody waits for
        self._mailbox.poll()  # that the last one has arrived may have come meanwhile
        digest = replicas.layout.digest
        exchange.sent_bytes, passed_over = self._mailbox.post_checkpoint(key, digest, payload, audience, self._waits)
        exchange.num_skipped = len(passed_over) if is_whole else len(audience)
        limit = self._mailbox.courier.limit_bytes
        if passed_over and (limit is None or len(payload) <= limit):  # else the transport says why
            self._num_passed_over += 1
            if self._num_passed_over & (self._num_passed_over - 1) == 0:
                logger.info(
                    "codistillation: models %s have not received the last checkpoint yet (%d times so far); %s",
                    passed_over,
                    self._num_passed_over,
                    key,
                )
        if self._waits:
            started = time.monotonic()
            self._mailbox.wait_for_checkpoints(key, timeout_s)
            exchange.wait_s = time.monotonic() - started

    def refresh(
        self, replicas: Replicas, wanted: Iterable[int], order: DataOrder | None, latest: BatchKey | None, elapsed: int
    ) -> None:
        """Swap in the copies that have come, whole and fit; others are counted and dropped.

        Of a model that ended before the end of its training, does not fit, or has been silent for long, no copy is
        kept: it would teach as it was then, for the rest of the run.

        Args:
            replicas: of this model.
            wanted: models whose checkpoint is worth having.
            order: how batches are counted, to know how old a copy is.
            latest: position of the last exchange; where models wait, no later checkpoint is taken.
            elapsed: this model's position.
        """
        wanted = list(wanted)
        if not self._mailbox.is_interrupted:  # or else those that are told to stop would save none
            replicas.forget((self._mailbox.peers.keys() - wanted) | self._lost(replicas, elapsed))
        if self._waits and latest is None:
            return
        for model, message in self._mailbox.take_checkpoints(wanted, latest if self._waits else None).items():
            try:
                if message.fingerprint != replicas.layout.digest:
                    raise CodecError("its tensors have other names, shapes or dtypes")
                then = 0 if order is None else order.elapsed(message.key.epoch, message.key.position)
                replicas.swap_in(model, message.payload, then)
                now = time.monotonic()
                if model in self._came:
                    most = 10 * FIRST_TIMEOUTS * self._config.codistill_timeout
                    self._patience[model] = min(2 * (now - self._came[model][1]), most)
                self._came[model] = (elapsed, now)
            except CodecError as error:
                self._meter.mismatched_messages += 1
                logger.warning("codistillation: checkpoint of model %d at %s not used: %s", model, message.key, error)

    def _lost(self, replicas: Replicas, elapsed: int) -> set[int]:
        """Models with a copy that ended early, or of which no checkpoint came for 10 exchanges and a timeout.

        One that was stopped by a signal comes back, as a rule, from the checkpoint that it saved.
        """
        now, lost = time.monotonic(), set()
        for model in replicas.elapsed:
            if (peer := self._mailbox.peers.get(model)) is None:
                continue
            since, came = self._came.setdefault(model, (elapsed, now))  # of a copy from a checkpoint of ours: now
            has_ended = peer.state is PeerState.FINISHED and not peer.is_done and not peer.was_stopped
            timeout = self._config.codistill_timeout
            patience = max(timeout, self._patience.get(model, FIRST_TIMEOUTS * timeout))  # a slow link takes its time
            is_silent = now - came > patience and not peer.is_done
            if has_ended or (is_silent and elapsed - since > PATIENCE * self._config.codistill_interval):
                lost.add(model)
        return lost
