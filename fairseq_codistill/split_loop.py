"""Owns the split step of a loop of one's own: a batch of tensors becomes parts, each with its rows and its name.

In what order their passes go is :mod:`~fairseq_codistill.split_step`'s business; what is exchanged, the exchanger's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_codistill.coordinator.keys import fingerprint, part_fingerprint
from fairseq_codistill.exchanger import Exchanger
from fairseq_codistill.lesson import Batch
from fairseq_codistill.lookahead import undisturbed
from fairseq_codistill.losses.chunked import chunked_loss
from fairseq_codistill.nested import mapped
from fairseq_codistill.plain_loop import Rows, can_be_cut, check_ids, flat, that_count
from fairseq_codistill.split_step import part_bounds, run_split_step, takes_parts


@dataclasses.dataclass(frozen=True)
class SplitBatch:
    """A batch of a loop of one's own; see :meth:`~fairseq_codistill.codistiller.Codistiller.forward_backward`.

    Attributes:
        inputs, targets, ids, mask, ignore_index, label_smoothing, call: as given there.
    """

    inputs: Any
    targets: Tensor
    ids: Any
    mask: Tensor | None
    call: Callable[[nn.Module, Any], Tensor]
    ignore_index: int
    label_smoothing: float = 0.0


def forward_backward(
    peers: Exchanger,
    model: nn.Module,
    given: SplitBatch,
    at: tuple[tuple[int, int, int], int],
    backward: Callable[[Tensor], None],
    scaled: Callable[[Tensor], Tensor] | None,
    add_up: Callable[[int], None],
    look_ahead: Callable[[], object] | None = None,
) -> Tensor:
    """Exchange, loss and gradients of a batch, in as many parts as the models agreed on.

    Args:
        peers: whose batch it is.
        model: as it is called.
        given: the batch.
        at: its key, and updates' worth of batches before it.
        backward, scaled: as for :func:`~fairseq_codistill.split_step.run_split_step`.
        add_up: called once a part has its figures, with the number of its rows.
        look_ahead: called once the last part has its loss, before its gradients.

    Returns:
        () the loss of the batch, detached.

    Raises:
        ValueError: the batch is to be cut, and cannot be.
    """
    targets, (key, elapsed) = given.targets, at
    sample_ids = check_ids(given.ids, targets.size(0))
    rows = that_count(given.mask, targets, given.ignore_index).bool()
    whole = Batch(key, elapsed, b"")
    if peers.coordinator is not None:
        chosen = targets[rows] if given.mask is None or given.mask.shape == targets.shape else targets.flatten()
        whole = dataclasses.replace(whole, fingerprint=fingerprint(sample_ids, chosen))
    bounds = part_bounds(targets.size(0), _num_parts(peers, model, whole, given))
    num_rows = max(int(rows.sum()), 1)
    losses: list[Tensor] = []

    def forward(part: int) -> Any:
        piece = slice(*bounds[part])
        part_inputs = given.inputs if len(bounds) == 1 else mapped(given.inputs, lambda values: values[piece])
        logits = given.call(model, part_inputs)
        found = Rows.of(logits, targets[piece], rows[piece])
        mark = whole.fingerprint if len(bounds) == 1 else part_fingerprint(whole.fingerprint, *bounds[part])
        samples = found.samples(sample_ids[piece]) if peers.teachers.has_cache else None
        batch = Batch(key, elapsed, mark, parts=len(bounds), part=part, samples=samples)
        of_copy = flat(lambda copy: given.call(copy, part_inputs))
        begun = peers.begin(batch, found.logits, found.index, of_copy, found.targets)
        return found, begun, peers.sums

    def finish(part: int, begun: Any) -> Tensor:
        found, pending, peers.sums = begun
        smoothing = found.smoothing(given.label_smoothing)
        result = peers.finish(pending, found.logits, found.index, found.targets, smoothing)
        if result is None:
            total = chunked_loss(found.logits, (), "mse", 0.0, found.index, found.targets, smoothing).total
        else:
            total = result.total
        add_up(found.num_rows)
        losses.append(total.detach() / num_rows)
        if look_ahead is not None and part == len(bounds) - 1:
            look_ahead()
        return total / num_rows

    run_split_step(len(bounds), forward, finish, backward, model, scaled)
    return torch.stack(losses).sum()


def _num_parts(peers: Exchanger, model: nn.Module, whole: Batch, given: SplitBatch) -> int:
    """As agreed on; where nothing can be cut, this loop does not offer to, and ``auto`` leaves all batches whole."""
    num_samples, config = given.targets.size(0), peers.config
    if not takes_parts(model, config):
        return 1
    if can_be_cut(given.inputs, num_samples):
        return peers.parts_of(whole)
    if peers.coordinator is not None and config.codistill_parts != "auto" and config.most_parts > 1:
        raise ValueError(
            f"parts is {config.codistill_parts!r}, and inputs are a {type(given.inputs).__name__} that cannot be cut; "
            f"give a tensor whose first dimension is the batch ({num_samples}), a tuple, list or mapping of such and "
            "of constants, or parts 1 on all models"
        )
    return 1


def look_ahead(peers: Exchanger, model: nn.Module, given: SplitBatch, at: tuple[tuple[int, int, int], int]) -> bool:
    """Send what a model predicts of the batch that comes next; arguments as for :func:`forward_backward`.

    Returns:
        whether it is due, and so was sent.
    """
    if peers.coordinator is None or not peers.is_next_due(Batch(*at, b"")):
        return False
    sample_ids = check_ids(given.ids, given.targets.size(0))
    with undisturbed(model) as bare:
        mask = that_count(given.mask, given.targets, given.ignore_index)
        rows = Rows.of(given.call(bare, given.inputs), given.targets, mask)
    batch = Batch(*at, fingerprint(sample_ids, rows.given))
    peers.post_ahead(batch, rows.logits, rows.index, rows.targets)
    return True
