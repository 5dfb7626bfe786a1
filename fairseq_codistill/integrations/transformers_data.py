"""Owns how samples come to the Hugging Face trainer in an order that all models share.

The number of a sample is its index in the training data. Nothing here exchanges anything or imports transformers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset, Sampler

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.keys import DataOrder
from fairseq_codistill.sampling import Timetable

IDS = "codistill_ids"


class NumberedFeatures(Dataset):
    """The training data, each sample (a mapping) with its number under :data:`IDS`.

    Args:
        dataset: of known length.

    Attributes:
        epoch: that is trained on, from 0. The trainer and accelerate tell it to a data set wherever samplers are
            wrapped, which of a sampler they do not; so the sampler asks here.
    """

    def __init__(self, dataset: Any):
        self.dataset, self.epoch = dataset, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._numbered(self.dataset[index], index)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        many = getattr(self.dataset, "__getitems__", None)  # a table reads many rows at once
        found = many(indices) if many is not None else [self.dataset[index] for index in indices]
        return [self._numbered(feature, index) for feature, index in zip(found, indices, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch begins, from 0."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    @staticmethod
    def _numbered(feature: Any, index: int) -> dict[str, Any]:
        if isinstance(feature, dict) and IDS in feature:
            return feature  # a batch that has its own
        if not isinstance(feature, Mapping):
            raise ConfigError(
                f"sample {index} of train_dataset is a {type(feature).__name__}; it must be a mapping such as "
                '{"input_ids": ..., "labels": ...}, to which its number can be added'
            )
        return {**feature, IDS: index}


class SharedOrder(Sampler[int]):
    """All samples of an epoch in the order that the data seed gives; rank r of every model then gets the same share.

    >>> list(SharedOrder(NumberedFeatures([{}] * 4), 1)) == list(SharedOrder(NumberedFeatures([{}] * 4), 1))
    True
    """

    def __init__(self, features: NumberedFeatures, data_seed: int):
        self._features = features
        self._table = Timetable(len(features), 1, 1, 1, data_seed)

    def __len__(self) -> int:
        return len(self._features)

    def __iter__(self) -> Iterator[int]:
        return iter(self._table.order(self._features.epoch + 1))


class NumberedCollator:
    """A collator whose batches have the numbers of their samples, as a list: they stay on the CPU.

    A sample may be a batch already, and have a list of them.
    """

    def __init__(self, collator: Any):
        self._collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        ids: list[Any] = [feature.pop(IDS) for feature in features]
        batch = self._collator(features)
        batch[IDS] = ids[0] if isinstance(ids[0], list) else ids
        return batch


def inputs_are_fixed(model: Any, collator: Any) -> bool:
    """Whether a sample is the same in every pass: text, of which a collator masks or permutes nothing at random."""
    is_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return is_text and not getattr(collator, "mlm", False) and not hasattr(collator, "plm_probability")


class Place:
    """Where in the data a trainer is, by its ``global_step``: updates' worth of batches since the start of training.

    Args:
        num_batches: of one rank in an epoch.
        update_freq: batches of an update; the last one of an epoch may have fewer.

    Attributes:
        order: as the other models count.
    """

    def __init__(self, num_batches: int, update_freq: int):
        self.order = DataOrder(num_batches, [update_freq])

    def position(self, global_step: int) -> int:
        """Batches before an update, since the start."""
        epochs, update = divmod(global_step, self.order.updates_per_epoch(1))
        return epochs * self.order.num_batches + update * self.order.batches_per_update(1)

    def epoch(self, global_step: int) -> float:
        """Epochs before an update, a fraction inside one, whether they were trained on or left out."""
        epochs, batches = divmod(self.position(global_step), self.order.num_batches)
        return epochs + batches / self.order.num_batches

    def room(self, global_step: int, epoch: int) -> int:
        """How many updates can be left out of an epoch, from 0; it may be negative.

        One that is whole is always made: a trainer that finds an epoch without any ends training. Once the data set
        is used up, which the trainer notices later, there is none.
        """
        per_epoch = self.order.updates_per_epoch(1)
        current, update = divmod(global_step, per_epoch)
        has_short_end = self.order.num_batches % self.order.batches_per_update(1) > 0
        return per_epoch - update - 1 - has_short_end if current == epoch else 0
