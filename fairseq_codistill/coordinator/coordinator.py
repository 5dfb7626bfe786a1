"""Owns one rank's side of the exchange: is a position due, post, collect, verify, decode.

Framework-neutral: tensors and keys in, tensors out. It never touches a model, a loss or an optimizer, and it never
ends a run because of a peer that is late or gone. It does end one that is set up wrongly.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fairseq_codistill import advice
from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.alignment import AlignmentError, Judge
from fairseq_codistill.coordinator.attendance import Attendance, NoPeersError
from fairseq_codistill.coordinator.budget import budget_of
from fairseq_codistill.coordinator.checkpoint_exchange import CheckpointExchange
from fairseq_codistill.coordinator.in_flight import InFlight, Posted
from fairseq_codistill.coordinator.introductions import Identity, Introduction
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.mailbox import Mailbox
from fairseq_codistill.coordinator.meter import Tally, TrafficMeter
from fairseq_codistill.coordinator.outgoing import Outgoing
from fairseq_codistill.coordinator.pairing import partners
from fairseq_codistill.coordinator.parting import Parting
from fairseq_codistill.coordinator.peers import IN_ORDER, Peer
from fairseq_codistill.coordinator.predictions import Exchange, PeerPredictions
from fairseq_codistill.coordinator.replicas import Replicas
from fairseq_codistill.coordinator.transports.choice import make_transport
from fairseq_codistill.coordinator.transports.relay_keys import RELAY
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.validation import ValidationExchange
from fairseq_codistill.coordinator.whereabouts import Whereabouts
from fairseq_codistill.coordinator.wire import Message, run_id_from

__all__ = ["AlignmentError", "Coordinator", "NoPeersError"]

logger = logging.getLogger(__name__)


class Coordinator:
    """One rank's side of the exchange.

    Args:
        config: validated options.
        rank: rank inside this model.
        world_size: X, ranks of this model.
        num_kept: how many exchanges to keep for batches that are fed again (an AMP retry feeds a whole update again).
        transport: replaces the ZeroMQ transport that ``config`` describes; for tests and other transports.
        keys_per_update: positions of one update: micro-batches and their parts.
        parting: what the models agree on the parts of a batch with; default: as the options say.

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
        keys_per_update: int = 1,
        parting: Parting | None = None,
    ):
        config.validate()
        self.config = config
        self.meter = TrafficMeter()
        self.parting = parting or Parting(config)
        self._outgoing = Outgoing(config, rank)
        self._rank, self._world_size = rank, world_size
        self._in_flight = InFlight(num_kept, config.codistill_lookahead)
        self._tally = Tally()
        self._judge = Judge(config, rank, self._outgoing.codec, self.meter)
        self._is_closed = False
        self._posted: tuple[BatchKey, bytes] | None = None  # the latest position, and what its batch was
        self._where = Whereabouts(config, self._tally)
        self._mailbox = Mailbox(
            transport or make_transport(config, rank, world_size, keys_per_update),
            model=config.codistill_model_index,
            rank=rank,
            num_models=config.codistill_num_models,
            run_id=run_id_from(config.codistill_run_id or config.codistill_addresses or RELAY),
            meter=self.meter,
            on_hello=self._on_hello,
            keys_per_update=keys_per_update,
            max_queue_bytes=config.codistill_max_queue_mb * 2**20,
            at_once=config.most_parts,
            status=self._status,
        )
        self._keys_per_update = keys_per_update
        self._validation: float | None = None
        self._attendance = Attendance(config, self._mailbox)
        self.validation = ValidationExchange(config, self._mailbox, self._judge, self._outgoing)
        self._checkpoints = CheckpointExchange(self._mailbox, self.meter, config)

    @property
    def peers(self) -> dict[int, Peer]:
        """Model index -> what this rank knows of it."""
        return self._mailbox.peers

    def meet(
        self, identity: Identity, order: DataOrder | None = None, elapsed: int = 0, checkpoint_bytes: int = 0
    ) -> None:
        """Announce this job to the others and check that they fit; returns when all were met or the time is up.

        Args:
            identity: what the others are told about this job.
            order: how batches are counted; without it :meth:`num_behind` does not know.
            elapsed: position of the first batch to come, in updates' worth of batches since the start of training.
            checkpoint_bytes: of one, where they are exchanged.

        Raises:
            ConfigError: a peer runs with other settings, or holds the same parameters. Both sides raise it. One that
                joins later and does not fit is refused alone: a run in progress never ends because of it.
            NoPeersError: nobody was met, though ``--codistill-require-peers`` asks for somebody.
        """
        config, started = self.config, time.monotonic()
        for warning in advice.idle_settings(config, identity.num_updates):
            logger.warning("codistillation: %s", warning)
        self._where.order, self._where.elapsed = order, elapsed
        self._outgoing.budget = budget_of(config, len(self._mailbox.peers), self._keys_per_update, identity.num_updates)
        introduction = Introduction(config, identity, self._world_size)
        self._judge.introduce(introduction)
        logger.info(
            "codistillation: model %d of %d, rank %d of %d; waiting for the other models",
            *(config.codistill_model_index, config.codistill_num_models, self._rank, self._world_size),
        )
        self._mailbox.meet(
            introduction.hello, config.codistill_start_timeout, give_up=lambda: self._judge.refusal is not None
        )
        error = self._judge.refusal or self._attendance.why_not_start(time.monotonic() - started, elapsed)
        if not elapsed:  # a run that goes on had room for them, and may have again
            error = error or self._checkpoints.why_too_large(checkpoint_bytes)
        if error is not None:
            self.close(f"refused: {error}")
            raise error
        self._judge.on_start(self.peers)
        met = self._attendance.summary()["peers_met"]
        logger.info("codistillation: met models %s in %.1f s", met, time.monotonic() - started)

    def follow(self, order: DataOrder) -> None:
        """From here on batches are counted so, on all models alike."""
        self._where.follow(order)

    def is_due(self, elapsed: int) -> bool:
        """Whether an exchange happens at a data position.

        Args:
            elapsed: updates' worth of batches since the start of training, over all epochs, from 0. All micro-batches
                of an update share it, so they are exchanged together or not at all.
        """
        return self._where.is_due(elapsed)

    def has_room(self, elapsed: int, num_rows: int) -> bool:
        """Whether the budget, if there is one, lets anything be sent at a position that is due; alike on all models.

        Args:
            elapsed: position, as for :meth:`is_due`.
            num_rows: of the batch.
        """
        budget = self._outgoing.budget
        return budget is None or budget.has_room(elapsed, num_rows)

    def partners(self, key: BatchKey) -> frozenset[int]:
        """The models that this one exchanges with at a position: all others, or some of them, the same on all sides."""
        config = self.config
        return partners(
            config.codistill_num_models,
            config.codistill_peers_per_position,
            config.codistill_data_seed,
            key,
            config.codistill_model_index,
        )

    def tell_validation(self, loss: float) -> None:
        """Tell the peers how this model does, for ``--codistill-peer-weights validation``.

        Args:
            loss: of its validation, in nats a row (target token, image).
        """
        self._validation = float(loss)
        self._mailbox.tell_again()

    def peer_weight(self, model: int) -> float:
        """What a peer counts in the mean: exp(-x) where its validation loss is x nats above ours, else 1.

        Ours is not a number: 1. Its alone is none: 0, as where it is infinite.
        """
        theirs, mine = (self.peers[model].hello or {}).get("validation"), self._validation
        if mine is None or not isinstance(theirs, float) or math.isnan(mine) or mine == theirs:
            return 1.0
        return 0.0 if math.isnan(theirs) else math.exp(min(0.0, mine - theirs))

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = {"elapsed": self._where.elapsed, "is_training": self._judge.is_training}
        status.update(self.parting.status())
        return status if self._validation is None else {**status, "validation": self._validation}

    def _on_hello(self, peer: Peer) -> None:
        self._judge.check_hello(peer)
        if peer.model not in self._judge.refused and self.parting.hear(peer.model, (peer.hello or {}).get("parts")):
            self._mailbox.tell_again()

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
        peers = (self.peers[model] for model in self._judge.wanted(self.peers))
        return self._where.num_behind(elapsed, peers, within_reach, self._outgoing.spacing)

    def post(self, key: BatchKey, batch_fingerprint: bytes, predictions: Tensor, targets: Tensor | None = None) -> None:
        """Send this rank's predictions for a position to the peers. Does not wait. Follow it with :meth:`collect`.

        Several positions may be posted before the first of them is collected. A position that was posted before (a
        batch that is fed again) is not sent twice.

        Args:
            key: data position, later than all that were posted before unless it is one of them.
            batch_fingerprint: from :func:`~fairseq_codistill.coordinator.keys.fingerprint`.
            predictions: (num_rows, num_classes) logits, any float dtype and device; gradients do not flow back.
            targets: (num_rows,) int64 classes of the batch, which are part of its fingerprint; for codecs that need not
                send what every model holds.

        Raises:
            AlignmentError: the latest position was posted with another batch.
        """
        num_rows, num_classes = predictions.shape
        if not self._in_flight.advance(key):
            if self._posted is not None and self._posted[0] == key and self._posted[1] != batch_fingerprint:
                raise AlignmentError(
                    f"the batch at {key} is not the one whose predictions were sent for it before: a look ahead takes "
                    "the batch that comes next, and one that is fed again is the same as the first time"
                )
            return
        self._posted = (key, batch_fingerprint)
        self._where.come_to(key)
        present = [model for model, peer in self.peers.items() if peer.is_waited_for]
        if self.parting.arrive(self._where.elapsed, present):
            self._mailbox.tell_again()  # on the way before this position's predictions
        self._tally.exchanges += 1
        posted = Posted(batch_fingerprint, (num_rows, num_classes), targets=targets)
        self._in_flight.add(key, posted)
        self._mailbox.expect(key)
        here = self.partners(key)
        audience = [model for model in self._judge.audience(self.peers) if model in here]
        if not audience:
            return
        payload = self._outgoing.encode(key, predictions, targets, self._where.elapsed_of(key))
        codec = self._outgoing.codec.code
        posted.exchange.sent_bytes = self._mailbox.post(
            key, batch_fingerprint, num_rows, num_classes, codec, payload, audience
        )

    def poll(self, elapsed: int | None = None) -> None:
        """Answer peers while nothing is exchanged (in a burn-in, or between two exchanges), so that none need wait.

        Args:
            elapsed: this model's position; None where it is at none, such as in a validation.

        Raises:
            NoPeersError: nobody is left, though ``--codistill-require-peers`` always asks for somebody.
        """
        if elapsed is not None:
            self._where.pass_by(elapsed)
        self._mailbox.poll()
        self._attendance.check(self._judge.refused)

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
            NoPeersError: nobody is left, though ``--codistill-require-peers`` always asks for somebody.
        """
        key, posted = self._in_flight.take(key)
        if posted is None:
            return self._in_flight.again(key, len(self.partners(key)))
        exchange = posted.exchange
        started = time.monotonic()
        here = self.partners(key)
        wanted = [model for model in self._judge.wanted(self.peers) if model in here]
        decoded: dict[int, PeerPredictions | None] = {}

        def decode(message: Message) -> None:
            what = (posted.batch_fingerprint, posted.shape, posted.targets)
            decoded[message.model] = self._judge.verified(self.peers[message.model], message, *what)

        messages = self._mailbox.collect(key, wanted, self.config.codistill_timeout, meanwhile=decode)
        exchange.wait_s = time.monotonic() - started
        self.parting.waited(exchange.wait_s)
        for model, message in messages.items():  # in the order of the models, whoever came first
            if model not in decoded:
                decode(message)
            if (predictions := decoded[model]) is not None:
                exchange.predictions[model] = predictions
        exchange.num_skipped = len(here) - len(exchange.predictions)
        self._tally.count_batch(bool(exchange.predictions))
        self._attendance.check(self._judge.refused)
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

        Raises:
            NoPeersError: nobody is left, though ``--codistill-require-peers`` always asks for somebody.
        """
        elapsed, exchange = self._where.elapsed_of(key), Exchange(predictions={})
        if key.micro_batch == 0 and self.is_due(elapsed) and self._in_flight.advance(key):
            self._where.come_to(key)
            self._tally.exchanges += 1
            self._checkpoints.send(
                key, replicas, exchange, self._judge.audience(self.peers), self.config.codistill_timeout
            )
        self.poll(elapsed)
        wanted, where = self._judge.wanted(self.peers), (self._where.order, self._in_flight.latest, elapsed)
        self._checkpoints.refresh(replicas, wanted, *where)
        exchange.predictions.update(replicas.predict(forward))
        self._tally.count_batch(bool(exchange.predictions))
        return exchange

    def interrupt(self, reason: str) -> None:
        """Wait no more: what waits ends at once, and every later wait too. Nothing is raised, and nobody is away by it.

        For a host that was asked to end: the step goes on with what the peers have sent so far. A signal handler or
        another thread may call it.

        Args:
            reason: for the log, such as ``"SIGTERM"``.
        """
        self._mailbox.interrupt(reason)

    @property
    def interruption(self) -> str | None:
        """What :meth:`interrupt` was told; None where it was not called."""
        return self._mailbox.interruption

    def summary(self) -> dict[str, Any]:
        """What this rank did, and what became of its peers.

        Returns:
            ``updates`` that this process was at (not those before it came), ``exchanges``, ``batches_due`` and
            ``batches_distilled`` with their ratio ``share_distilled``, ``peers_met`` (models), ``peers_lost`` and
            ``peers_found`` (how often one was lost, and found again).
        """
        return {**self._tally.summary(), **self._attendance.summary()}

    def close(self, reason: str = IN_ORDER) -> None:
        """Say goodbye, so that no peer waits for this rank, and free the transport. May be called twice.

        Args:
            reason: ``"finished"`` after all of the training, and only then: a peer that is left alone by anything else
                was left early, which ``--codistill-require-peers always`` does not take.
        """
        if not self._is_closed:
            self._is_closed = True
            self._mailbox.close(reason)
            logger.info(
                "codistillation: %(updates)d updates, %(exchanges)d exchanges, distilled on %(batches_distilled)d of "
                "%(batches_due)d batches due; met models %(peers_met)s; lost %(peers_lost)d, found %(peers_found)d",
                self.summary(),
            )
            logger.info(
                "codistillation: closed (%s); traffic: %s; by peer: %s",
                reason,
                self.meter.summary(),
                self._mailbox.accounts(),
            )
