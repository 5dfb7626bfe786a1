"""Owns one rank's part in the exchange, batch by batch: is it due, the weight, post and collect, the term, its sums.

Training loops come to it through :class:`~fairseq_codistill.codistiller.Codistiller`. It never counts batches and never
touches an optimizer.
"""

import atexit
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from fairseq_codistill import advice, figures, schedules
from fairseq_codistill.comparison import agreement, compared, number
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import AlignmentError, Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import ENDLESS, BatchKey, DataOrder
from fairseq_codistill.coordinator.parting import Parting
from fairseq_codistill.coordinator.peers import PROCESS_ENDED
from fairseq_codistill.coordinator.predictions import Exchange, PeerPredictions
from fairseq_codistill.coordinator.replicas import Replicas
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.lesson import Batch, Distilled, Pending
from fairseq_codistill.losses.chunked import chunked_loss, weighted_mean
from fairseq_codistill.losses.generalised import Divergence
from fairseq_codistill.losses.vote import elect
from fairseq_codistill.ranks import group_timeout_s, notes_of_ranks, rank_in_model
from fairseq_codistill.remembered import Remembered
from fairseq_codistill.split_step import why_whole
from fairseq_codistill.teachers import Given, Teachers, lessons

logger = logging.getLogger(__name__)
_open: "weakref.WeakSet[Exchanger]" = weakref.WeakSet()


class Exchanger(Remembered):
    """One rank of one model, as its peers know it.

    Args:
        config: validated options.
        rank: inside the model; default: that of torch.distributed, or 0.
        world_size: X, ranks of this model; default: that of torch.distributed, or 1.
        num_kept: exchanges kept for batches that are fed again.
        transport: replaces the one that the settings describe.
        teachers: modules that never change, each alone or with its weight, beside those that the options name.

    Attributes:
        coordinator: None before the models meet, and where this one trains alone.
        has_transfer_set: whether batches of a transfer set are exchanged, and not those that are trained on.
        sums: of the last batch, by the names of :mod:`~fairseq_codistill.figures`, for whoever adds them up.
    """

    def __init__(
        self,
        config: CodistillationConfig,
        rank: int | None = None,
        world_size: int | None = None,
        num_kept: int = 1,
        transport: Transport | None = None,
        teachers: Iterable[Given] = (),
    ):
        self.config = config
        self.rank, self.world_size = rank_in_model(rank, world_size)
        self._num_kept, self._transport = num_kept, transport
        self._order, self._epoch = DataOrder(1), 1
        self.coordinator: Coordinator | None = None
        self._replicas: Replicas | None = None
        self._saved_replicas = {}
        self._parting = Parting(config)
        self._advice = ""  # for whoever's batches turn out to differ
        self._told = (0.0, 0)  # alpha and epoch that were last in the log
        self.sums: figures.Sums = {}
        self._divergence = Divergence(
            config.codistill_divergence, config.codistill_temperature, config.codistill_divergence_beta
        )
        self.teachers = Teachers(config, teachers)
        self.has_transfer_set = False

    def introduce(self, model: nn.Module, identity: Identity, order: DataOrder, elapsed: int) -> None:
        """Wait for the other models, and refuse those that do not fit.

        Args:
            model: on its device, without any wrapper.
            identity: what the others are told; what belongs to the exchange is added here.
            order: how batches are counted.
            elapsed: updates' worth of batches since the start of training.

        Raises:
            ConfigError: a peer runs with other settings, or holds the same parameters.
        """
        advice.check_timeout(self.config, group_timeout_s(self.world_size))
        if self.config.codistill_exchange == "checkpoints":
            self._replicas = Replicas(model, self.config.codistill_codec, self.config.codistill_replica_mode)
            self._replicas.load_state_dict(self._saved_replicas, self.config.codistill_model_index)
            more = self._replicas.settings(self.config.codistill_max_message_mb)
            identity = dataclasses.replace(identity, settings={**identity.settings, **more})
        notes = notes_of_ranks(self.world_size)
        self._parting = Parting(self.config, self.has_transfer_set, why_whole(model, self.world_size), notes)
        of_epoch = order.num_batches % ENDLESS, order.batches_per_update(1)
        for warning in advice.of_batches(self.config, identity.settings, *of_epoch, self.has_transfer_set):
            logger.warning("codistillation: %s", warning)
        if self._has_own_order:  # epochs differ in length, so updates are counted
            order = DataOrder(ENDLESS, [order.most_batches_per_update])
        self.coordinator = Coordinator(
            self.config,
            self.rank,
            self.world_size,
            self._num_kept,
            self._transport,
            keys_per_update=order.most_batches_per_update * (1 if self.has_transfer_set else self.config.most_parts),
            parting=self._parting,
        )
        atexit.register(self.coordinator.close, PROCESS_ENDED)
        _open.add(self)
        if self._validation is not None:  # of before the checkpoint that training goes on from
            self.tell_validation(self._validation)
        self.coordinator.meet(identity, order, elapsed, self._replicas.layout.num_bytes if self._replicas else 0)

    def parts_of(self, batch: Batch) -> int:
        """In how many parts a loop that can cut its batches should cut this one, for :meth:`begin` of each part."""
        if self.coordinator is None:
            return 1
        self._parting.offer()
        return 1 if self.weight(batch) == 0.0 else self._parting.at(batch.elapsed)

    def is_due(self, batch: Batch | None, like: Tensor) -> bool:
        """Whether anyone teaches a batch. Peers that are not due are answered; either way :attr:`sums` are new.

        Args:
            batch: None for one that is not part of the data order.
            like: a tensor of the device that the sums are to be on.
        """
        weight = 0.0 if batch is None else self.weight(batch)
        self._epoch = self._epoch if batch is None else batch.key[0]
        self.sums = figures.no_sums(
            like,
            weight,
            self._order.batches_per_update(self._epoch),
            1 if batch is None else batch.parts,
            has_teachers=len(self.teachers) > 0,
        )
        if self.coordinator is not None and batch is not None and weight == 0.0:
            self.coordinator.poll(batch.elapsed)
            self._note_lag(batch.elapsed)
        return weight != 0.0 or (batch is not None and len(self.teachers) > 0)

    def step(
        self,
        batch: Batch,
        logits: Tensor,
        rows: Tensor | None = None,
        target: Tensor | None = None,
        smoothing: float = 0.0,
        forward: Callable[[nn.Module], Tensor] | None = None,
    ) -> Distilled | None:
        """Exchange, and distil from what the peers predict: :meth:`begin`, then :meth:`finish`."""
        return self.finish(self.begin(batch, logits, rows, forward, target), logits, rows, target, smoothing)

    def begin(
        self,
        batch: Batch,
        logits: Tensor,
        rows: Tensor | None = None,
        forward: Callable[[nn.Module], Tensor] | None = None,
        target: Tensor | None = None,
    ) -> Pending | None:
        """Send what this model predicts, if anything is due. Does not wait.

        Args:
            batch: at hand.
            logits: (num_positions, num_classes) with gradient.
            rows: (num_rows,) int64, the positions that count; None for all.
            forward: a copy of a peer, or a teacher -> its (num_positions, num_classes) logits, where there are such.
            target: (num_rows,) int64 classes that are part of the fingerprint, which then need not travel; None where
                they are not.

        Returns:
            for :meth:`finish`; None where nothing is due.
        """
        if self._replicas is not None and forward is None:
            raise ConfigError(
                'exchange is "checkpoints", whose copies predict every batch: give loss() or term() '
                "forward=lambda copy: copy(inputs)"
            )
        if not self.is_due(batch, logits):
            return None
        is_exchanged = self.sums["codistill_weight"] != 0.0
        if is_exchanged and not self._has_room(batch, logits.size(0) if rows is None else rows.numel()):
            is_exchanged = False
            if not self.teachers:
                return None
        if is_exchanged and self._replicas is None:
            assert self.coordinator is not None
            self.coordinator.post(self._key(batch), batch.fingerprint, _chosen(logits, rows), target)
        taught = []  # while what was posted travels
        if self.teachers and not batch.is_shared:
            found = self.teachers.predict(forward, rows, batch.samples, logits)
            taught = lessons(self.teachers.weights, found)
        return Pending(batch, self.sums, forward, is_exchanged, taught)

    def is_next_due(self, batch: Batch) -> bool:
        """Whether the predictions of a batch that comes next are to be sent now (``--codistill-lookahead``)."""
        return self.config.codistill_lookahead and self.weight(batch) != 0.0

    def post_ahead(
        self, batch: Batch, logits: Tensor, rows: Tensor | None = None, target: Tensor | None = None
    ) -> None:
        """Send what this model predicts of the batch that comes next, as :meth:`begin` would, which then does not."""
        chosen = _chosen(logits, rows)
        if self.coordinator is not None and self.coordinator.has_room(batch.elapsed, len(chosen)):
            self.coordinator.post(self._key(batch), batch.fingerprint, chosen, target)

    def finish(
        self,
        pending: Pending | None,
        logits: Tensor,
        rows: Tensor | None = None,
        target: Tensor | None = None,
        smoothing: float = 0.0,
    ) -> Distilled | None:
        """Wait for what the peers predict, and distil from it: what every loss of a batch is made of.

        Args:
            pending: what :meth:`begin` gave for this batch, whose ``logits`` and ``rows`` these are.
            target: (num_rows,) int64 classes; None for no supervised loss.
            smoothing: label smoothing, spread over the other classes as fairseq does.

        Returns:
            sums over the rows; None where nothing is due or no peer answered.
        """
        if pending is None:
            return None
        self.sums = pending.sums
        answers = self._answers(pending, rows) if pending.is_exchanged else {}
        total, nll = self._distil(answers, logits, rows, target, smoothing) if answers else (None, None)
        for weight, taught in pending.taught:
            supervised = (target, smoothing) if total is None else (None, 0.0)
            found = chunked_loss(logits, taught, self._divergence, weight, rows, *supervised)
            total, nll = (found.total, found.nll) if total is None else (total + found.total, nll)
            more = weight * found.divergences.mean(), number(found.num_nonfinite, logits)
            for name, value in zip((figures.TEACHER_SUM, "codistill_nonfinite"), more, strict=True):
                self.sums[name] = self.sums[name] + value
        return None if total is None or nll is None else Distilled(total, nll)

    def _has_room(self, batch: Batch, num_rows: int) -> bool:
        """Whether the budget lets a batch that is due be exchanged; if not, it is as if it were not due."""
        assert self.coordinator is not None
        if not self.config.codistill_budget_mbit or self.coordinator.has_room(batch.elapsed, num_rows):
            return True
        self.sums["codistill_weight"] = 0.0
        self.coordinator.poll(batch.elapsed)
        self._note_lag(batch.elapsed)
        return False

    def _answers(self, pending: Pending, rows: Tensor | None) -> dict[int, PeerPredictions]:
        """Model -> what it predicts, of the peers that answered."""
        exchange = self._exchange(pending, rows)
        self.sums.update(
            codistill_skipped=float(exchange.num_skipped),
            codistill_wait_ms=exchange.wait_s * 1e3,
            codistill_mbit=exchange.sent_bytes * 8e-6,
            codistill_exchanges=1.0,
        )
        self._note_lag(pending.batch.elapsed)
        return exchange.predictions

    def _distil(
        self,
        answers: dict[int, PeerPredictions],
        logits: Tensor,
        rows: Tensor | None,
        target: Tensor | None,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """() loss with the peers' term, or the latter alone without a target, and () cross entropy."""
        weight, shares, peers = self.sums["codistill_weight"], None, list(answers.values())
        if self.config.codistill_peer_weights == "validation" and self.coordinator is not None:
            shares = [self.coordinator.peer_weight(model) for model in answers]
        if self.config.codistill_codec == "vote" and len(answers) > 1:  # one peer and this model have no majority
            peers = [elect(_chosen(logits, rows), self.config.codistill_model_index, answers)]
        if target is None:
            found = chunked_loss(logits, peers, self._divergence, rows=rows, peer_weights=shares)
            total = weight * found.total
        else:
            found = chunked_loss(logits, peers, self._divergence, weight, rows, target, smoothing, shares)
            total = found.total
        num_rows = logits.size(0) if rows is None else rows.numel()
        self.sums.update(
            agreement(found, len(answers), len(peers) * num_rows),
            codistill_loss=weight * weighted_mean(found.divergences, shares),
            codistill_nonfinite=number(found.num_nonfinite, logits),
        )
        return total, found.nll

    def compare(
        self,
        key: tuple[int, int, int],
        batch_fingerprint: bytes,
        logits: Tensor,
        rows: Tensor | None = None,
        forward: Callable[[nn.Module], Tensor] | None = None,
        target: Tensor | None = None,
    ) -> figures.Sums:
        """Sums of how far the peers are from this model on a validation batch; empty where it has none.

        Args:
            key: from :func:`~fairseq_codistill.coordinator.validation.validation_key`.
            batch_fingerprint: of the batch.
            logits, rows, forward, target: as for :meth:`begin`, without gradient.
        """
        if self.coordinator is None:
            return {}
        chosen = _chosen(logits, rows)
        if self._replicas is None:
            exchange = self.coordinator.validation.exchange(BatchKey(*key), batch_fingerprint, chosen, target)
            peers: Mapping[int, PeerPredictions] = exchange.predictions
        else:
            assert forward is not None
            peers = self._replicas.predict(lambda replica: _chosen(forward(replica), rows))
        return compared(chosen, list(peers.values()), self._divergence)

    def weight(self, batch: Batch) -> float:
        """α at a batch; 0 where nothing is due."""
        if self.coordinator is None or (self._replicas is None and not self.coordinator.is_due(batch.elapsed)):
            return 0.0  # copies teach every batch
        if self.has_transfer_set and not batch.is_shared:
            return 0.0
        config, epoch = self.config, batch.epoch or batch.key[0]
        start, growth, most = config.codistill_weight, config.codistill_weight_growth, config.codistill_weight_max
        weight = schedules.distill_weight(start, growth, epoch, batch.elapsed, config.codistill_burn_in, most)
        if self._told != (weight, epoch):
            self._told = (weight, epoch)
            logger.info("codistillation: alpha is %.4g in epoch %d", weight, epoch)
        return weight

    def _exchange(self, pending: Pending, rows: Tensor | None) -> Exchange:
        assert self.coordinator is not None
        batch, forward, key = pending.batch, pending.forward, self._key(pending.batch)
        try:
            if self._replicas is None:
                return self.coordinator.collect(key)
            assert forward is not None
            exchange = self.coordinator.ask_replicas(
                key, self._replicas, lambda replica: _chosen(forward(replica), rows)
            )
            self.sums["codistill_staleness"] = float(sum(self._replicas.staleness(batch.elapsed)))
            return exchange
        except AlignmentError as error:
            if not self._advice:
                raise
            raise AlignmentError(f"{error}. {self._advice}") from error

    @property
    def _has_own_order(self) -> bool:
        """Whether the batches of this model are no other's."""
        return self.has_transfer_set or self.config.codistill_own_data

    def _key(self, batch: Batch) -> BatchKey:
        """What the peers call a position."""
        epoch, position, micro_batch = batch.key
        slot = self._parting.slot(micro_batch, batch.part, batch.parts)
        return BatchKey(1, batch.elapsed, slot) if self._has_own_order else BatchKey(epoch, position, slot)

    def _note_lag(self, elapsed: int) -> None:
        """How far the peers are ahead, where it is too far to catch up."""
        behind = self.num_behind(elapsed)
        self.sums.update(codistill_behind=float(behind), codistill_lagging=float(behind > 0))

    def num_behind(self, elapsed: int, within_reach: bool = True) -> int:
        """Updates' worth of batches to skip, see :meth:`Coordinator.num_behind`."""
        return 0 if self.coordinator is None else self.coordinator.num_behind(elapsed, within_reach)

    def poll(self) -> None:
        """Answer peers while this model does something else, such as evaluating, so that none need wait."""
        if self.coordinator is not None:
            self.coordinator.poll()

    def interrupt(self, reason: str) -> None:
        """Wait for no peer any more, neither now nor later: to save when asked to end. A signal handler may call it."""
        if self.coordinator is not None:
            self.coordinator.interrupt(reason)

    def close(self, reason: str = "finished") -> None:
        """Say goodbye, so that no peer waits. May be called twice."""
        if self.coordinator is not None:
            self.coordinator.close(reason)
            atexit.unregister(self.coordinator.close)


def close_all(reason: str) -> None:
    """Say goodbye for every exchange of this process that is still open, where its owner is not at hand."""
    for exchanger in list(_open):
        exchanger.close(reason)


def _chosen(predictions: Tensor, rows: Tensor | None) -> Tensor:
    return predictions.detach() if rows is None else predictions.detach().index_select(0, rows)
