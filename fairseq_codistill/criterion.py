"""Owns the criterion ``codistillation``: fairseq's label-smoothed cross entropy plus α · divergence from the peers.

A thin adapter: what fairseq calls a batch, a target and a log becomes what :class:`Codistiller` calls them. It must
stay fairseq's own criterion, bit for bit, for a model that nobody teaches (alone, or with α = 0).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, List, Optional  # noqa: UP035

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel, FairseqDecoder
from fairseq.models.transformer import TransformerModelBase
from omegaconf import II
from torch import Tensor

from fairseq_codistill import figures, schedules
from fairseq_codistill.codistiller import Batch, Codistiller, Pending, supervised
from fairseq_codistill.config import (
    CodistillationConfig,
    ConfigError,
    FairseqConfig,
    LabelSmoothingConfig,
    flag_name,
)
from fairseq_codistill.coordinator.coordinator import AlignmentError, NoPeersError
from fairseq_codistill.coordinator.keys import BatchKey, SampleMarks, fingerprint
from fairseq_codistill.environment import refuse_to_be_alone
from fairseq_codistill.fairseq_side.transfer import AHEAD, SHARED, TAG
from fairseq_codistill.lookahead import undisturbed
from fairseq_codistill.option import JoinedAction
from fairseq_codistill.sources import TeacherConfig
from fairseq_codistill.split_step import takes_parts


@dataclasses.dataclass
class CodistillationCriterionConfig(
    CodistillationConfig, FairseqConfig, LabelSmoothingConfig, LabelSmoothedCrossEntropyCriterionConfig
):
    """All options, and the settings of the job that the models must have in common."""

    # omegaconf 2.0, which fairseq 0.12.2 brings, reads neither list[int] nor int | None.
    seed: int = II("common.seed")
    amp: bool = II("common.amp")
    update_freq: List[int] = II("optimization.update_freq")  # noqa: UP006
    max_tokens: Optional[int] = II("dataset.max_tokens")  # noqa: UP045
    batch_size: Optional[int] = II("dataset.batch_size")  # noqa: UP045
    required_batch_size_multiple: int = II("dataset.required_batch_size_multiple")
    train_subset: str = II("dataset.train_subset")
    curriculum: int = II("dataset.curriculum")
    update_ordered_indices_seed: bool = II("dataset.update_ordered_indices_seed")
    use_bmuf: bool = II("optimization.use_bmuf")
    max_epoch: int = II("optimization.max_epoch")
    max_update: int = II("optimization.max_update")

    def validate(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        CodistillationConfig.validate(self)
        LabelSmoothingConfig.validate(self)
        if self.codistill_validate_agreement and self.codistill_transfer:
            raise ConfigError(
                f"--codistill-validate-agreement is set with --codistill-transfer {self.codistill_transfer}: of data "
                "that differ between the models nothing is sent; leave it out, the agreement on the transfer set is in "
                "the lines of training"
            )
        if self.codistill_validate_agreement and self.codistill_lookahead:
            raise ConfigError(
                "--codistill-validate-agreement is set with --codistill-lookahead: who has sent the next batch already "
                "is taken to be past the validation, and nobody waits for its predictions there; leave one of them out"
            )

    @classmethod
    def from_fairseq(cls, cfg: Any) -> "CodistillationCriterionConfig":
        """A plain, validated copy of what fairseq parsed (a DictConfig or a namespace)."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "_name"]
        config = cls(**{name: getattr(cfg, name) for name in names})
        config.update_freq = [int(freq) for freq in config.update_freq]
        config.validate()
        return config


@register_criterion("codistillation", dataclass=CodistillationCriterionConfig)
class CodistillationCriterion(LabelSmoothedCrossEntropyCriterion):
    """Supervised loss + α · mean over the peers of D (Algorithm 1 of the paper) + Σ over the teachers of weight · D.

    The mean is over the peers that answered. Their predictions are constants: no gradient reaches a peer. In
    validation the loss is the supervised one alone, with the label smoothing of the start, so that the best
    checkpoint stays comparable over time and with a plain run.

    Attributes:
        validation_key: of the validation batch at hand, where it is to be compared with the peers' predictions.
        on_failure: told of an error that ends the exchange; the batch is trained on without the peers then. None: the
            error is raised.
    """

    validation_key: BatchKey | None = None
    on_failure: Callable[[Exception], None] | None = None

    def __init__(self, task: Any, config: CodistillationCriterionConfig):
        super().__init__(
            task, config.sentence_avg, config.label_smoothing, config.ignore_prefix_size, config.report_accuracy
        )
        self.config = config
        num_kept = config.most_parts * (max(config.update_freq) if config.amp else 1)
        self.peers = Codistiller(config, num_kept=num_kept)
        # Else it is the stock criterion, bit for bit.
        self._is_taught = bool(config.codistill_teacher) or (config.is_codistilled and config.codistill_weight > 0)
        self.num_updates = 0
        self.epoch = 1
        self._is_training_step = False
        self._begun: _Begun | None = None  # of the part at hand of a split step
        self._compared: figures.Sums = {}  # of the validation batch at hand

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "CodistillationCriterion":
        """Called by fairseq with what it parsed."""
        if not hasattr(task, "coordinated_iterator"):
            name = getattr(getattr(task, "cfg", None), "_name", None) or type(task).__name__
            raise ConfigError(
                f"--criterion codistillation with --task {name}: use --task codistill_{name}, which trains the same "
                "way and keeps the batches of the models aligned"
            )
        config = CodistillationCriterionConfig.from_fairseq(cfg)
        refuse_to_be_alone(config.codistill_num_models)
        return cls(task, config)

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """fairseq's own, whose parser keeps the last of several values: options that may be repeated keep all."""
        super().add_args(parser)
        repeatable = {flag_name(field.name) for field in dataclasses.fields(TeacherConfig) if _is_repeatable(field)}
        for action in parser._actions:
            if repeatable & set(action.option_strings):
                action.__class__ = JoinedAction

    def forward(self, model: Any, sample: dict, reduce: bool = True) -> tuple[Tensor, Any, dict]:
        """Loss, sample size and logging outputs, as every fairseq criterion returns them.

        Losses are summed over target tokens, in nats; fairseq divides by the sample size (target tokens, or sentences
        with ``--sentence-avg``).
        """
        if not (self.training and torch.is_grad_enabled() and reduce):
            self.eps, self._compared = self.config.label_smoothing, {}
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
            return loss, sample_size, {**logging_output, **self._compared}
        self.eps = schedules.label_smoothing(
            self.config.label_smoothing,
            self.config.label_smoothing_end,
            self.epoch,
            self.num_updates,
            self.config.label_smoothing_decay_updates,
            self.config.label_smoothing_decay_epochs,
            self.config.label_smoothing_drop_epoch,
        )
        self._is_training_step = True
        try:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
            if SHARED in sample:
                loss = self._learn_from_shared(model, sample[SHARED], loss, sample_size)
                logging_output["loss"] = loss.data
            if AHEAD in sample:
                self._look_ahead(model, sample[AHEAD])
            return loss, sample_size, {**logging_output, **self.peers.sums}
        finally:
            self._is_training_step = False

    def compute_loss(self, model: Any, net_output: Any, sample: dict, reduce: bool = True) -> tuple[Tensor, Tensor]:
        """() loss with what is distilled in it, and () cross entropy without smoothing, for :meth:`forward`."""
        if not self._is_training_step:
            if self.validation_key is not None:
                self._compare(self.validation_key, model, net_output, sample)
            return super().compute_loss(model, net_output, sample, reduce)
        begun = self._begun or self._begin(model, net_output, sample)
        self.peers.sums = begun.sums  # of this part, whichever was finished before
        has_plain_softmax, found = _has_plain_softmax(model), None
        if begun.pending is not None:
            target = begun.target if has_plain_softmax else None
            found = self.unless_failed(self.peers.finish, begun.pending, begun.logits, begun.rows, target, self.eps)
        if found is None and has_plain_softmax and self._is_taught:
            # The updates in between too: one of the stock criterion among them would need three times the memory.
            if begun.pending is None:
                begun = _Begun(net_output, begun.sums, None, *self._rows(model, net_output, sample))
            found = supervised(begun.logits, begun.rows, begun.target, self.eps)
        if found is not None and has_plain_softmax:
            return found.total, found.nll
        loss, nll_loss = super().compute_loss(model, net_output, sample, reduce)
        return (loss if found is None else loss + found.total), nll_loss

    def _look_ahead(self, model: Any, following: dict) -> None:
        """Send what this model predicts of the batch that comes next, while the gradient of this one is computed."""
        batch = _batch_of(following)
        if batch is None or not self.peers.is_next_due(batch):
            return
        with undisturbed(_bare(model)) as bare:
            logits, rows, target = self._rows(bare, bare(**following["net_input"]), following)
            self.peers.post_ahead(batch, logits, rows, target)

    def _learn_from_shared(self, model: Any, shared: dict, loss: Tensor, sample_size: Any) -> Tensor:
        """Add what the peers predict of a batch of the transfer set to the loss of one that is trained on.

        The mean over its tokens (sentences) counts as much as that over those of the batch, times α.
        """
        batch = _batch_of(shared, is_shared=True)
        if batch is None or self.peers.weight(batch) == 0.0:
            return loss
        own = self.peers.sums
        model = _bare(model)  # its gradients are reduced with those of the batch, by whose forward pass it is armed
        logits, rows, target = self._rows(model, model(**shared["net_input"]), shared)
        found = self.unless_failed(self.peers.step, batch, logits, rows)
        scale = sample_size / max(shared["target"].size(0) if self.sentence_avg else target.numel(), 1)
        self.peers.sums = figures.with_shared(own, self.peers.sums, scale)
        return loss if found is None else loss + scale * found.total

    def parts_of(self, sample: dict, model: Any) -> int:
        """In how many parts to cut a batch: one where there is nothing to wait for, or the model takes none."""
        batch = _batch_of(sample)
        return self.peers.parts_of(batch) if batch is not None and takes_parts(model, self.config) else 1

    def begin(self, model: Any, sample: dict) -> "_Begun":
        """Forward of a part of a split step: its predictions are sent. :meth:`finish` follows."""
        net_output = model(**sample["net_input"])
        return self._begin(model, net_output, sample)

    def finish(self, model: Any, sample: dict, begun: "_Begun") -> tuple[Tensor, Any, dict]:
        """What :meth:`forward` returns, of a part that was begun."""
        self._begun = begun
        try:
            return self(_Answered(model, begun.net_output), sample)
        finally:
            self._begun = None

    def _begin(self, model: Any, net_output: Any, sample: dict) -> "_Begun":
        batch = _batch_of(sample)
        if not self.unless_failed(self.peers.is_due, batch, net_output[0]):
            return _Begun(net_output, self.peers.sums)
        assert batch is not None  # else nothing is due
        logits, rows, target = self._rows(model, net_output, sample)
        pending = self.unless_failed(self.peers.begin, batch, logits, rows, self._forward_of(sample), target)
        return _Begun(net_output, self.peers.sums, pending, logits, rows, target)

    def unless_failed(self, ask: Callable[..., Any], *args: Any) -> Any:
        """What the exchange says to that; None after an error that ends it, of which :attr:`on_failure` is told."""
        try:
            return ask(*args)
        except (AlignmentError, NoPeersError) as error:
            if self.on_failure is None:
                raise
            self.on_failure(error)
            return None

    def _compare(self, key: BatchKey, model: Any, net_output: Any, sample: dict) -> None:
        logits, rows, target = self._rows(model, net_output, sample)
        mark = fingerprint(sample["id"], target)
        self._compared = self.peers.compare(key, mark, logits, rows, self._forward_of(sample))

    def _forward_of(self, sample: dict) -> Callable[[Any], Tensor]:
        return lambda replica: self._rows(replica, replica(**sample["net_input"]), sample)[0]

    def _rows(self, model: Any, net_output: Any, sample: dict) -> tuple[Tensor, Tensor | None, Tensor]:
        """What is trained on, flat.

        Returns:
            (num_positions, vocab) logits, in batch order; (num_tokens,) int64, the positions that are not padding, None
            for all; (num_tokens,) int64, their targets.
        """
        logits, target = net_output[0], model.get_targets(sample, net_output)
        if self.ignore_prefix_size > 0:
            logits, target = logits[:, self.ignore_prefix_size :], target[:, self.ignore_prefix_size :]
        shape, mark = tuple(target.shape), sample.get(TAG, {})
        logits, target = logits.reshape(-1, logits.size(-1)), target.reshape(-1)
        # In validation, and with a prefix that does not count, they are looked for: an accelerator is waited for.
        rows = mark["rows"] if mark.get("shape") == shape else target.ne(self.padding_idx).nonzero().squeeze(1)
        if rows is None or rows.numel() == target.numel():
            return logits, None, target
        return logits, rows, target.index_select(0, rows)

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict]) -> None:
        """Log the sums over micro-batches and ranks as means; the keys are the same at every training step."""
        super().reduce_metrics(logging_outputs)

        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        if any(figures.COMPARED_BATCHES in log for log in logging_outputs):
            for key, mean in figures.compared_means(total).items():
                metrics.log_scalar(key, mean.value, mean.weight, round=mean.digits)
        if not any("codistill_batches" in log for log in logging_outputs):
            return
        has_teachers = any(figures.TEACHER_SUM in log for log in logging_outputs)
        # Bits: base 2 like fairseq's own loss, so that loss = supervised loss + codistill_loss (+ that of teachers).
        for key, mean in figures.means(total, total("sample_size"), math.log(2), has_teachers).items():
            metrics.log_scalar(key, mean.value, mean.weight, round=mean.digits)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:  # noqa: D102 - nothing of ours belongs in a checkpoint
        return {}


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A batch after its forward pass.

    Attributes:
        net_output: of the model.
        sums: of the exchange, where the figures of this batch go.
        pending: None where nothing is due; the rest is None then as well.
        logits: (num_positions, vocab) with gradient.
        rows: (num_tokens,) the positions that are not padding, None for all.
        target: (num_tokens,) their targets.
    """

    net_output: Any
    sums: figures.Sums
    pending: Pending | None = None
    logits: Any = None
    rows: Tensor | None = None
    target: Any = None


class _Answered:
    """A model that was called already: calling it gives what it gave then."""

    def __init__(self, model: Any, net_output: Any):
        self.module, self._net_output = model, net_output

    def __call__(self, **net_input: Any) -> Any:
        return self._net_output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _bare(model: Any) -> Any:
    """The model without wrappers for data-parallel training."""
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        model = model.module
    return model


def _is_repeatable(field: "dataclasses.Field[Any]") -> bool:
    return bool(field.metadata.get("repeatable"))


def _batch_of(sample: dict, is_shared: bool = False) -> Batch | None:
    """None for a batch that is not part of the data order: a dummy."""
    tag = sample.get(TAG)
    if tag is None:
        return None
    samples = SampleMarks(*tag["samples"]) if "samples" in tag else None
    place = tag.get("parts", 1), tag.get("part", 0)
    return Batch(tuple(tag["key"]), tag["elapsed"], tag["fingerprint"], 0, *place, samples, is_shared)


def _has_plain_softmax(model: Any) -> bool:
    """Whether its probabilities are the softmax of its logits and nothing else, as with all common fairseq models.

    Only then may the supervised loss be taken from the logits; a model with a method of its own is asked for its
    probabilities, as the stock criterion does.
    """
    model = _bare(model)
    decoder = getattr(model, "decoder", None)
    stock = {BaseFairseqModel.get_normalized_probs, TransformerModelBase.get_normalized_probs}
    return (
        getattr(type(model), "get_normalized_probs", None) in stock
        and type(model).get_normalized_probs_scriptable is BaseFairseqModel.get_normalized_probs_scriptable
        and isinstance(decoder, FairseqDecoder)
        and type(decoder).get_normalized_probs is FairseqDecoder.get_normalized_probs
        and type(decoder).get_normalized_probs_scriptable is FairseqDecoder.get_normalized_probs_scriptable
        and getattr(decoder, "adaptive_softmax", None) is None
    )


# fairseq compares the names of criterion classes when it restores an optimizer. Bearing the stock name lets a plain
# run be continued with codistillation, and a codistilled checkpoint by plain fairseq.
CodistillationCriterion.__name__ = LabelSmoothedCrossEntropyCriterion.__name__
