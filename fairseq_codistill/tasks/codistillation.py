"""Owns the task wrapper: shared batches, own initialisation and dropout, a key for every batch.

Importing this module registers the criterion and, for every fairseq task that trains in the common way, a task
``codistill_<name>``, also for those that are registered later. The wrapper changes what batches a model sees, never
how it is trained on them.
"""

import hashlib
import logging
import sys
from typing import Any

import fairseq
from fairseq.data.iterators import EpochBatchIterator
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, FairseqTask, register_task

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.keys import BatchKey, DataOrder
from fairseq_codistill.coordinator.validation import validation_key
from fairseq_codistill.criterion import CodistillationCriterion
from fairseq_codistill.fairseq_side import compat, processes, stopping
from fairseq_codistill.fairseq_side.batches import SharedBatches, log_skipped
from fairseq_codistill.fairseq_side.parts import cut, refuse_unused_parameters, split_train_step
from fairseq_codistill.fairseq_side.registration import tell_of_every_task
from fairseq_codistill.fairseq_side.saving import write_whole_checkpoints
from fairseq_codistill.fairseq_side.shareable import of_whole_passes, refuse_what_differs
from fairseq_codistill.fairseq_side.stock_checkpoint import PREFIX, write_stock_checkpoints
from fairseq_codistill.fairseq_side.teacher_checkpoints import load_teacher, unchanged
from fairseq_codistill.fairseq_side.transfer import AHEAD, SHARED, TAG, TransferBatches
from fairseq_codistill.fairseq_side.validated import Validated, tell_validated
from fairseq_codistill.ranks import largest_of_all_ranks, rank_and_world_size

logger = logging.getLogger(__name__)


class CodistillationTaskMixin:
    """Put in front of a fairseq task, it makes the task's batches the same on all models.

    The options come with the criterion ``codistillation``, which fairseq builds right after the task.
    """

    stock_name: str
    _criterion: CodistillationCriterion | None = None
    _seed_offset = 0
    _model: Any = None
    _batches: SharedBatches | None = None
    _transfer: TransferBatches | None = None
    saved_replicas: dict | None = None  # of the checkpoint that training goes on from
    _stopping: stopping.Stopping | None = None
    _is_validating = False
    _validated: Validated = []  # of the last validation, until the peers are told
    _num_validated = 0  # batches of the validation under way, before the one at hand

    def begin_training(self, trainer: Any) -> None:
        """Before the first batch: from now on a signal saves what was trained."""
        if self._criterion is not None and self._criterion.config.is_codistilled:
            self._stopping = stopping.Stopping(self._interrupt)
            self._stopping.trainer = trainer
            self._criterion.on_failure = self._stopping.fail
            refuse_unused_parameters(self._criterion.config, trainer)

    def _interrupt(self, reason: str) -> None:
        """From a signal handler: end a wait for the other models."""
        coordinator = None if self._criterion is None else self._criterion.peers.coordinator
        if coordinator is not None and hasattr(coordinator, "interrupt"):
            coordinator.interrupt(reason)

    def _after_update(self) -> None:
        if self._stopping is not None and self._batches is not None and self._criterion is not None:
            self._stopping.leave_if_asked(self._batches.iterator, self._criterion.peers.close)

    def build_model(self, *args: Any, **kwargs: Any) -> Any:
        """fairseq's own, remembered: the models meet before fairseq hands it to the task again."""
        self._model = super().build_model(*args, **kwargs)  # type: ignore[misc]
        return self._model

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any) -> CodistillationCriterion:
        """Build the criterion and take the shared data seed from it.

        Raises:
            ConfigError: another criterion was asked for, or its options cannot work.
        """
        criterion = super().build_criterion(cfg, *args, **kwargs)  # type: ignore[misc]
        if not isinstance(criterion, CodistillationCriterion):
            raise ConfigError(
                f"--task {PREFIX}{self.stock_name} needs --criterion codistillation (found "
                f"{type(criterion).__name__}); to train with another criterion use --task {self.stock_name}"
            )
        config = criterion.config
        compat.check_world(rank_and_world_size()[1])
        self._criterion = criterion
        # One model alone goes through the data as those do that it is compared with.
        self._seed_offset = config.codistill_data_seed - config.seed
        # Tasks that draw data themselves (random crops, sampled corpora) do so from a seed of their own.
        for settings in (getattr(self, "cfg", None), getattr(self, "args", None)):
            if settings is not None and getattr(settings, "seed", None) is not None:
                settings.seed = config.codistill_data_seed
        return criterion

    def get_batch_iterator(
        self, dataset: Any, *args: Any, seed: int = 1, epoch: int = 1, **kwargs: Any
    ) -> EpochBatchIterator:
        """The task's own iterator, in the order of the shared data seed, with every training batch marked.

        fairseq groups sentences into batches when it makes an iterator, with a seed that depends on the epoch at
        which that happens. A model that resumes would have other batches than those that never stopped, so an
        iterator that serves all epochs is always made as that of the first.
        """
        seed += self._seed_offset
        make = super().get_batch_iterator  # type: ignore[misc]
        if self._criterion is None or not self._criterion.config.is_taught:
            return make(dataset, *args, seed=seed, epoch=epoch, **kwargs)
        config = self._criterion.config
        is_trained_on = dataset is self.datasets.get(config.train_subset)  # type: ignore[attr-defined]
        serves_all_epochs = (
            self.can_reuse_epoch_itr(dataset)  # type: ignore[attr-defined]
            and not kwargs.get("disable_iterator_cache")
            and not kwargs.get("update_epoch_batch_itr")
        )
        if serves_all_epochs and is_trained_on and config.update_ordered_indices_seed:
            seed -= epoch - 1  # which fairseq has added
        is_new = dataset not in self.dataset_to_epoch_iter  # type: ignore[attr-defined]
        iterator = make(dataset, *args, seed=seed, epoch=1 if serves_all_epochs else epoch, **kwargs)
        compat.make_loaders_anew(iterator)
        if not is_trained_on:
            return iterator
        if config.codistill_transfer and self._transfer is None:
            self._transfer = self._transfer_batches(make, *args, **kwargs)
        if serves_all_epochs and is_new and type(iterator) is EpochBatchIterator:
            iterator.epoch = max(epoch, 1)
            dataset.set_epoch(iterator.epoch)  # a resumed one starts its workers before its epoch begins
        return self.coordinated_iterator(iterator, config.update_freq, serves_all_epochs)

    def _transfer_batches(self, make: Any, *args: Any, **kwargs: Any) -> TransferBatches:
        """The transfer set, in the order of the data seed, with batches as large as those that are trained on.

        Raises:
            ConfigError: there is no such split, or it is what is trained on.
        """
        assert self._criterion is not None
        config = self._criterion.config
        flag = f"--codistill-transfer is {config.codistill_transfer!r}"
        if config.codistill_transfer in config.train_subset.split(","):
            raise ConfigError(f"{flag}, which is --train-subset; give a split that all models have beside their own")
        if len(set(config.update_freq)) > 1:
            raise ConfigError(
                f"{flag} with --update-freq {config.update_freq}: give one that is the same in all epochs"
            )
        try:
            self.load_dataset(config.codistill_transfer, combine=False, epoch=1)  # type: ignore[attr-defined]
            dataset = self.datasets[config.codistill_transfer]  # type: ignore[attr-defined]
            iterator = make(dataset, *args, seed=config.codistill_data_seed, epoch=1, **of_whole_passes(kwargs))
            compat.make_loaders_anew(iterator)
        except (FileNotFoundError, KeyError) as error:
            raise ConfigError(
                f"{flag}, a split that the data folder does not have ({error}); prepare it with the dictionaries of all"
            ) from error
        pad = self.target_dictionary.pad()  # type: ignore[attr-defined]
        return TransferBatches(iterator, config.codistill_interval, config.update_freq[0], pad)

    def coordinated_iterator(
        self, iterator: EpochBatchIterator, update_freq: list[int], serves_all_epochs: bool = True
    ) -> EpochBatchIterator:
        """Mark the training batches of ``iterator``; only one that serves all epochs can be moved to another one.

        Raises:
            ConfigError: it is not an iterator whose order can be shared.
        """
        if type(iterator) is not EpochBatchIterator:
            raise ConfigError(
                f"--task {PREFIX}{self.stock_name}: its batches come from a {type(iterator).__name__}, whose order "
                "cannot be shared between models; such a task cannot be codistilled"
            )
        assert self._criterion is not None
        self._batches = SharedBatches.of(iterator) or SharedBatches(
            iterator,
            DataOrder(len(iterator), update_freq),
            self.target_dictionary.pad(),  # type: ignore[attr-defined]
            self._criterion.config.curriculum,
            self._before_epoch,
            serves_all_epochs,
            self._after_update,
            self._criterion.config.most_parts > 1,
            self._criterion.ignore_prefix_size if self._criterion.peers.teachers.has_cache else None,
            self._transfer,
            self._criterion.config.codistill_lookahead,
        )
        refuse_what_differs(self._criterion.config, serves_all_epochs, iterator.dataset)
        self._follow(self._batches)
        return iterator

    def _follow(self, batches: SharedBatches) -> None:
        """Count positions by the epoch that begins, where epochs differ in length."""
        if not batches.serves_all_epochs and (coordinator := self._criterion.peers.coordinator):  # type: ignore
            coordinator.follow(batches.order)

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """fairseq's own, and the epoch for the schedules."""
        super().begin_epoch(epoch, model)  # type: ignore[misc]
        if self._criterion is not None:
            self._criterion.epoch = epoch

    def _before_epoch(self, batches: SharedBatches) -> None:
        """Meet the other models, at the first moment when the parameters are final, and go where they are."""
        assert self._criterion is not None
        peers = self._criterion.peers
        just_met = not peers.has_met
        if just_met:
            if self._stopping is not None:
                self._stopping.install()
            self._meet(self._model, batches)
        mine = batches.elapsed
        furthest = largest_of_all_ranks(mine + peers.num_behind(mine, within_reach=not just_met), peers.world_size)
        if furthest == mine:
            return
        here, there = batches.order.key(mine), batches.order.key(furthest)
        reason = None
        if 0 < self._criterion.config.max_epoch < there.epoch:
            reason = f"that is past --max-epoch {self._criterion.config.max_epoch}"
        elif not batches.serves_all_epochs and there.epoch != here.epoch:
            reason = "the batches of this task are made anew for every epoch"
        if reason is not None:
            logger.warning("codistillation: the others are at %s, not followed from %s: %s", there, here, reason)
            return
        batches.move_to(furthest)
        log_skipped(furthest - mine, here, there)

    def reduce_metrics(self, logging_outputs: list[dict], criterion: Any) -> None:
        """fairseq's own; then, between two updates, skip ahead if the other models are too far away to catch up.

        The figures are sums over all ranks, the same on each of them, so that all skip the same batches; where they are
        not (``--use-bmuf``), a model goes where the others are at the beginning of an epoch only.
        """
        super().reduce_metrics(logging_outputs, criterion)  # type: ignore[misc]
        if self._stopping is not None and self._stopping.agree(logging_outputs) and self._is_validating:
            self._after_update()
        lagging = sum(float(log.get("codistill_lagging", 0)) for log in logging_outputs)
        if self._batches is None or self._criterion is None or not lagging:
            return
        if self._criterion.config.use_bmuf and rank_and_world_size()[1] > 1:  # whose ranks sum at some updates only
            return
        behind = int(sum(float(log.get("codistill_behind", 0)) for log in logging_outputs) / lagging)
        here = self._batches.order.key(self._batches.elapsed)
        skipped = self._batches.skip(behind - 1)  # the update that has just been made is one of them
        log_skipped(skipped, here, self._batches.order.key(self._batches.elapsed))

    def train_step(
        self,
        sample: dict,
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> tuple:
        """fairseq's own step. A dummy batch (``ignore_grad``) loses its mark: it is nobody's data position."""
        if self._criterion is not None:
            self._criterion.num_updates = update_num
            self._validated = tell_validated(self._criterion.peers.tell_validation, self._validated)
        if ignore_grad and (TAG in sample or AHEAD in sample):
            sample = {name: value for name, value in sample.items() if name not in (TAG, SHARED, AHEAD)}
        self._is_validating = False
        if self._stopping is not None:
            self._stopping.begin()
        parts = [sample]
        if "tokens" in sample.get(TAG, {}) and (num_parts := criterion.parts_of(sample, model)) > 1:
            parts = cut(sample, num_parts, TAG)
        if len(parts) > 1:
            model.train()
            model.set_num_updates(update_num)
            loss, sample_size, logging_output = split_train_step(parts, model, criterion, optimizer)
        else:
            loss, sample_size, logging_output = super().train_step(  # type: ignore[misc]
                sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
            )
        return loss, sample_size, self._with_request(logging_output)

    def valid_step(self, sample: dict, model: Any, criterion: Any, *args: Any, **kwargs: Any) -> tuple:
        """fairseq's own step; with ``--codistill-validate-agreement`` its batch is compared with the peers."""
        if self._criterion is not None:
            self._criterion.unless_failed(self._criterion.peers.poll)  # so that no peer waits meanwhile
        self._num_validated = self._num_validated + 1 if self._is_validating else 0
        self._is_validating = True
        criterion.validation_key = self._validation_key()
        try:
            loss, sample_size, logging_output = super().valid_step(  # type: ignore[misc]
                sample, model, criterion, *args, **kwargs
            )
        finally:
            criterion.validation_key = None
        found = (logging_output.get("nll_loss", loss), logging_output.get("ntokens", sample_size))
        self._validated = [*self._validated, found]
        return loss, sample_size, self._with_request(logging_output)

    def _validation_key(self) -> BatchKey | None:
        if self._criterion is None or not self._criterion.config.codistill_validate_agreement or not self._batches:
            return None
        return validation_key(self._batches.order.key(max(self._batches.elapsed - 1, 0)), self._num_validated)

    def _with_request(self, logging_output: dict) -> dict:
        return logging_output if self._stopping is None else {**logging_output, **self._stopping.request}

    def _num_updates(self, batches: SharedBatches) -> int | None:
        """Of the whole run, as far as the options say."""
        assert self._criterion is not None
        config = self._criterion.config
        by_epochs = batches.order.elapsed(config.max_epoch + 1, 0) if config.max_epoch > 0 else 0
        return min((length for length in (config.max_update, by_epochs) if length > 0), default=None)

    def _meet(self, model: Any, batches: SharedBatches) -> None:
        assert self._criterion is not None
        config = self._criterion.config
        if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
            raise ConfigError(
                "--adaptive-softmax-cutoff is set: an adaptive softmax has no logits of the whole vocabulary to "
                "compare with a peer's; leave the option out to codistil"
            )
        sizes = {
            "--max-tokens": config.max_tokens,
            "--batch-size": config.batch_size,
            "--required-batch-size-multiple": config.required_batch_size_multiple,
            "--update-freq": list(config.update_freq),
        }
        shared = None
        if self._transfer is not None:
            of_set = {"batches of the transfer set": self._transfer.num_batches}
            shared = {"--codistill-transfer": config.codistill_transfer, **of_set, **sizes}
        symbols = self.target_dictionary.symbols  # type: ignore[attr-defined]
        digest = hashlib.blake2b("\n".join(symbols).encode(), digest_size=6).hexdigest()
        self._criterion.peers.load_replicas_state(self.saved_replicas)
        self._criterion.peers.meet(
            model,
            batches.order,
            settings={"--task": self.stock_name, "target dictionary": f"{len(symbols)} symbols, digest {digest}"},
            batch_settings={
                **sizes,
                "--curriculum": config.curriculum,
                # where they are made anew for every epoch, that of another epoch has another number
                **({"batches per epoch": batches.order.num_batches} if batches.serves_all_epochs else {}),
                # named where it is on: a host that knows no such exchange fits the others
                **({"--codistill-validate-agreement": True} if config.codistill_validate_agreement else {}),
                **({"--update-ordered-indices-seed": True} if config.update_ordered_indices_seed else {}),
            },
            remarks={"fairseq version": getattr(fairseq, "__version__", "unknown")},
            seed=config.seed,
            elapsed=batches.elapsed,
            num_updates=self._num_updates(batches),
            transfer=shared,
            load_teacher=lambda file: load_teacher(file, self, self._build_other),
            fixed_inputs=True,  # or rather: a sample is known by its source as well
        )
        self._follow(batches)

    def _build_other(self, cfg: Any) -> Any:
        """A model that is not the one that is trained: what a task keeps of the model it builds stays that of ours."""
        with unchanged(self):
            return super().build_model(cfg)  # type: ignore[misc]

    def settings_state(self) -> dict:
        """For the checkpoint: settings that a run should not change on its way without a word."""
        return {} if self._criterion is None else self._criterion.peers.settings_state()

    def compare_settings(self, before: dict) -> None:
        """Warn of those that differ from the checkpoint's; one log for all ranks."""
        if self._criterion is not None and rank_and_world_size()[0] == 0:
            self._criterion.peers.compare_settings(before)

    def replicas_state(self) -> dict | None:
        """For the checkpoint: the peers' copies, or what was read of them from the last one."""
        if self._criterion is None or not self._criterion.peers.has_met:
            return self.saved_replicas
        if self._stopping is None or not self._stopping.is_leaving:  # perhaps in the middle of a validation
            self._validated = tell_validated(self._criterion.peers.tell_validation, self._validated)
        return self._criterion.peers.replicas_state() or None


def distributed_main(*args: Any) -> None:
    """Stands in for fairseq's. It lies here because a spawned rank imports this module to find it, and so has the
    tasks: fairseq does not import those of a package that is there already.
    """
    processes.run_rank(*args)


def _register_wrapper(name: str) -> None:
    task = TASK_REGISTRY[name]
    # A task with its own train_step may feed the model something else than the batch that is marked.
    if name.startswith(PREFIX) or PREFIX + name in TASK_REGISTRY or task.train_step is not FairseqTask.train_step:
        return
    wrapper = type(f"Codistill{task.__name__}", (CodistillationTaskMixin, task), {"stock_name": name})
    register_task(PREFIX + name, dataclass=TASK_DATACLASS_REGISTRY.get(name))(wrapper)


processes.check_command_line(sys.argv)
compat.apply()
processes.apply(distributed_main)
write_stock_checkpoints()
write_whole_checkpoints()
tell_of_every_task(_register_wrapper, register_task)
