"""Owns the task wrapper: shared batches, own initialisation and dropout, a key for every batch.

Importing this module registers the criterion and, for every fairseq task that trains in the common way, a task
``codistill_<name>``. The wrapper changes what batches a model sees, never how it is trained on them.
"""

import atexit
import hashlib
import logging
from typing import Any

import fairseq
import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY, FairseqTask, register_task

from fairseq_codistill import compat
from fairseq_codistill.batches import TAG, mark_batches
from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator import Coordinator, Identity, parameters_digest
from fairseq_codistill.criterion import CodistillationCriterion
from fairseq_codistill.stock_checkpoint import PREFIX, write_stock_checkpoints

logger = logging.getLogger(__name__)


class CodistillationTaskMixin:
    """Put in front of a fairseq task, it makes the task's batches the same on all models.

    The options come with the criterion ``codistillation``, which fairseq builds right after the task.
    """

    stock_name: str
    _criterion: CodistillationCriterion | None = None
    _seed_offset = 0
    _batches_per_epoch = 0

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
        _, world_size = _rank_and_world_size()
        compat.check_world(world_size)
        self._criterion = criterion
        if config.codistill_num_models > 1:
            self._seed_offset = config.codistill_data_seed - config.seed
            # Tasks that draw data themselves (random crops, sampled corpora) do so from a seed of their own.
            for settings in (getattr(self, "cfg", None), getattr(self, "args", None)):
                if settings is not None and getattr(settings, "seed", None) is not None:
                    settings.seed = config.codistill_data_seed
        return criterion

    def get_batch_iterator(self, dataset: Any, *args: Any, seed: int = 1, **kwargs: Any) -> EpochBatchIterator:
        """The task's own iterator, in the order of the shared data seed, with every training batch marked."""
        iterator = super().get_batch_iterator(dataset, *args, seed=seed + self._seed_offset, **kwargs)  # type: ignore[misc]
        if self._criterion is None or not self._criterion.config.is_codistilled:
            return iterator
        if dataset is not self.datasets.get(self._criterion.config.train_subset):  # type: ignore[attr-defined]
            return iterator
        return self.coordinated_iterator(iterator, self._criterion.config.update_freq)

    def coordinated_iterator(self, iterator: EpochBatchIterator, update_freq: list[int]) -> EpochBatchIterator:
        """Mark the training batches of ``iterator``.

        Raises:
            ConfigError: it is not an iterator whose order can be shared.
        """
        if type(iterator) is not EpochBatchIterator:
            raise ConfigError(
                f"--task {PREFIX}{self.stock_name}: its batches come from a {type(iterator).__name__}, whose order "
                "cannot be shared between models; such a task cannot be codistilled"
            )
        target_dictionary = self.target_dictionary  # type: ignore[attr-defined]
        self._batches_per_epoch = len(iterator)
        return mark_batches(iterator, update_freq, target_dictionary.pad())

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Before the first batch, meet the other models; it is the first moment when the parameters are final."""
        super().begin_epoch(epoch, model)  # type: ignore[misc]
        if self._criterion is None:
            return
        self._criterion.epoch = epoch
        if self._criterion.config.is_codistilled and self._criterion.coordinator is None:
            self._criterion.coordinator = self._meet(model)

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
        if ignore_grad and TAG in sample:
            sample = {name: value for name, value in sample.items() if name != TAG}
        return super().train_step(  # type: ignore[misc]
            sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
        )

    def _meet(self, model: Any) -> Coordinator:
        assert self._criterion is not None
        config = self._criterion.config
        if getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None:
            raise ConfigError(
                "--adaptive-softmax-cutoff is set: an adaptive softmax has no logits of the whole vocabulary to "
                "compare with a peer's; leave the option out to codistil"
            )
        rank, world_size = _rank_and_world_size()
        coordinator = Coordinator(config, rank, world_size, num_kept=max(config.update_freq) if config.amp else 1)
        atexit.register(coordinator.close, "its process ended")
        symbols = self.target_dictionary.symbols  # type: ignore[attr-defined]
        coordinator.meet(
            Identity(
                settings={
                    "--task": self.stock_name,
                    "--max-tokens": config.max_tokens,
                    "--batch-size": config.batch_size,
                    "--required-batch-size-multiple": config.required_batch_size_multiple,
                    "--update-freq": list(config.update_freq),
                    "batches per epoch": self._batches_per_epoch,
                    "target dictionary": f"{len(symbols)} symbols, digest "
                    + hashlib.blake2b("\n".join(symbols).encode(), digest_size=6).hexdigest(),
                },
                remarks={
                    "fairseq version": getattr(fairseq, "__version__", "unknown"),
                    "torch version": str(torch.__version__),
                },
                parameters_digest=parameters_digest(model.parameters()),
                seed=config.seed,
            )
        )
        return coordinator


def _rank_and_world_size() -> tuple[int, int]:
    """Of this process inside its model."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _register_wrappers() -> None:
    for name, task in list(TASK_REGISTRY.items()):
        # A task with its own train_step may feed the model something else than the batch that is marked.
        if name.startswith(PREFIX) or task.train_step is not FairseqTask.train_step:
            continue
        wrapper = type(f"Codistill{task.__name__}", (CodistillationTaskMixin, task), {"stock_name": name})
        register_task(PREFIX + name, dataclass=TASK_DATACLASS_REGISTRY.get(name))(wrapper)


compat.apply()
write_stock_checkpoints()
_register_wrappers()
