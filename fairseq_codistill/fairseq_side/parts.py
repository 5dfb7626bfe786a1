"""Owns the parts of a fairseq batch: what each is called by the peers, cutting the batch, and adding their logs up."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from fairseq.optim.amp_optimizer import AMPOptimizer
from torch import Tensor

from fairseq_codistill.coordinator.keys import BatchKey, fingerprint
from fairseq_codistill.split_step import part_bounds, run_split_step


class PartMark(NamedTuple):
    """Of one part, made on the CPU where the batch is."""

    start: int  # sentences
    stop: int
    num_tokens: int
    fingerprint: bytes


def part_marks(sample_ids: Tensor, target: Tensor, padding_idx: int, num_parts: int) -> list[PartMark]:
    """What the parts of a batch are called; one mark where it is too small to split.

    Args:
        sample_ids: (num_sentences,) ids.
        target: (num_sentences, length) int64.
        padding_idx: index of the padding symbol.
        num_parts: in how many parts to cut the sentences.
    """
    found = []
    for start, stop in part_bounds(len(sample_ids), num_parts):
        tokens = target[start:stop]
        tokens = tokens[tokens.ne(padding_idx)]
        found.append(PartMark(start, stop, tokens.numel(), fingerprint(sample_ids[start:stop], tokens)))
    return found


def cut(sample: dict, marks: Sequence[PartMark], tag_name: str, num_parts: int) -> list[dict]:
    """The parts of a batch, each a batch of its own with a mark of its own.

    Args:
        sample: as the collater made it, on any device.
        marks: of :func:`part_marks`.
        tag_name: where the mark of a batch is.
        num_parts: that the models agreed on; the keys count with it.
    """
    num_sentences = marks[-1].stop
    parts = []
    for index, mark in enumerate(marks):
        part: dict = {
            name: _rows(value, mark.start, mark.stop, num_sentences)
            for name, value in sample.items()
            if name != tag_name
        }
        part["nsentences"], part["ntokens"] = mark.stop - mark.start, mark.num_tokens
        epoch, position, micro_batch = sample[tag_name]["key"]
        part[tag_name] = {
            "key": BatchKey(epoch, position, micro_batch * num_parts + index),
            "elapsed": sample[tag_name]["elapsed"],
            "fingerprint": mark.fingerprint,
            "parts": len(marks),
        }
        if "samples" in sample[tag_name]:
            part[tag_name]["samples"] = tuple(of_all[mark.start : mark.stop] for of_all in sample[tag_name]["samples"])
        parts.append(part)
    return parts


def _rows(value: Any, start: int, stop: int, num_sentences: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.size(0) == num_sentences:
        return value[start:stop]
    if isinstance(value, dict):
        return {name: _rows(entry, start, stop, num_sentences) for name, entry in value.items()}
    return value


def added(logs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The logging output of a batch from those of its parts: every entry of it is a sum."""
    total = dict(logs[0])
    for log in logs[1:]:
        for name, value in log.items():
            total[name] = total[name] + value
    return total


def split_train_step(parts: Sequence[dict], model: Any, criterion: Any, optimizer: Any) -> tuple[Tensor, Any, dict]:
    """fairseq's ``train_step`` of a batch in parts: gradients of all, and their loss, sample size and logs as sums.

    Args:
        parts: of :func:`cut`.
        model: as the trainer calls it.
        criterion: ``codistillation``.
        optimizer: fairseq's, whose loss scale holds for every part.
    """
    losses: list[Tensor] = []
    sizes: list[Any] = []
    logs: list[dict] = []
    scaler = getattr(optimizer, "scaler", None) or getattr(optimizer, "_scaler", None)
    autocast = torch.autocast("cuda", enabled=isinstance(optimizer, AMPOptimizer))

    def forward(index: int) -> Any:
        with autocast:
            return criterion.begin(model, parts[index])

    def finish(index: int, begun: Any) -> Tensor:
        with autocast:
            loss, size, log = criterion.finish(model, parts[index], begun)
        losses.append(loss.detach())
        sizes.append(size)
        logs.append(log)
        return loss

    def scaled(loss: Tensor) -> Tensor:
        return loss if scaler is None else scaler.scale(loss)

    run_split_step(len(parts), forward, finish, optimizer.backward, model, scaled)
    return torch.stack(losses).sum(), sum(sizes), added(logs)
