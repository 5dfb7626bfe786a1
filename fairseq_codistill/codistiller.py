"""Owns the one interface of every training loop: meet, term or loss, figures, state, close, for one rank of one model.

What fairseq, timm and other frameworks need on top are thin adapters of it. It never touches an optimizer and never
decides what a model is trained on.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_codistill import advice, environment, figures
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.introductions import identity_of
from fairseq_codistill.coordinator.keys import DataOrder, fingerprint
from fairseq_codistill.coordinator.peers import farewell
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.exchanger import Exchanger
from fairseq_codistill.lesson import Batch, Distilled, Pending
from fairseq_codistill.lookahead import unwrapped
from fairseq_codistill.plain_loop import OWN_SAMPLER, Clock, Rows, batch_sampler_of, check_ids, flat, that_count
from fairseq_codistill.ranks import largest_of_all_ranks
from fairseq_codistill.shared_set import Predict, SharedSet, shared_set_of
from fairseq_codistill.split_loop import SplitBatch, forward_backward, look_ahead
from fairseq_codistill.teachers import Given
from fairseq_codistill.untaught import supervised
from fairseq_codistill.wording import NamedAsArguments

__all__ = ["Batch", "Codistiller", "Distilled", "Pending", "supervised"]
logger = logging.getLogger(__name__)
SKIP_CHECK_UPDATES = 10  # ranks of a model agree every so many updates on whether to skip


class Codistiller(Exchanger):
    """One rank of one model among n that teach each other.

    Settings are those of :class:`~fairseq_codistill.config.CodistillationConfig` without ``codistill_``. What is not
    given comes from the environment (``CODISTILL_NUM_MODELS`` ..., which ``codistill-launch`` sets), then from the
    defaults; so ``Codistiller()`` alone trains alone. Make it after ``torch.distributed.init_process_group``, whose
    rank and world size are those inside this model.

    Args:
        config: validated options, in place of settings and environment.
        update_freq: calls of :meth:`loss` or :meth:`term` that make up one update (gradient accumulation).
        rank: inside the model; default: that of torch.distributed, or 0.
        world_size: X, ranks of this model; default: that of torch.distributed, or 1.
        num_kept: exchanges kept for batches that are fed again.
        transport: replaces the one that the settings describe; text is ``--codistill-transport``.
        teachers: modules that never change and predict every batch, each alone or as (module, weight); alone with them
            (``num_models`` 1) it is ordinary distillation. They are put in eval mode, and compute where they are.
        **settings: ``num_models=2, codec="tokens:16", divergence="kl"`` and so on.

    Attributes:
        has_met: whether :meth:`meet` was called.

    Raises:
        ConfigError: a setting that cannot work; the message names it.

    >>> import torch
    >>> with Codistiller(num_models=1) as peers:
    ...     peers.meet(torch.nn.Linear(2, 3), 10)
    ...     loss = peers.loss(torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]), ids=range(4))
    >>> round(float(loss.detach()), 4), peers.figures()["codistill_peers"]
    (1.0986, 0.0)
    """

    def __init__(
        self,
        config: CodistillationConfig | None = None,
        *,
        update_freq: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
        num_kept: int = 1,
        transport: Transport | str | None = None,
        teachers: Iterable[Given] = (),
        **settings: Any,
    ):
        if isinstance(transport, str):  # the option of that name
            settings["transport"], transport = transport, None
        self._speaks_python = config is None
        if config is not None and settings:
            raise ConfigError(f"a config was given, so {', '.join(settings)} must be set in it")
        with self._named_as_arguments():
            config = environment.config_from_environment(settings) if config is None else config
            super().__init__(config, rank, world_size, num_kept, transport, teachers)
        self._clock, self._unused = Clock(update_freq), advice.Unused(config)
        self.has_met, self._num_rows = False, 0.0
        self._total: figures.Sums = {}
        self._shared: SharedSet | None = None

    def __enter__(self) -> "Codistiller":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(farewell(error, None if self.coordinator is None else self.coordinator.interruption))

    # -- meeting -------------------------------------------------------------------------------------------------------

    def meet(
        self,
        model: nn.Module,
        batches: Any = None,
        *,
        settings: Mapping[str, Any] | None = None,
        batch_settings: Mapping[str, Any] | None = None,
        remarks: Mapping[str, Any] | None = None,
        seed: int | None = None,
        elapsed: int | None = None,
        num_updates: int | None = None,
        load_teacher: Callable[[str], nn.Module] | None = None,
        transfer: Any = None,
        fixed_inputs: bool = False,
    ) -> None:
        """Wait for the other models, and refuse those that do not fit; once, when the parameters are at their start.

        A model that comes back to a run in progress moves :class:`~fairseq_codistill.sampling.CoordinatedBatches` on to
        where the others are.

        Args:
            model: on its device, with or without a wrapper for data-parallel training.
            batches: a ``CoordinatedBatches``, a loader that has one as ``batch_sampler`` (any, of data of one's own),
                or the number of batches of one rank in an epoch, where the loop takes care that all models see the
                same; None: an endless epoch. A loop that names its batches itself gives a ``DataOrder``.
            settings: what else must be equal on all models, whatever they train on; name -> JSON value.
            batch_settings: likewise, of the batches.
            remarks: likewise, listed where batches do not align, but free to differ.
            seed: of this model's own initialisation; default: that of torch.
            elapsed: updates' worth of batches since the start of training; the first batch is the one
                after them; default: as counted, from :meth:`load_state_dict` on.
            num_updates: of the whole run, for a warning where the settings leave next to nothing to exchange in it.
            load_teacher: reads the checkpoint of a teacher that the settings name.
            transfer: a loader (with ``CoordinatedBatches``) whose batches are exchanged in place of those that are
                trained on, which may then differ; or, of a loop that looks after it itself, what must be equal of it.
            fixed_inputs: the inputs of a sample are the same in every pass, as ``teacher_cache`` needs it.

        Raises:
            ConfigError: a peer runs with other settings, or holds the same parameters; or a loader shuffles by itself.
        """
        if self.has_met:
            raise RuntimeError("meet() was called before; a Codistiller meets its peers once")
        model = unwrapped(model)
        self.has_transfer_set = transfer is not None and self.config.is_codistilled
        is_own = transfer is not None or self._has_own_order  # alone as well, where nothing of it is exchanged
        sampler = batch_sampler_of(batches, (self.rank, self.world_size), is_own, not self.config.is_codistilled)
        if sampler is None and not is_own and not isinstance(batches, (int, DataOrder, type(None))):
            self._advice = OWN_SAMPLER
        self._clock.begin(batches, sampler, is_own, elapsed)
        self.has_met = True
        self._order = self._clock.order
        with self._named_as_arguments():
            ranks, per_update = (self.rank, self.world_size), self._clock.batches_per_update(1)
            self._shared = shared_set_of(transfer, self.config, per_update, ranks)
            if self.teachers:
                self.teachers.prepare(model, load_teacher, settings or {}, fixed_inputs)
        if not self.config.is_codistilled:
            logger.info("codistillation: this model trains alone (num_models is 1), %d teachers", len(self.teachers))
            return
        identity = identity_of(
            model,
            self._settings(settings or {}, batch_settings or {}, transfer),
            dict(remarks or {}),
            torch.initial_seed() if seed is None else int(seed),
            num_updates,
        )
        with self._named_as_arguments():
            self.introduce(model, identity, self._order, self._clock.elapsed if elapsed is None else int(elapsed))
        if sampler is not None:
            self._skip(within_reach=False)

    # -- a batch -------------------------------------------------------------------------------------------------------

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        ids: Any,
        mask: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        position: int | None = None,
        again: bool = False,
        forward: Callable[[nn.Module], Tensor] | None = None,
        transfer: Predict | None = None,
    ) -> Tensor:
        """Cross entropy + α · mean over the peers of D, and its gradient, in one pass over the logits.

        Args:
            logits: (batch, ..., num_classes) of this model, with gradient, any float dtype. The classes come last.
            targets: (batch, ...) int64 classes; left on the CPU, as mask and ids, nothing of a step waits for a device.
            ids: (batch,) whole numbers that name the samples, the same on all models.
            mask: (batch, ...) bool, or numbers of which those count that are not 0, such as 1 where no padding is;
                default: all.
            ignore_index: target of an entry that does not count, whatever the mask says.
            label_smoothing: as that of ``torch.nn.functional.cross_entropy``.
            position: batches before this one since the start of training; default: as many as were asked for.
            again: this position was asked for before, and is fed again (after an overflow, say).
            forward: with ``exchange="checkpoints"`` and with teachers: a copy of a peer, or a teacher -> its logits for
                this batch, shaped like ours.
            transfer: with a transfer set: a batch of its loader -> (logits, ids) or (logits, ids, mask) of this model.
                Given at every call; the peers' predictions are learned at every T-th update, the mean over its rows.

        Returns:
            () float32 (float64 where the logits are), the mean over the entries that count.

        Raises:
            RuntimeError: before :meth:`meet`, without gradient, or twice for one position.
            ValueError: shapes that do not belong together, or ids that are no whole numbers.
            AlignmentError: several batches in a row differed from those of a peer.
        """
        rows = Rows.of(logits, targets, that_count(mask, targets, ignore_index))
        batch = self._at(logits, ids, rows, position, again)
        smoothing = rows.smoothing(label_smoothing)
        found = self.step(batch, rows.logits, rows.index, rows.targets, smoothing, flat(forward))
        found = found or supervised(rows.logits, rows.index, rows.targets, smoothing)
        return self._done(found.total, rows, batch, transfer)

    def term(
        self,
        logits: Tensor,
        ids: Any,
        mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        ignore_index: int = -100,
        position: int | None = None,
        again: bool = False,
        forward: Callable[[nn.Module], Tensor] | None = None,
        transfer: Predict | None = None,
    ) -> Tensor:
        """α · mean over the peers of D alone, to add to a loss of one's own; 0 where nothing is exchanged.

        Arguments, errors and the mean are those of :meth:`loss`; the batch is recognised by its ids and where the mask
        is, or by ``targets`` where they are given: then those of ``ignore_index`` do not count.
        """
        rows = Rows.of(logits, targets, mask if targets is None else that_count(mask, targets, ignore_index))
        batch = self._at(logits, ids, rows, position, again)
        known = None if targets is None else rows.targets
        found = self.finish(self.begin(batch, rows.logits, rows.index, flat(forward), known), rows.logits, rows.index)
        total = rows.logits[:0].sum(dtype=torch.float32) if found is None else found.total
        return self._done(total, rows, batch, transfer)

    # -- a loop of one's own: the clock, the figures -------------------------------------------------------------------

    def forward_backward(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Tensor,
        ids: Any,
        mask: Tensor | None = None,
        *,
        call: Callable[[nn.Module, Any], Tensor] = lambda model, inputs: model(inputs),
        backward: Callable[[Tensor], None] = lambda loss: loss.backward(),
        scaled: Callable[[Tensor], Tensor] | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        following: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """``loss(model(inputs), targets, ids).backward()`` in ``parts``, so that no step waits for the wire.

        The gradient of each part is computed while the predictions of the next one travel; added up they are those of
        the whole batch. With ``parts`` 1, with checkpoints and where nothing is due, the batch stays whole; with
        ``auto``, the default, it is cut where that makes steps shorter, by all models at the same position. Batch
        normalisation sees the parts, not the batch, so ``auto`` leaves a model that has it at one.

        Args:
            model: as it is called, with its wrapper for data-parallel training, if any.
            inputs: a tensor whose first dimension is the batch, or a tuple, list or mapping of such; others stay whole.
            targets, ids, mask, ignore_index, label_smoothing: as for :meth:`loss`.
            call: (model, inputs) -> (batch, ..., num_classes) logits.
            backward: of a loss; with a loss scale ``lambda loss: scaler.scale(loss).backward()``.
            scaled: that scale alone, ``scaler.scale``, for parts whose gradients DistributedDataParallel must not see;
                default: ``backward`` is called with a number of its own to learn it.
            following: (inputs, targets, ids[, mask]) of the batch that comes next, for :meth:`look_ahead`.

        Returns:
            () the loss of the batch, detached.

        Raises:
            RuntimeError: before :meth:`meet`, or with a transfer set, which is for :meth:`loss` and :meth:`term`.
        """
        self._check_met("forward_backward")
        if self._shared is not None:
            raise RuntimeError("a transfer set was given to meet(): call loss(..., transfer=...) and its backward()")
        given = SplitBatch(inputs, targets, ids, mask, call, ignore_index, label_smoothing)
        look = functools.partial(self.look_ahead, model, call=call, ignore_index=ignore_index)
        ahead = None if following is None else functools.partial(look, *following)
        at = self._clock.tick(None, False)
        return forward_backward(self, model, given, at, backward, scaled, self._add_up, ahead)

    def look_ahead(
        self,
        model: nn.Module,
        inputs: Any,
        targets: Tensor,
        ids: Any,
        mask: Tensor | None = None,
        *,
        call: Callable[[nn.Module, Any], Tensor] = lambda model, inputs: model(inputs),
        ignore_index: int = -100,
    ) -> bool:
        """With ``lookahead``: send what this model predicts of the batch that comes next, where it is due.

        Call it after :meth:`loss` or :meth:`term` of the batch at hand and before its ``backward``, during which it
        travels; :func:`~fairseq_codistill.with_next` gives batches in pairs. The first one is sent when it is due.

        Args:
            model: as it is called; buffers and random numbers are left as they were.
            inputs, targets, ids, mask, ignore_index: of the next batch, whose loss or term must have the same.
            call: (model, inputs) -> (batch, ..., num_classes) logits.

        Returns:
            whether anything was sent.
        """
        self._check_met("look_ahead")
        return look_ahead(self, model, SplitBatch(inputs, targets, ids, mask, call, ignore_index), self._clock.next())

    def _at(self, logits: Tensor, ids: Any, rows: Rows, position: int | None, again: bool) -> Batch:
        self._check_met("loss() or term")
        if not torch.is_grad_enabled():
            raise RuntimeError("gradients are off: loss() and term() are for training; evaluate with another loss")
        sample_ids = check_ids(ids, logits.size(0))
        key, elapsed = self._clock.tick(position, again)
        mark = fingerprint(sample_ids, rows.known_by) if self.coordinator is not None else b""
        samples = rows.samples(sample_ids) if self.teachers.has_cache else None
        return Batch(key, elapsed, mark, samples=samples)

    def _check_met(self, method: str) -> None:
        self._unused.discard(method)
        if not self.has_met:
            raise RuntimeError(f"call meet(model, batches) before {method}()")

    def _settings(self, settings: Mapping[str, Any], of_batches: Mapping[str, Any], transfer: Any) -> dict[str, Any]:
        if not self._has_own_order:
            return {**self._clock.settings(), **of_batches, **settings}
        return {**((transfer or {}) if self._shared is None else self._shared.settings()), **settings}

    def _done(self, total: Tensor, rows: Rows, batch: Batch, transfer: Predict | None) -> Tensor:
        term = None if self._shared is None else self._shared.learn(self, batch, rows.num_rows, transfer)
        self._add_up(rows.num_rows)
        loss = total / max(rows.num_rows, 1)
        return loss if term is None else loss + term

    def _add_up(self, num_rows: int) -> None:
        self._unused.after_a_batch()
        for name, value in self.sums.items():
            self._total[name] = self._total[name] + value if name in self._total else value
        self._num_rows += num_rows

    def figures(self) -> dict[str, float]:
        """Means since the last call (sums of skipped and nonfinite), named as in the log; waits for an accelerator."""
        total, num_rows, self._total, self._num_rows = self._total, self._num_rows, {}, 0.0
        found = figures.means(lambda name: float(total.get(name, 0.0)), num_rows, has_teachers=bool(self.teachers))
        return {name: mean.value for name, mean in found.items()}

    def skip(self, now: bool = False) -> int:
        """How many batches to leave out, to be where the others are; 0 nearly always. Ask between two batches.

        The clock goes on by that many, and so do ``CoordinatedBatches``: begin a new iteration over the loader, which
        goes on there. With batches of one's own, leave that many out; in the middle of an update it is 0. Ranks of a
        model ask each other at every tenth update, or ``now``, so all of them must call it at the same points.
        """
        (_, _, micro_batch), elapsed = self._clock.next()
        is_time = now or self.world_size == 1 or elapsed % SKIP_CHECK_UPDATES == 0
        return self._skip(within_reach=True) if self.coordinator is not None and is_time and not micro_batch else 0

    def _skip(self, within_reach: bool) -> int:
        behind = largest_of_all_ranks(self.num_behind(self._clock.elapsed, within_reach), self.world_size)
        before = self._clock.count
        if behind:
            self._clock.move_by(behind)
            logger.warning(
                "codistillation: the other models are ahead; skipped %d batches, to batch %d since the start",
                self._clock.count - before,
                self._clock.count,
            )
        return self._clock.count - before

    # -- the run -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For this model's checkpoint: clock, settings, and the copies of the peers where checkpoints are exchanged."""
        return {**self._clock.state(), "replicas": self.replicas_state(), "settings": self.settings_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` gave; before :meth:`meet`. Warns of settings that are others now."""
        if self.has_met:
            raise RuntimeError("load_state_dict() comes before meet(): the others are told where this model is")
        with self._named_as_arguments():
            self.compare_settings(state.get("settings", {}))
        self._clock.go_on_from(state)
        self.load_replicas_state(state["replicas"])

    def _named_as_arguments(self) -> NamedAsArguments:
        return NamedAsArguments(self._speaks_python)
