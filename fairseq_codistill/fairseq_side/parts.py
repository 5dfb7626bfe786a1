"""Owns the parts of a fairseq batch: what each is called by the peers, cutting the batch, and adding their logs up."""

from collections.abc import Sequence
from typing import Any

import torch
from fairseq.optim.amp_optimizer import AMPOptimizer
from torch import Tensor

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.keys import part_fingerprint
from fairseq_codistill.split_step import part_bounds, run_split_step


def refuse_unused_parameters(config: CodistillationConfig, trainer: Any) -> None:
    """Where the model's wrapper looks for unused parameters, a step has one forward and one backward pass.

    It sees neither the pass of a batch of the transfer set nor the gradients of parts, which are taken apart.

    Raises:
        ConfigError: it would have more.
    """
    settings = trainer.cfg.distributed_training
    is_searched = settings.find_unused_parameters and settings.ddp_backend in ("c10d", "pytorch_ddp")
    if not is_searched or trainer.data_parallel_world_size == 1:
        return
    if config.codistill_transfer:
        flag, harm = f"--codistill-transfer is {config.codistill_transfer!r}", "a layer that one batch leaves out fails"
    elif config.codistill_parts != "auto" and config.most_parts > 1:
        flag, harm = f"--codistill-parts is {config.codistill_parts}", "a layer that one part leaves out learns apart"
    else:
        return
    raise ConfigError(
        f"{flag} with --find-unused-parameters, whose search does not see all that is trained on: {harm} on each rank; "
        "give --ddp-backend legacy_ddp"
    )


def num_tokens_each(target: Tensor, padding_idx: int) -> tuple[int, ...]:
    """Of each sentence, counted on the CPU where the batch is made.

    Args:
        target: (num_sentences, length) int64.
        padding_idx: index of the padding symbol.
    """
    return tuple(target.ne(padding_idx).sum(dim=1).tolist())


def counted_rows(target: Tensor, padding_idx: int) -> dict[str, Any]:
    """For the mark of a batch: which positions are trained on, found on the CPU where the batch is made.

    An accelerator that is asked for them has to be waited for.

    Args:
        target: (num_sentences, length) int64, on the CPU.
        padding_idx: index of the padding symbol.

    Returns:
        ``rows``: (num_tokens,) int64 positions of the flat target, None for all; ``shape`` that it was found for.
    """
    rows = target.reshape(-1).ne(padding_idx).nonzero().squeeze(1)
    return {"rows": None if rows.numel() == target.numel() else rows, "shape": tuple(target.shape)}


def cut(sample: dict, num_parts: int, tag_name: str) -> list[dict]:
    """The parts of a batch, each a batch of its own with a mark of its own.

    It stays whole where it is too small to split, or where the size that its loss is divided by is not the number of
    its targets, as of masked language models.

    Args:
        sample: as the collater made it, on any device; its mark holds ``tokens``, of :func:`num_tokens_each`.
        num_parts: that the models agreed on.
        tag_name: where the mark of a batch is.
    """
    tag = sample[tag_name]
    num_sentences = len(tag["tokens"])
    bounds = part_bounds(num_sentences, num_parts)
    if len(bounds) == 1 or int(sample["ntokens"]) != sum(tag["tokens"]):
        return [sample]
    parts = []
    for index, (start, stop) in enumerate(bounds):
        part: dict = {
            name: _rows(value, start, stop, num_sentences) for name, value in sample.items() if name != tag_name
        }
        part["nsentences"], part["ntokens"] = stop - start, sum(tag["tokens"][start:stop])
        part[tag_name] = {
            "key": tag["key"],
            "elapsed": tag["elapsed"],
            "fingerprint": part_fingerprint(tag["fingerprint"], start, stop),
            "parts": len(bounds),
            "part": index,
        }
        if tag.get("shape") == tuple(sample["target"].shape):
            length, before = tag["shape"][1], sum(tag["tokens"][:start])
            rows = tag["rows"]
            if rows is not None:
                rows = rows[before : before + part["ntokens"]] - start * length
            part[tag_name].update(rows=rows, shape=(stop - start, length))
        if "samples" in tag:
            part[tag_name]["samples"] = tuple(of_all[start:stop] for of_all in tag["samples"])
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
