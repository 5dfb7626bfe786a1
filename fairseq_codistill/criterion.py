"""Owns the criterion ``codistillation``: fairseq's label-smoothed cross entropy plus α · divergence from the peers.

A thin adapter: the divergences are in ``losses``, the schedules in ``schedules``, everything that waits in
``coordinator``. It must stay fairseq's own criterion, bit for bit, wherever nothing is distilled.
"""

import dataclasses
import logging
import math
from typing import Any

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

from fairseq_codistill import schedules
from fairseq_codistill.batches import TAG
from fairseq_codistill.chunked import chunked_loss
from fairseq_codistill.config import CodistillationConfig, ConfigError, LabelSmoothingConfig
from fairseq_codistill.coordinator import BatchKey, Coordinator
from fairseq_codistill.coordinator.replicas import Replicas
from fairseq_codistill.coordinator.sampled_codecs import PeerPredictions

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class CodistillationCriterionConfig(
    CodistillationConfig, LabelSmoothingConfig, LabelSmoothedCrossEntropyCriterionConfig
):
    """All options, and the settings of the job that the models must have in common."""

    seed: int = II("common.seed")
    amp: bool = II("common.amp")
    update_freq: list[int] = II("optimization.update_freq")
    max_tokens: int | None = II("dataset.max_tokens")
    batch_size: int | None = II("dataset.batch_size")
    required_batch_size_multiple: int = II("dataset.required_batch_size_multiple")
    train_subset: str = II("dataset.train_subset")
    curriculum: int = II("dataset.curriculum")
    max_epoch: int = II("optimization.max_epoch")

    def validate(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        CodistillationConfig.validate(self)
        LabelSmoothingConfig.validate(self)

    @classmethod
    def from_fairseq(cls, cfg: Any) -> "CodistillationCriterionConfig":
        """A plain, validated copy of what fairseq parsed (a DictConfig or a namespace)."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "_name"]
        config = cls(**{name: getattr(cfg, name) for name in names})
        config.update_freq = [int(freq) for freq in config.update_freq]
        config.validate()
        return config

    @property
    def is_codistilled(self) -> bool:
        """Whether this job exchanges anything at all."""
        return self.codistill_num_models > 1 and self.codistill_weight > 0


@register_criterion("codistillation", dataclass=CodistillationCriterionConfig)
class CodistillationCriterion(LabelSmoothedCrossEntropyCriterion):
    """Supervised loss + α · mean over the peers of D (Algorithm 1 of the paper).

    The mean is over the peers that answered. Their predictions are constants: no gradient reaches a peer. In
    validation only the supervised loss is computed, with the label smoothing of the start, so that the best
    checkpoint stays comparable over time and with a plain run.
    """

    def __init__(self, task: Any, config: CodistillationCriterionConfig):
        super().__init__(
            task, config.sentence_avg, config.label_smoothing, config.ignore_prefix_size, config.report_accuracy
        )
        self.config = config
        self.coordinator: Coordinator | None = None  # the task sets it once the models have met
        self.replicas: Replicas | None = None  # likewise, where checkpoints are exchanged
        self.num_updates = 0
        self.epoch = 1
        self._told = (0.0, 0)  # alpha and epoch of the data order that were last in the log
        self._figures: dict[str, Any] | None = None  # to log, while a training step is in forward

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "CodistillationCriterion":
        """Called by fairseq with what it parsed."""
        if not hasattr(task, "coordinated_iterator"):
            name = getattr(getattr(task, "cfg", None), "_name", None) or type(task).__name__
            raise ConfigError(
                f"--criterion codistillation with --task {name}: use --task codistill_{name}, which trains the same "
                "way and keeps the batches of the models aligned"
            )
        return cls(task, CodistillationCriterionConfig.from_fairseq(cfg))

    def forward(self, model: Any, sample: dict, reduce: bool = True) -> tuple[Tensor, Any, dict]:
        """Loss, sample size and logging outputs, as every fairseq criterion returns them.

        Losses are summed over target tokens, in nats; fairseq divides by the sample size (target tokens, or sentences
        with ``--sentence-avg``).
        """
        if not (self.training and torch.is_grad_enabled() and reduce):
            self.eps = self.config.label_smoothing
            return super().forward(model, sample, reduce)
        self.eps = schedules.label_smoothing(
            self.config.label_smoothing,
            self.config.label_smoothing_end,
            self.epoch,
            self.num_updates,
            self.config.label_smoothing_decay_updates,
            self.config.label_smoothing_decay_epochs,
            self.config.label_smoothing_drop_epoch,
        )
        self._figures = {}
        try:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
            return loss, sample_size, {**logging_output, **self._figures}
        finally:
            self._figures = None

    def compute_loss(self, model: Any, net_output: Any, sample: dict, reduce: bool = True) -> tuple[Tensor, Tensor]:
        """() loss with what is distilled in it, and () cross entropy without smoothing, for :meth:`forward`."""
        if self._figures is None:  # not training
            return super().compute_loss(model, net_output, sample, reduce)
        weight = self._weight(sample.get(TAG))
        peers, self._figures = self._ask_peers(model, net_output, sample, weight)
        if not peers:
            return super().compute_loss(model, net_output, sample, reduce)
        logits, rows, target = self._rows(model, net_output, sample)
        divergence = self.config.codistill_divergence
        if _has_plain_softmax(model):
            found = chunked_loss(logits, peers, divergence, weight, rows, target, self.eps)
            loss, nll_loss = found.total, found.nll
        else:
            loss, nll_loss = super().compute_loss(model, net_output, sample, reduce)
            found = chunked_loss(logits, peers, divergence, weight, rows)
            loss = loss + found.total
        self._figures.update(
            codistill_loss=weight * found.divergences.mean(),
            codistill_divergence=found.divergences.sum(),
            codistill_agreeing=found.num_agreeing,
            codistill_rows=float(len(peers) * target.numel() - found.num_nonfinite),
            codistill_compared=float(found.num_compared),
            codistill_nonfinite=float(found.num_nonfinite),
            codistill_peers=float(len(peers)),
        )
        return loss, nll_loss

    def _ask_peers(
        self, model: Any, net_output: Any, sample: dict, weight: float
    ) -> tuple[list[PeerPredictions], dict[str, Any]]:
        """What the peers predict, none where nothing is distilled, and the figures to log."""
        zero = net_output[0].new_zeros((), dtype=torch.float32)
        tag = sample.get(TAG)
        # Sums over micro-batches and ranks follow. Tensors stay tensors and floats floats at every step: fairseq
        # reduces the two kinds in separate collectives, which the ranks must enter alike.
        figures: dict[str, Any] = {
            "codistill_loss": zero,
            "codistill_divergence": zero,
            "codistill_agreeing": zero,
            "codistill_rows": 0.0,
            "codistill_compared": 0.0,
            "codistill_nonfinite": 0.0,
            "codistill_weight": weight,
            "codistill_peers": 0.0,
            "codistill_exchanges": 0.0,
            "codistill_skipped": 0.0,
            "codistill_wait_ms": 0.0,
            "codistill_staleness": 0.0,
            "codistill_mbit": 0.0,
            "codistill_behind": 0.0,
            "codistill_lagging": 0.0,
            "codistill_batches": 1.0,
            "codistill_updates": 1.0 / self._update_freq(),
        }
        if self.coordinator is None or tag is None:
            return [], figures
        if weight == 0.0:
            self.coordinator.poll(tag["elapsed"])
            figures.update(self._lag(tag["elapsed"]))
            return [], figures
        if self.replicas is None:
            self.coordinator.post(
                BatchKey(*tag["key"]), tag["fingerprint"], self._predictions(model, net_output, sample)
            )
            exchange = self.coordinator.collect()
        else:

            def forward(replica: Any) -> Tensor:
                return self._predictions(replica, replica(**sample["net_input"]), sample)

            exchange = self.coordinator.ask_replicas(BatchKey(*tag["key"]), self.replicas, forward)
            figures["codistill_staleness"] = float(sum(self.replicas.staleness(tag["elapsed"])))
        figures.update(self._lag(tag["elapsed"]))
        figures["codistill_skipped"] = float(exchange.num_skipped)
        figures["codistill_wait_ms"] = exchange.wait_s * 1e3
        figures["codistill_mbit"] = exchange.sent_bytes * 8e-6
        figures["codistill_exchanges"] = 1.0
        return list(exchange.predictions.values()), figures

    def _lag(self, elapsed: int) -> dict[str, float]:
        """How far the peers are ahead, where it is too far to catch up. The task skips the mean over lagging ranks."""
        assert self.coordinator is not None
        behind = self.coordinator.num_behind(elapsed)
        return {"codistill_behind": float(behind), "codistill_lagging": float(behind > 0)}

    def _weight(self, tag: dict | None) -> float:
        """α at this batch; 0 for one at which nothing is due, or that is not part of the data order (a dummy batch)."""
        if tag is None or self.coordinator is None:
            return 0.0
        if self.replicas is None and not self.coordinator.is_due(tag["elapsed"]):
            return 0.0
        weight = schedules.distill_weight(
            self.config.codistill_weight,
            self.config.codistill_weight_growth,
            tag["key"][0],
            tag["elapsed"],
            self.config.codistill_burn_in,
            self.config.codistill_weight_max,
        )
        if self._told != (told := (weight, tag["key"][0])):
            self._told = told
            logger.info("codistillation: alpha is %.4g in epoch %d", *told)
        return weight

    def _update_freq(self) -> int:
        frequencies = self.config.update_freq
        return frequencies[min(self.epoch, len(frequencies)) - 1]

    def _rows(self, model: Any, net_output: Any, sample: dict) -> tuple[Tensor, Tensor | None, Tensor]:
        """What is trained on, flat.

        Returns:
            (num_positions, vocab) logits, in batch order; (num_tokens,) int64, the positions that are not padding, None
            for all; (num_tokens,) int64, their targets.
        """
        logits, target = net_output[0], model.get_targets(sample, net_output)
        if self.ignore_prefix_size > 0:
            logits, target = logits[:, self.ignore_prefix_size :], target[:, self.ignore_prefix_size :]
        logits, target = logits.reshape(-1, logits.size(-1)), target.reshape(-1)
        rows = target.ne(self.padding_idx).nonzero().squeeze(1)
        if rows.numel() == target.numel():
            return logits, None, target
        return logits, rows, target[rows]

    @torch.no_grad()
    def _predictions(self, model: Any, net_output: Any, sample: dict) -> Tensor:
        """(num_tokens, vocab) logits of the non-pad target tokens, in batch order, without gradient."""
        logits, rows, _ = self._rows(model, net_output, sample)
        return logits.detach() if rows is None else logits.index_select(0, rows)

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict]) -> None:
        """Log the sums over micro-batches and ranks as means; the keys are the same at every training step."""
        super().reduce_metrics(logging_outputs)
        if not any("codistill_batches" in log for log in logging_outputs):
            return

        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        rows, batches, sample_size = total("codistill_rows"), total("codistill_batches"), total("sample_size")
        # Bits: base 2 like fairseq's own loss, so that loss = supervised loss + codistill_loss.
        codistill_loss = total("codistill_loss") / max(sample_size, 1) / math.log(2)
        metrics.log_scalar("codistill_loss", codistill_loss, sample_size, round=4)
        metrics.log_scalar("codistill_mse", total("codistill_divergence") / max(rows, 1), rows, round=4)
        compared = total("codistill_compared")
        metrics.log_scalar("codistill_agreement", total("codistill_agreeing") / max(compared, 1), compared, round=4)
        exchanges = total("codistill_exchanges")
        for key in ("codistill_weight", "codistill_peers"):
            metrics.log_scalar(key, total(key) / max(exchanges, 1), exchanges, round=3)
        metrics.log_scalar("codistill_wait_ms", total("codistill_wait_ms") / max(batches, 1), batches, round=3)
        staleness = total("codistill_staleness") / max(total("codistill_peers"), 1)
        metrics.log_scalar("codistill_staleness", staleness, total("codistill_peers"), round=1)
        metrics.log_scalar("codistill_skipped", total("codistill_skipped"), batches, round=3)
        metrics.log_scalar("codistill_nonfinite", total("codistill_nonfinite"), batches, round=1)
        updates = total("codistill_updates")  # a fraction where the last update of an epoch has fewer micro-batches
        metrics.log_scalar("codistill_mbit", total("codistill_mbit") / max(updates, 1e-9), updates, round=3)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:  # noqa: D102 - nothing of ours belongs in a checkpoint
        return {}


def _has_plain_softmax(model: Any) -> bool:
    """Whether its probabilities are the softmax of its logits and nothing else, as with all common fairseq models.

    Only then may the supervised loss be taken from the logits; a model with a method of its own is asked for its
    probabilities, as the stock criterion does.
    """
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        model = model.module  # a wrapper for data-parallel training
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
