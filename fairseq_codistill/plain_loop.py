"""Owns what a training loop of one's own leaves to us: the count of its batches, and the shapes it hands over.

Whatever does not belong together is told here, by name, before anything is exchanged. It never exchanges anything.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.keys import ENDLESS, DataOrder, SampleMarks, sample_marks
from fairseq_codistill.nested import remade
from fairseq_codistill.ranks import rank_and_world_size
from fairseq_codistill.sampling import CoordinatedBatches

OWN_SAMPLER = (
    "The batches come from a sampler of your own and must be the same on all models: use "
    "fairseq_codistill.CoordinatedBatches"
)
UPDATE_FREQ, BATCHES_PER_EPOCH = "update_freq", "batches per epoch"
NUM_SAMPLES = "num_samples of CoordinatedBatches"
PLACED_BY = (UPDATE_FREQ, BATCHES_PER_EPOCH, NUM_SAMPLES)  # where in the data a count of batches is


def batch_sampler_of(
    batches: Any, ranks: tuple[int, int], is_own: bool = False, is_alone: bool = False
) -> CoordinatedBatches | None:
    """The coordinated sampler in what :meth:`Codistiller.meet` was given; None where there is none.

    Args:
        ranks: this rank of how many.
        is_own: no other model has these batches, so that any loader does.
        is_alone: there is no other model.

    Raises:
        ConfigError: a loader that shuffles by itself, or whose data are a stream; or the sampler of another rank.
    """
    if isinstance(batches, DataLoader):
        if isinstance(batches.batch_sampler, CoordinatedBatches):
            return _of_ranks(batches.batch_sampler, ranks, is_own, is_alone)
        if is_own:
            return None
        if isinstance(batches.dataset, IterableDataset):
            raise ConfigError(
                "the data set of the DataLoader is a stream, whose samples have no numbers to draw by; see to it that "
                "all models take the same batches, and give meet() how many an epoch has, or None for one without end"
            )
        if not isinstance(batches.sampler, SequentialSampler):
            raise ConfigError(
                f"the DataLoader draws its batches with {type(batches.sampler).__name__}, so every model would see "
                "others; leave batch_size and shuffle out and give it batch_sampler=CoordinatedBatches(len(dataset), "
                "batch_size=...)"
            )
        return None
    if isinstance(batches, CoordinatedBatches):
        return _of_ranks(batches, ranks, is_own, is_alone)
    if batches is None or isinstance(batches, (int, DataOrder)) or hasattr(batches, "__len__"):
        return None
    raise ConfigError(
        f"batches is a {type(batches).__name__}; give meet() a CoordinatedBatches, the DataLoader that has it, or the "
        "number of batches in an epoch"
    )


def _of_ranks(sampler: CoordinatedBatches, ranks: tuple[int, int], is_own: bool, is_alone: bool) -> CoordinatedBatches:
    found, group = (sampler.rank, sampler.table.world_size), rank_and_world_size()
    if found == ranks or (is_own and sampler.is_placed) or (is_alone and found == group):
        return sampler
    late = "Codistiller" if found == group else "CoordinatedBatches"
    raise ConfigError(
        f"CoordinatedBatches gives the batches of rank {found[0]} of {found[1]}, and the Codistiller is of rank "
        f"{ranks[0]} of {ranks[1]} of its model; make {late} after torch.distributed.init_process_group, or give it "
        "rank= and world_size="
    )


def _is_stream(batches: Any) -> bool:
    """Whether it is a loader that cannot say how many batches it has."""
    try:
        return isinstance(batches, DataLoader) and len(batches) < 0
    except TypeError:
        return True


class Clock:
    """Which batch is next: the count of calls, or what the loop says.

    Args:
        update_freq: batches that make up an update.

    Attributes:
        count: batches of this rank since the start of training.
    """

    def __init__(self, update_freq: int):
        if not isinstance(update_freq, int) or update_freq < 1:
            raise ConfigError(f"update_freq is {update_freq!r}; it must be a whole number, 1 or more")
        self.count = 0
        self.order = DataOrder(ENDLESS, [update_freq])
        self._sampler: CoordinatedBatches | None = None
        self._last = -1  # the last position that was asked for
        self._of_checkpoint: dict[str, Any] = {}  # the batches that it was counted in
        self._has_begun = self._counts_itself = False

    def begin(
        self, batches: Any, sampler: CoordinatedBatches | None, is_own: bool = False, elapsed: int | None = None
    ) -> None:
        """The batches are known: go on from where a checkpoint or the sampler is, whichever is further.

        Args:
            batches, sampler: as the loop and :func:`batch_sampler_of` give them.
            is_own: no other model has these batches, so that an epoch may have more or fewer of them than it had.
            elapsed: updates' worth of batches since the start, where the loop knows better; it counts them itself where
                it names its batches.

        Raises:
            ConfigError: the checkpoint is of other batches, so that its count would be another place in the data.
        """
        frequency = self.order.batches_per_update(1)
        self._sampler = sampler
        self._counts_itself = isinstance(batches, DataOrder)  # the loop, so it names what must be equal
        if isinstance(batches, DataOrder):
            self.order = batches
        else:
            is_endless = batches is None or (is_own and _is_stream(batches))
            num_batches = ENDLESS if is_endless else batches if isinstance(batches, int) else len(batches)
            if num_batches < 1:
                raise ConfigError(f"batches is {batches!r}: an epoch needs at least one batch")
            self.order = DataOrder(num_batches, [frequency])
        now = self.settings()
        placed_by = () if self._counts_itself else PLACED_BY
        for name in placed_by[:1] if is_own and frequency == 1 else placed_by:  # with 1, batches are updates
            before = self._of_checkpoint.get(name)
            if before is not None and name in now and now[name] != before:
                raise ConfigError(
                    f"{name} is {now[name]}, and was {before} where load_state_dict() goes on from, so its count of "
                    "batches would be another place in the data; give the same data, batch size, ranks and "
                    "update_freq, or leave load_state_dict() out and begin at the first batch"
                )
        self._has_begun = True
        if sampler is not None:
            self.count = max(self.count, sampler.elapsed)
            sampler.move_to(self.count)
        if elapsed is not None and not self._counts_itself and elapsed > self.elapsed:
            self.move_by(elapsed - self.elapsed)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: how many batches, and of which."""
        return {"count": self.count, "batches": self.settings() if self._has_begun else self._of_checkpoint}

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state` gave, before :meth:`begin`."""
        self.count, self._of_checkpoint = int(state["count"]), dict(state.get("batches", {}))

    def settings(self) -> dict[str, Any]:
        """What must be equal on all models."""
        found: dict[str, Any] = {UPDATE_FREQ: self.batches_per_update(1)}
        if self.order.num_batches != ENDLESS and not self._counts_itself:
            found[BATCHES_PER_EPOCH] = self.order.num_batches
        if self._sampler is None:
            return found
        table = self._sampler.table
        return {
            **found,
            "batch_size of CoordinatedBatches": table.batch_size,
            "data_seed of CoordinatedBatches": table.data_seed,
            NUM_SAMPLES: self._sampler.num_samples,
        }

    def batches_per_update(self, epoch: int) -> int:
        return self.order.batches_per_update(epoch)

    @property
    def elapsed(self) -> int:
        """Updates' worth of batches since the start."""
        return self._place(self.count)[1]

    def tick(self, position: int | None, again: bool) -> tuple[tuple[int, int, int], int]:
        """The batch at hand, and on to the next one.

        Args:
            position: batches before it since the start; None: the next one.
            again: it was asked for before.

        Returns:
            its key, and updates' worth of batches before it.

        Raises:
            RuntimeError: it was asked for before, and ``again`` does not say so.
            TypeError: the position is no whole number.
        """
        position = operator.index(position if position is not None else self.count - 1 if again else self.count)
        if position <= self._last and not again:
            raise RuntimeError(
                f"position {position} was asked for before (the last one was {self._last}): call loss() or term() once "
                "a batch, or with again=True where a batch is fed again"
            )
        self._last = max(self._last, position)
        self.count = max(self.count, position + 1)
        if self._sampler is not None:
            self._sampler.move_to(self.count)
        return self._place(position)

    def next(self) -> tuple[tuple[int, int, int], int]:
        """Of the batch that comes next: its key, and updates' worth of batches before it."""
        return self._place(self.count)

    def move_by(self, num_updates: int) -> None:
        """Skip so many updates' worth of batches."""
        key = self.order.key(self.elapsed + num_updates)
        self.count = (key.epoch - 1) * self.order.num_batches + key.position * self.batches_per_update(key.epoch)
        self._last = self.count - 1
        if self._sampler is not None:
            self._sampler.move_to(self.count)

    def _place(self, count: int) -> tuple[tuple[int, int, int], int]:
        epochs, index = divmod(count, self.order.num_batches)
        position, micro_batch = divmod(index, self.batches_per_update(epochs + 1))
        return (epochs + 1, position, micro_batch), self.order.elapsed(epochs + 1, position)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What counts of a batch, flat.

    Attributes:
        logits: (num_positions, num_classes).
        index: (num_rows,) int64, the positions that count; None for all.
        targets: (num_rows,) int64, where the logits are; empty where there are none.
        given: the same where the loop has them: what is on the CPU can be looked at without waiting for a device.
        known_by: what tells beside the samples which rows these are, likewise: the targets, or else where they are;
            empty for all.
        num_rows: how many count.
        batch_size: samples.
    """

    logits: Tensor
    index: Tensor | None
    targets: Tensor
    given: Tensor
    known_by: Tensor
    num_rows: int
    batch_size: int

    def smoothing(self, label_smoothing: float) -> float:
        """fairseq's, which the pass over the logits has and which spares the target, for torch's, which does not.

        Raises:
            ValueError: it is not from 0 to 1.
        """
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {label_smoothing!r}; it must be from 0 to 1")
        num_classes = self.logits.size(-1)
        return label_smoothing * (num_classes - 1) / num_classes

    def samples(self, ids: Tensor) -> SampleMarks:
        """What each sample is called, by its id and targets."""
        per_sample = self.logits.size(0) // max(self.batch_size, 1)
        counts = [per_sample] * self.batch_size
        if self.index is not None:
            counts = torch.bincount(self.index.cpu() // per_sample, minlength=self.batch_size).tolist()
        return sample_marks(ids, self.given, counts)

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor | None, mask: Tensor | None) -> "Rows":
        """Targets and mask may be elsewhere than the logits. Without a mask targets of -100 do not count.

        Raises:
            ValueError: shapes or dtypes that do not belong together.
        """
        if logits.dim() < 2 or not logits.is_floating_point():
            raise ValueError(
                f"logits are {tuple(logits.shape)} of {logits.dtype}; they must be floats, (batch, ..., num_classes): "
                "the classes come last, and the values before the softmax are wanted"
            )
        for name, value in (("targets", targets), ("mask", mask)):
            if value is not None and value.shape != logits.shape[:-1]:
                raise ValueError(
                    f"{name} are {tuple(value.shape)} and logits {tuple(logits.shape)}; {name} must be "
                    f"{tuple(logits.shape[:-1])}, for the classes come last"
                )
        if targets is not None and targets.dtype != torch.int64:
            raise ValueError(f"targets are {targets.dtype}; they must be int64 classes")
        flat = logits.flatten(end_dim=-2)
        if mask is None and targets is not None:
            mask = that_count(None, targets, -100)
        elif mask is not None and targets is not None:
            mask = mask.to(targets.device)
        index = None if mask is None else mask.flatten().nonzero().squeeze(1)
        if index is not None and index.numel() == flat.size(0):
            index = None
        empty = torch.empty(0, dtype=torch.int64)
        chosen = empty if targets is None else targets.flatten() if index is None else targets.flatten()[index]
        num_rows = flat.size(0) if index is None else index.numel()
        on = flat.device
        there = None if index is None else index.to(on, non_blocking=True)
        known_by = index if targets is None and index is not None else chosen
        return cls(flat, there, chosen.to(on, non_blocking=True), chosen, known_by, num_rows, logits.size(0))


def that_count(mask: Tensor | None, targets: Tensor, ignore_index: int) -> Tensor:
    """(batch, ...) which entries count: what the mask says of those whose target is not ``ignore_index``."""
    is_known = targets != ignore_index
    if mask is None or mask.shape != targets.shape:  # which is refused where the logits are known
        return is_known if mask is None else mask
    return is_known & mask.to(targets.device).bool()


def check_ids(ids: Any, batch_size: int) -> Tensor:
    """(batch,) int64 ids of the samples.

    Raises:
        ValueError: they are no whole numbers, or not one a sample.
    """
    try:
        found = torch.as_tensor(list(ids) if isinstance(ids, range) else ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"ids cannot be read as whole numbers ({error}); give each sample its index") from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"ids are {found.dtype}; they must be whole numbers, such as the index of each sample")
    if tuple(found.shape) != (batch_size,):
        raise ValueError(f"ids are {tuple(found.shape)}; there must be one for each of the {batch_size} samples")
    return found


def can_be_cut(inputs: Any, num_samples: int) -> bool:
    """Whether it can be cut: every tensor is as long as the batch, and nothing but constants is beside them.

    >>> can_be_cut({"ids": torch.zeros(4, 7), "use_cache": False}, 4), can_be_cut((torch.zeros(4, 7), [7, 3, 1, 1]), 4)
    (True, False)
    """
    if isinstance(inputs, Tensor):
        return inputs.dim() > 0 and inputs.size(0) == num_samples
    if not isinstance(inputs, (Mapping, tuple, list)):
        return False
    if isinstance(inputs, Mapping) and type(remade(inputs, dict(inputs))) is not type(inputs):
        return False  # a model that takes this one may not take a dict
    entries = inputs.values() if isinstance(inputs, Mapping) else inputs
    varying = [entry for entry in entries if not isinstance(entry, (type(None), bool, int, float, str))]
    return bool(varying) and all(can_be_cut(entry, num_samples) for entry in varying)


def flat(forward: Callable[[nn.Module], Tensor] | None) -> Callable[[nn.Module], Tensor] | None:
    """Of a model's logits, the shape that the exchange knows: the classes come last."""
    if forward is None:
        return None
    return lambda replica: forward(replica).flatten(end_dim=-2)
