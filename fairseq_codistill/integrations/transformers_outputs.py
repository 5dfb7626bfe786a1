"""Owns what a model of the Hugging Face trainer gives: where its logits are, which rows count, how a loss is scaled.

Nothing here exchanges anything or imports transformers.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fairseq_codistill.config import ConfigError


def logits_of(outputs: Any, has_loss: bool = True) -> Tensor:
    """(batch, ..., num_classes) of what a model gives.

    Args:
        outputs: a mapping, a tuple, or the logits themselves.
        has_loss: whether the loss stands before the logits in a tuple: the model was given the labels.

    Raises:
        ConfigError: there are none in it.
    """
    if isinstance(outputs, (tuple, list)):
        place = 1 if has_loss else 0
        logits = outputs[place] if len(outputs) > place else None
    else:
        found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        logits = outputs if isinstance(outputs, Tensor) else found
    if not isinstance(logits, Tensor):
        names = list(outputs) if isinstance(outputs, Mapping) else [type(outputs).__name__]
        raise ConfigError(f"the model's output has no logits to exchange, only {', '.join(map(str, names))}")
    return logits


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean cross entropy of the tokens, or samples, of an update, for ``compute_loss_func``.

    BART, T5, BERT's classifiers and their kin (transformers 5.24) give the mean of a micro-batch whatever the update
    has, which the trainer neither divides by the micro-batches nor by the ranks: with several a gradient is that many
    times too large.

    Args:
        outputs: of the model.
        labels: (batch, length) or (batch,) int64, -100 where nothing counts.
        num_items_in_batch: labels of the update that count.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    logits = logits_of(outputs, has_loss=False).float().flatten(end_dim=-2)
    loss = nn.functional.cross_entropy(logits, labels.flatten(), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def num_rows(inputs: Mapping[str, Any], ids: list[int], mask: Tensor | None) -> Tensor | float:
    """What the trainer counts of a batch to divide its loss by: labels that are not -100, samples without labels."""
    labels = inputs.get("labels")
    if mask is not None:
        return mask.sum()
    return float(len(ids)) if labels is None else labels.ne(-100).sum()


def rows_that_count(inputs: Mapping[str, Any], logits: Tensor, shifts: bool) -> tuple[Tensor | None, Tensor | None]:
    """What is trained on.

    Args:
        inputs: of the model, with its labels; -100 where nothing is to be predicted.
        logits: (batch, ..., num_classes).
        shifts: whether position i predicts label i + 1, as causal models do.

    Returns:
        (batch, ...) int64 targets and bool mask, both shaped as the logits without their classes; None, None for labels
        that are no classes: then every sample counts.

    Raises:
        ConfigError: logits of sequences whose labels are of another shape.
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if shifts and "shift_labels" not in inputs and labels is not None:
        labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
    if labels is not None and labels.shape == logits.shape[:-1] and not labels.is_floating_point():
        return labels.long(), labels.ne(-100)
    if logits.dim() > 2:
        shape = None if labels is None else tuple(labels.shape)
        raise ConfigError(
            f"labels are {shape} and logits {tuple(logits.shape)}; labels must be {tuple(logits.shape[:-1])}, to tell "
            "which rows count"
        )
    return None, None


def scaled_as_its_loss(term: Tensor, trainer: Any, num_items: Any, rows: Tensor | float) -> Tensor:
    """A mean over the rows of a micro-batch as the trainer's loss of it is scaled, by which it is then divided or not.

    Args:
        trainer: that it is of.
        num_items: what the trainer counts of an update, if it does.
        rows: likewise, of the micro-batch.
    """
    is_scaled = trainer.loss_is_scaled_for_ga
    if is_scaled is None:  # what the trainer then takes it for
        is_scaled = trainer.model_accepts_loss_kwargs and num_items is not None
        is_scaled = is_scaled or trainer.compute_loss_func is not None
    if not is_scaled:
        return term  # a mean, as the loss is; the trainer divides it by the micro-batches
    if num_items is None:  # who says that the loss is scaled has divided it; else it is a mean of each micro-batch
        return term / trainer.current_gradient_accumulation_steps if trainer.loss_is_scaled_for_ga else term
    scale = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return term * (rows / num_items * scale)
