"""Owns codistillation in the Hugging Face trainer: coordinated batches, the term in its loss, figures in its log.

A thin adapter of :class:`~fairseq_codistill.codistiller.Codistiller`: the trainer's loop, optimizer, accumulation,
precision and sharding stay its own, and so does its loss, to which the peers' term is added.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_codistill.codistiller import Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.integrations import transformers_arguments as arguments
from fairseq_codistill.integrations import transformers_data as data
from fairseq_codistill.integrations import transformers_outputs as given_by
from fairseq_codistill.integrations.transformers_checkpoints import newest_checkpoint, read_state
from fairseq_codistill.integrations.transformers_teachers import load_teacher
from fairseq_codistill.ranks import largest_of_all_ranks

try:
    import transformers
    from transformers import Seq2SeqTrainer, Trainer

    from fairseq_codistill.integrations.transformers_moments import Moments
except ImportError as error:
    raise ImportError(
        f"CodistillTrainer needs transformers and accelerate ({error}): pip install 'fairseq-codistill[transformers]'"
    ) from error

_Host: Any = object  # what the mixin stands before: a trainer
logger = logging.getLogger(__name__)
SKIP_CHECK_UPDATES = 10  # ranks of a model ask each other every so many updates


class CodistillMixin(_Host):
    """What :class:`CodistillTrainer` and :class:`CodistillSeq2SeqTrainer` add to the trainer they are made of.

    Args:
        codistill: ``CodistillArguments`` or a validated ``CodistillationConfig``; default: the environment, which
            ``codistill-launch`` sets.
        *args, **kwargs: of the trainer.

    Raises:
        ConfigError: settings that cannot work together; the message names them.
    """

    control: Any
    train_dataset: Any
    data_collator: Any
    peers: Codistiller | None = None  # while it trains: the exchange of this rank
    features: Any = None  # of the training data, once their loader is made
    place: data.Place  # from the meeting on: where in the data an update is

    def __init__(self, *args: Any, codistill: Any = None, **kwargs: Any):
        is_config = isinstance(codistill, CodistillationConfig)
        self.codistill_config = codistill if is_config else (codistill or arguments.CodistillArguments()).config()
        super().__init__(*args, **kwargs)
        arguments.refuse_what_cannot_work(self, self.codistill_config)
        self.add_callback(Moments(self))

    def get_train_dataloader(self) -> Any:
        """The trainer's own loader, its samples numbered and in the order that all models share."""
        dataset, collator = self.train_dataset, self.data_collator
        self.features = self.train_dataset = data.NumberedFeatures(dataset)
        self.data_collator = data.NumberedCollator(collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy == "random" and isinstance(train_dataset, data.NumberedFeatures):
            return data.SharedOrder(train_dataset, self.codistill_config.codistill_data_seed)
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*dict.fromkeys([*self._signature_columns, data.IDS])]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one update, after those that are left out to be where the other models are."""
        if self.state.global_step >= self.state.max_steps:  # started again at its end, which a trainer sees after one
            self.control.should_training_stop = True
            return [], None
        skipped = self._num_to_skip()
        for _ in range(skipped * self.args.gradient_accumulation_steps):
            next(epoch_iterator)
        self._go_on(skipped)
        self._micro_batch = 0
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        if 0 < len(found[0]) < num_batches:  # the trainer, which counts what it made, takes no step with so few
            self._go_on(1)
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)  # perhaps the last
            self.control.should_log &= self.state.global_step > self._globalstep_last_logged  # if there is anything
            return [], None
        return found

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss, and in training alpha * mean over the peers of D, scaled as the loss is."""
        ids, given = inputs.pop(data.IDS, None), dict(inputs)  # it takes the labels out of its own for some losses
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        is_taught = self.codistill_config.is_taught and model.training and torch.is_grad_enabled()
        is_taught = is_taught and self.peers is not None  # batches may be numbered in evaluations as well
        if is_taught and ids is None and self._micro_batch == 0:
            raise ConfigError(arguments.OWN_LOADER)
        if is_taught and ids is not None:  # of a batch whose loss is asked for twice, once
            are_kept = "labels" in given and "labels" not in inputs
            loss = loss + self._term(given, outputs, ids, num_items_in_batch, are_kept)
        return (loss, outputs) if return_outputs else loss

    def _term(self, inputs: dict[str, Any], outputs: Any, ids: list[int], num_items: Any, are_kept: bool) -> Tensor:
        logits = given_by.logits_of(outputs, not are_kept)
        targets, mask = given_by.rows_that_count(inputs, logits, self._loss_shifts_labels)
        position = self.place.position(self.state.global_step) + self._micro_batch
        self._micro_batch += 1
        assert self.peers is not None
        asked = {name: value for name, value in inputs.items() if not (are_kept and name == "labels")}
        of_copy = lambda copy: given_by.logits_of(copy(**asked), not are_kept)  # noqa: E731
        term = self.peers.term(logits, ids, mask, position=position, targets=targets, forward=of_copy)
        return given_by.scaled_as_its_loss(term, self, num_items, given_by.num_rows(inputs, ids, mask))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log; of training with the figures of codistillation, means over the ranks."""
        if "loss" in logs and self.peers is not None and self.codistill_config.is_taught:
            figures = self.peers.figures()
            means = self.accelerator.reduce(torch.tensor([*figures.values()], device=self.args.device), "mean").tolist()
            logs.update(zip(figures, means, strict=True))
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's training; the models meet before its first update, and say goodbye at its end.

        Args:
            resume_from_checkpoint: a folder; or True: the last one in ``output_dir`` that was written to its end, and
                the beginning where there is none yet, so that a command that is started again is the one that was given
                first. Training that is at its end already makes no update.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                logger.info("codistillation: no checkpoint in %s yet: training begins", self.args.output_dir)
        self._resumed, self._is_first = resume_from_checkpoint or "", True
        with Codistiller(self.codistill_config) as self.peers:
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.peers = None

    def meet(self) -> None:
        """Wait for the other models; the trainer has prepared its model, and loaded the checkpoint it goes on from."""
        assert self.peers is not None
        args, num_batches = self.args, len(self.callback_handler.train_dataloader)
        has_copies = self.codistill_config.codistill_exchange == "checkpoints" and self.codistill_config.is_codistilled
        state = read_state(self._resumed, has_copies) if self._resumed else None
        if state is not None:
            self.peers.load_state_dict(state)
        self.place = data.Place(num_batches, args.gradient_accumulation_steps)
        self.peers.meet(
            self.model,
            self.place.order,
            batch_settings=arguments.settings_to_agree_on(args, self.train_dataset, num_batches),
            load_teacher=load_teacher,
            fixed_inputs=data.inputs_are_fixed(self.model, self.data_collator),
            remarks={"transformers version": transformers.__version__},
            seed=args.seed,
            elapsed=self.state.global_step,
            num_updates=self.state.max_steps,
        )

    def _num_to_skip(self) -> int:
        """Updates to leave out, to be where the others are. Ranks of a model ask each other, now and then."""
        done, is_first = self.state.global_step, self._is_first
        if self.peers is None or not (is_first or self.args.world_size == 1 or done % SKIP_CHECK_UPDATES == 0):
            return 0
        behind = largest_of_all_ranks(self.peers.num_behind(done, within_reach=not is_first), self.peers.world_size)
        skipped = min(self.place.room(done, self.features.epoch), behind, self.state.max_steps - done - 1)
        self._is_first = is_first and behind > skipped
        if skipped > 0:
            logger.warning("codistillation: the other models are ahead; skipped %d updates' worth of batches", skipped)
        return max(skipped, 0)

    def _go_on(self, num_updates: int) -> None:
        """Count updates that were not made, so that epochs, schedule and checkpoints are those of the data."""
        self.state.global_step += num_updates
        self._globalstep_last_logged += num_updates  # a mean of losses is over the updates that were made
        self._initial_global_step += num_updates
        for _ in range(0 if hasattr(self.lr_scheduler, "patience") else num_updates):  # that waits for a better figure
            self.lr_scheduler.step()


class CodistillTrainer(CodistillMixin, Trainer):
    """A ``Trainer`` whose model is codistilled; see :class:`CodistillMixin` for its argument ``codistill``."""


class CodistillSeq2SeqTrainer(CodistillMixin, Seq2SeqTrainer):
    """A ``Seq2SeqTrainer`` whose model is codistilled; likewise."""
