"""Owns one rank's side of the exchange: is a position due, post, collect, verify, decode.

Framework-neutral: tensors and keys in, tensors out. It never touches a model, a loss or an optimizer, and it never
ends a run because of a peer that is late or gone. It does end one that is set up wrongly.
"""

import collections
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.coordinator.introductions import Identity, Introduction
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.mailbox import CAPACITY, Mailbox
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.predictions import Exchange, PeerPredictions
from fairseq_codistill.coordinator.replicas import Replicas
from fairseq_codistill.coordinator.transports.choice import make_transport
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import Message, run_id_from

logger = logging.getLogger(__name__)


class AlignmentError(RuntimeError):
    """The models do not train on the same batches. The message lists what differs."""


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
        self._pending: tuple[BatchKey, bytes, tuple[int, int]] | None = None
        self._pending_is_new = False
        self._introduction: Introduction | None = None
        self._refusal: Exception | None = None
        self._refused: set[int] = set()  # models that joined a run in progress and do not fit
        self._met_at_start: dict[int, Any] = {}  # model -> the incarnation of its process
        self._is_training = False
        self._is_closed = False
        self._order: DataOrder | None = None
        self._elapsed = 0  # position of this rank, in updates' worth of batches
        self._mailbox = Mailbox(
            transport or make_transport(config, rank, world_size),
            model=config.codistill_model_index,
            rank=rank,
            num_models=config.codistill_num_models,
            run_id=run_id_from(config.codistill_run_id or config.codistill_addresses),
            meter=self.meter,
            on_hello=self._check_hello,
            status=self._status,
        )

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
        self._order, self._elapsed = order, elapsed
        self._introduction = Introduction(self.config, identity, self._world_size)
        started = time.monotonic()
        logger.info(
            "codistillation: model %d of %d, rank %d of %d; waiting for the other models",
            self.config.codistill_model_index,
            self.config.codistill_num_models,
            self._rank,
            self._world_size,
        )
        self._mailbox.meet(
            self._introduction.hello, self.config.codistill_start_timeout, give_up=lambda: self._refusal is not None
        )
        self._raise_refusal()
        self._is_training = True
        self._met_at_start = {j: peer.hello.get("incarnation") for j, peer in self.peers.items() if peer.hello}
        met = [peer.model for peer in self.peers.values() if peer.hello is not None]
        logger.info("codistillation: met models %s in %.1f s", met, time.monotonic() - started)

    def is_due(self, elapsed: int) -> bool:
        """Whether an exchange happens at a data position.

        Args:
            elapsed: updates' worth of batches since the start of training, over all epochs, from 0. All micro-batches
                of an update share it, so they are exchanged together or not at all.
        """
        return elapsed % self.config.codistill_interval == 0

    def num_behind(self, elapsed: int, within_reach: bool = True) -> int:
        """How far the most advanced peer is ahead: what this model has to skip to be of use again.

        Args:
            elapsed: this model's position.
            within_reach: a lead that can be caught up counts as none: what the peers sent meanwhile lies in the
                mailbox, so ``CAPACITY`` exchanges are made without waiting. At the start it is empty; then only a lead
                over which nothing was exchanged counts as none, as between models that were met a moment apart.

        Returns:
            updates' worth of batches; 0 where there is nothing to skip.
        """
        if self._order is None or (
            self.config.codistill_exchange == "checkpoints" and not self.config.codistill_replica_wait
        ):
            return 0  # a copy predicts whatever batch this model is at
        furthest = elapsed
        for peer in self.peers.values():
            if peer.hello is None or peer.state is PeerState.FINISHED or peer.model in self._refused:
                continue
            announced = peer.hello.get("elapsed")
            if isinstance(announced, int):
                furthest = max(furthest, announced)
            if peer.newest is not None:
                furthest = max(furthest, self._elapsed_of(peer.newest))
        reach = CAPACITY * self.config.codistill_interval
        if not within_reach:
            reach = min(reach, self._next_exchange(elapsed) - elapsed)
        return furthest - elapsed if furthest - elapsed > reach else 0

    def _next_exchange(self, elapsed: int) -> int:
        """The first position from ``elapsed`` on at which models wait for each other."""
        interval = self.config.codistill_interval
        return -(-max(elapsed, self.config.codistill_burn_in) // interval) * interval

    def _status(self) -> dict[str, Any]:
        return {"elapsed": self._elapsed, "is_training": self._is_training}

    def post(self, key: BatchKey, batch_fingerprint: bytes, predictions: Tensor) -> None:
        """Send this rank's predictions for a position to the peers. Does not wait. Follow it with :meth:`collect`.

        A position that was posted before (a batch that is fed again) is not sent twice.

        Args:
            key: data position.
            batch_fingerprint: from :func:`~fairseq_codistill.coordinator.keys.fingerprint`.
            predictions: (num_rows, num_classes) logits, any float dtype and device; gradients do not flow back.
        """
        num_rows, num_classes = predictions.shape
        self._pending = (key, batch_fingerprint, (num_rows, num_classes))
        self._pending_is_new = self._latest is None or key > self._latest
        if not self._pending_is_new:
            return
        self._latest, self._elapsed = key, self._elapsed_of(key)
        exchange = Exchange(predictions={})
        self._keep(key, exchange)
        audience = self._audience()
        if not audience:
            return
        payload = self._codec.encode(predictions, self._seed(key))
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
        self._elapsed = max(self._elapsed, elapsed)
        self._mailbox.poll()

    def collect(self) -> Exchange:
        """The peers' predictions for the position just posted; waits for those that are present.

        Returns:
            the exchange; for a batch that is fed again the one of the first time, without a second wait.

        Raises:
            AlignmentError: ``--codistill-max-mismatches`` batches in a row differed from those of a peer that was there
                from the start. One that joined later is refused alone.
        """
        assert self._pending is not None, "collect() follows post()"
        key, batch_fingerprint, shape = self._pending
        kept = self._kept.get(key)
        if kept is None:  # fed again, and too old to be kept: train on it without the peers
            return Exchange(predictions={}, num_skipped=len(self.peers))
        if not self._pending_is_new:
            return dataclasses.replace(kept, wait_s=0.0, sent_bytes=0)
        self._pending_is_new = False
        started = time.monotonic()
        wanted = [model for model in self.peers if model not in self._refused]
        messages = self._mailbox.collect(key, wanted, self.config.codistill_timeout)
        kept.wait_s = time.monotonic() - started
        for model, message in messages.items():
            predictions = self._verified(self.peers[model], message, batch_fingerprint, shape)
            if predictions is not None:
                kept.predictions[model] = predictions
        kept.num_skipped = len(self.peers) - len(kept.predictions)
        return kept

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
        elapsed, exchange = self._elapsed_of(key), Exchange(predictions={})
        if key.micro_batch == 0 and self.is_due(elapsed) and (self._latest is None or key > self._latest):
            self._send_checkpoint(key, replicas, exchange)
        self.poll(elapsed)
        self._refresh(replicas)
        exchange.predictions.update(replicas.predict(forward))
        return exchange

    def _send_checkpoint(self, key: BatchKey, replicas: Replicas, exchange: Exchange) -> None:
        """To all peers; with ``--codistill-replica-wait`` wait for theirs of this position."""
        self._latest, self._elapsed = key, self._elapsed_of(key)
        audience = self._audience()
        if not audience:
            return
        try:
            payload = replicas.encode()
        except CodecError as error:
            logger.error("codistillation: the checkpoint of %s is not sent: %s", key, error)
            exchange.num_skipped = len(audience)
            return
        digest = replicas.layout.digest
        waits = self.config.codistill_replica_wait
        exchange.sent_bytes, passed_over = self._mailbox.post_checkpoint(key, digest, payload, audience, waits)
        exchange.num_skipped = len(passed_over)
        if passed_over:
            logger.info("codistillation: models %s have not received the last checkpoint yet; %s", passed_over, key)
        if waits:
            started = time.monotonic()
            self._mailbox.wait_for_checkpoints(key, self.config.codistill_timeout)
            exchange.wait_s = time.monotonic() - started

    def _refresh(self, replicas: Replicas) -> None:
        """Swap in the copies that have come, whole and fit; others are counted and dropped."""
        until = self._latest if self.config.codistill_replica_wait else None
        if self.config.codistill_replica_wait and until is None:
            return
        wanted = [model for model in self.peers if model not in self._refused]
        for model, message in self._mailbox.take_checkpoints(wanted, until).items():
            try:
                if message.fingerprint != replicas.layout.digest:
                    raise CodecError("its tensors have other names, shapes or dtypes")
                replicas.swap_in(model, message.payload, self._elapsed_of(message.key))
            except CodecError as error:
                self.meter.mismatched_messages += 1
                logger.warning("codistillation: checkpoint of model %d at %s not used: %s", model, message.key, error)

    def _elapsed_of(self, key: BatchKey) -> int:
        return 0 if self._order is None else self._order.elapsed(key.epoch, key.position)

    def _audience(self) -> list[int]:
        return [
            model
            for model, peer in self.peers.items()
            if peer.state is not PeerState.FINISHED and model not in self._refused
        ]

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

    # -- checks ----------------------------------------------------------------------------------------------------

    def _seed(self, key: BatchKey) -> int:
        """Of the draws at one position: the same on all models, another one for every rank."""
        name = repr((self.config.codistill_data_seed, tuple(key), self._rank)).encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")

    def _keep(self, key: BatchKey, exchange: Exchange) -> None:
        self._kept[key] = exchange
        while len(self._kept) > self._num_kept:
            self._kept.popitem(last=False)

    def _verified(
        self, peer: Peer, message: Message, batch_fingerprint: bytes, shape: tuple[int, int]
    ) -> PeerPredictions | None:
        """The message's predictions if they are for this very batch, else None, counted and logged."""
        their_shape = (message.num_rows, message.num_classes)
        if message.fingerprint != batch_fingerprint or their_shape != shape:
            self._count_mismatch(
                peer,
                f"batch {batch_fingerprint.hex()[:12]} of {shape[0]} rows x {shape[1]} classes here, "
                f"{message.fingerprint.hex()[:12]} of {their_shape[0]} x {their_shape[1]} there, both at {message.key}",
            )
            return None
        try:
            if message.codec != self._codec.code:
                raise CodecError(f"codec {message.codec}, here {self._codec.code} ({self.config.codistill_codec})")
            predictions = self._codec.decode(message.payload, *shape, seed=self._seed(message.key))
        except CodecError as error:
            self._count_mismatch(peer, str(error))
            return None
        peer.mismatches_in_a_row = 0
        return predictions

    def _count_mismatch(self, peer: Peer, what: str) -> None:
        self.meter.mismatched_messages += 1
        peer.mismatches_in_a_row += 1
        logger.warning("codistillation: misaligned with model %d, not distilled from: %s", peer.model, what)
        if peer.mismatches_in_a_row >= self.config.codistill_max_mismatches:
            assert self._introduction is not None
            differences = self._introduction.differences(peer, "settings") + self._introduction.differences(
                peer, "remarks"
            )
            error = AlignmentError(
                f"{peer.mismatches_in_a_row} batches in a row differ between model "
                f"{self.config.codistill_model_index} and model {peer.model} ({what}). What differs in their set-up: "
                + ("; ".join(differences) or "nothing that is announced, so compare the data files themselves")
            )
            if (peer.hello or {}).get("incarnation") == self._met_at_start.get(peer.model):
                raise error
            self._refused.add(peer.model)
            logger.error("codistillation: model %d is not distilled from any more: %s", peer.model, error)

    def _check_hello(self, peer: Peer) -> None:
        """Refuse a peer with which codistillation makes no sense."""
        assert self._introduction is not None
        why = self._introduction.why_unfit(peer)
        if why is None:
            self._refused.discard(peer.model)
        elif self._is_training:
            self._refused.add(peer.model)
            logger.error("codistillation: model %d is not distilled from: %s", peer.model, why)
        else:
            # Not raised here: this runs while messages are taken in, and our hello may still be on its way.
            self._refusal = self._refusal or ConfigError(why)

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            self.close("refused: " + str(self._refusal))
            raise self._refusal

    def num_present(self) -> int:
        """Peers that a step would wait for."""
        return sum(peer.state is PeerState.PRESENT for peer in self.peers.values())
