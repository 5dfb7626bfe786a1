"""Owns one rank's side of the exchange: is a position due, post, collect, verify, decode.

Framework-neutral: tensors and keys in, tensors out. It never touches a model, a loss or an optimizer, and it never
ends a run because of a peer that is late or gone. It does end one that is set up wrongly.
"""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.alignment import AlignmentError, Judge
from fairseq_codistill.coordinator.checkpoint_exchange import CheckpointExchange
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.introductions import Identity, Introduction
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.mailbox import Mailbox
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.predictions import Exchange
from fairseq_codistill.coordinator.replicas import Replicas
from fairseq_codistill.coordinator.transports.choice import make_transport
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.whereabouts import Whereabouts
from fairseq_codistill.coordinator.wire import run_id_from

__all__ = ["AlignmentError", "Coordinator"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Posted:
    """A position that was posted and not collected yet: its batch, (num_rows, num_classes), and what it brings."""

    batch_fingerprint: bytes
    shape: tuple[int, int]
    exchange: Exchange


class Coordinator:
    """One rank's side of the exchange.

    Args:
        config: validated options.
        rank: rank inside this model.
        world_size: X, ranks of this model.
        num_kept: how many exchanges to keep for batches that are fed again (an AMP retry feeds a whole update again).
        transport: replaces the ZeroMQ transport that ``config`` describes; for tests and other transports.

    Raises:
        ConfigError: an address cannot be used.
    """

    def __init__(
        self,
        config: CodistillationConfig,
        rank: int = 0,
        world_size: int = 1,
        num_kept: int = 1,
        transport: Transport | None = None,
    ):
        config.validate()
        self.config = config
        self.meter = TrafficMeter()
        self._codec = make_codec(config.codistill_codec, salt=config.codistill_model_index)
        self._rank, self._world_size = rank, world_size
        self._kept: collections.OrderedDict[BatchKey, Exchange] = collections.OrderedDict()
        self._num_kept = max(1, num_kept)
        self._latest: BatchKey | None = None
        self._pending: dict[BatchKey, _Posted] = {}
        self._posted_last: BatchKey | None = None
        self._judge = Judge(config, rank, self._codec, self.meter)
        self._is_closed = False
        self._where = Whereabouts(config)
        self._mailbox = Mailbox(
            transport or make_transport(config, rank, world_size),
            model=config.codistill_model_index,
            rank=rank,
            num_models=config.codistill_num_models,
            run_id=run_id_from(config.codistill_run_id or config.codistill_addresses),
            meter=self.meter,
            on_hello=self._judge.check_hello,
            status=self._status,
        )
        self._checkpoints = CheckpointExchange(self._mailbox, self.meter, config.codistill_replica_wait)

    @property
    def peers(self) -> dict[int, Peer]:
        """Model index -> what this rank knows of it."""
        return self._mailbox.peers

    def meet(self, identity: Identity, order: DataOrder | None = None, elapsed: int = 0) -> None:
        """Announce this job to the others and check that they fit; returns when all were met or the time is up.

        Args:
            identity: what the others are told about this job.
            order: how batches are counted; without it :meth:`num_behind` does not know.
            elapsed: position of the first batch to come, in updates' worth of batches since the start of training.

        Raises:
            ConfigError: a peer runs with other settings, or holds the same parameters. Both sides raise it. One that
                joins later and does not fit is refused alone: a run in progress never ends because of it.
        """
        self._where.order, self._where.elapsed = order, elapsed
        introduction = Introduction(self.config, identity, self._world_size)
        self._judge.introduce(introduction)
        started = time.monotonic()
        logger.info(
            "codistillation: model %d of %d, rank %d of %d; waiting for the other models",
            self.config.codistill_model_index,
            self.config.codistill_num_models,
            self._rank,
            self._world_size,
        )
        self._mailbox.meet(
            introduction.hello, self.config.codistill_start_timeout, give_up=lambda: self._judge.refusal is not None
        )
        if self._judge.refusal is not None:
            self.close(f"refused: {self._judge.refusal}")
            raise self._judge.refusal
        self._judge.on_start(self.peers)
        met = [peer.model for peer in self.peers.values() if peer.hello is not None]
        logger.info("codistillation: met models %s in %.1f s", met, time.monotonic() - started)

    def is_due(self, elapsed: int) -> bool:
        """Whether an exchange happens at a data position.

        Args:
            elapsed: updates' worth of batches since the start of training, over all epochs, from 0. All micro-batches
                of an update share it, so they are exchanged together or not at all.
        """
        return self._where.is_due(elapsed)

    def num_behind(self, elapsed: int, within_reach: bool = True) -> int:
        """How far the most advanced peer is ahead: what this model has to skip to be of use again.

        Args:
            elapsed: this model's position.
            within_reach: a lead that can be caught up counts as none: what the peers sent meanwhile lies in the
                mailbox, so as many exchanges as it keeps are made without waiting. At the start it is empty; then only
                a lead over which nothing was exchanged counts as none, as between models that were met a moment apart.

        Returns:
            updates' worth of batches; 0 where there is nothing to skip.
        """
        peers = [peer for peer in self.peers.values() if peer.model not in self._judge.refused]
        return self._where.num_behind(elapsed, peers, within_reach)

    def _status(self) -> dict[str, Any]:
        return {"elapsed": self._where.elapsed, "is_training": self._judge.is_training}

    def post(self, key: BatchKey, batch_fingerprint: bytes, predictions: Tensor) -> None:
        """Send this rank's predictions for a position to the peers. Does not wait. Follow it with :meth:`collect`.

        Several positions may be posted before the first of them is collected. A position that was posted before (a
        batch that is fed again) is not sent twice.

        Args:
            key: data position, later than all that were posted before unless it is one of them.
            batch_fingerprint: from :func:`~fairseq_codistill.coordinator.keys.fingerprint`.
            predictions: (num_rows, num_classes) logits, any float dtype and device; gradients do not flow back.
        """
        num_rows, num_classes = predictions.shape
        self._posted_last = key
        if self._latest is not None and key <= self._latest:
            return
        self._latest, self._where.elapsed = key, self._where.elapsed_of(key)
        exchange = Exchange(predictions={})
        self._pending[key] = _Posted(batch_fingerprint, (num_rows, num_classes), exchange)
        self._mailbox.expect(key)
        audience = self._audience()
        if not audience:
            return
        payload = self._codec.encode(predictions, self._judge.seed(key))
        limit = self.config.codistill_max_message_mb * 2**20
        if len(payload) > limit:
            raise ConfigError(
                f"--codistill-max-message-mb is {self.config.codistill_max_message_mb}, but the predictions of {key} "
                f"take {len(payload) / 2**20:.0f} MiB; raise it on every model, or send less: a smaller "
                "--codistill-codec or --max-tokens"
            )
        exchange.sent_bytes = self._mailbox.post(
            key, batch_fingerprint, num_rows, num_classes, self._codec.code, payload, audience
        )

    def poll(self, elapsed: int = 0) -> None:
        """Answer peers while nothing is exchanged (in a burn-in, or between two exchanges), so that none need wait.

        Args:
            elapsed: this model's position.
        """
        self._where.elapsed = max(self._where.elapsed, elapsed)
        self._mailbox.poll()

    def collect(self, key: BatchKey | None = None) -> Exchange:
        """The peers' predictions for a position that was posted; waits for those that are present.

        Within an update positions may be collected in any order. What was posted in an earlier update and is not
        collected yet is given up.

        Args:
            key: data position; None for the one posted last.

        Returns:
            the exchange; for a batch that is fed again the one of the first time, without a second wait.

        Raises:
            AlignmentError: ``--codistill-max-mismatches`` batches in a row differed from those of a peer that was there
                from the start. One that joined later is refused alone.
        """
        key = self._posted_last if key is None else key
        assert key is not None, "collect() follows post()"
        assert self._latest is not None, "collect() follows post()"
        assert key <= self._latest, f"collect() follows post(): nothing was posted for {key}"
        posted = self._pending.pop(key, None)
        if posted is None:
            kept = self._kept.get(key)
            if kept is None:  # fed again, and too old to be kept: train on it without the peers
                return Exchange(predictions={}, num_skipped=len(self.peers))
            return dataclasses.replace(kept, wait_s=0.0, sent_bytes=0)
        self._pending = {other: value for other, value in self._pending.items() if other[:2] >= key[:2]}
        exchange = posted.exchange
        self._keep(key, exchange)
        started = time.monotonic()
        messages = self._mailbox.collect(key, self._wanted(), self.config.codistill_timeout)
        exchange.wait_s = time.monotonic() - started
        for model, message in messages.items():
            predictions = self._judge.verified(self.peers[model], message, posted.batch_fingerprint, posted.shape)
            if predictions is not None:
                exchange.predictions[model] = predictions
        exchange.num_skipped = len(self.peers) - len(exchange.predictions)
        return exchange

    def ask_replicas(self, key: BatchKey, replicas: Replicas, forward: Callable[[nn.Module], Tensor]) -> Exchange:
        """Exchange checkpoints where that is due, and let the copies that are there predict this batch.

        A position that is fed again is not sent twice.

        Args:
            key: data position.
            replicas: of this model.
            forward: a copy -> its (num_rows, num_classes) logits for this batch.

        Returns:
            the copies' predictions; ``num_skipped`` are the peers that a checkpoint was due to and not sent.
        """
        elapsed, exchange = self._where.elapsed_of(key), Exchange(predictions={})
        if key.micro_batch == 0 and self.is_due(elapsed) and (self._latest is None or key > self._latest):
            self._latest, self._where.elapsed = key, elapsed
            self._checkpoints.send(key, replicas, exchange, self._audience(), self.config.codistill_timeout)
        self.poll(elapsed)
        self._checkpoints.refresh(replicas, self._wanted(), self._where.order, self._latest)
        exchange.predictions.update(replicas.predict(forward))
        return exchange

    def _keep(self, key: BatchKey, exchange: Exchange) -> None:
        self._kept[key] = exchange
        while len(self._kept) > self._num_kept:
            self._kept.popitem(last=False)

    def _wanted(self) -> list[int]:
        """Models whose messages are worth having."""
        return [model for model in self.peers if model not in self._judge.refused]

    def _audience(self) -> list[int]:
        return [
            model
            for model, peer in self.peers.items()
            if peer.state is not PeerState.FINISHED and model not in self._judge.refused
        ]

    def interrupt(self, reason: str) -> None:
        """Wait no more: what waits ends at once, and every later wait too. Nothing is raised, and nobody is away by it.

        For a host that was asked to end: the step goes on with what the peers have sent so far. A signal handler or
        another thread may call it.

        Args:
            reason: for the log, such as ``"SIGTERM"``.
        """
        self._mailbox.interrupt(reason)

    @property
    def interrupted(self) -> bool:
        """Whether :meth:`interrupt` was called."""
        return self._mailbox.is_interrupted

    def close(self, reason: str = "finished") -> None:
        """Say goodbye, so that no peer waits for this rank, and free the transport. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._mailbox.close(reason)
            logger.info(
                "codistillation: closed (%s); traffic: %s; by peer: %s",
                reason,
                self.meter.summary(),
                self._mailbox.accounts(),
            )

    def num_present(self) -> int:
        """Peers that a step would wait for."""
        return sum(peer.state is PeerState.PRESENT for peer in self.peers.values())
