"""Owns codistillation as a task of timm, for timm's own train script: coordinated batches, the term in the loss, state.

A thin adapter of :class:`~fairseq_codistill.codistiller.Codistiller`. It is timm's classification task in all else:
criterion, DistributedDataParallel, compilation and moving average stay timm's.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fairseq_codistill.codistiller import Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.integrations.endings import finish_at_exit
from fairseq_codistill.sampling import CoordinatedBatches, Draw, augmentation_seed, seeded

try:
    import timm
    from timm.data import FastCollateMixup
    from timm.data.distributed_sampler import RepeatAugSampler
    from timm.data.loader import MultiEpochsDataLoader
    from timm.task import ClassificationTask
    from timm.utils import unwrap_model
except ImportError as error:
    raise ImportError(f"CodistillationTask needs timm 1.0.31 or later ({error}): pip install 'timm>=1.0.31'") from error

logger = logging.getLogger(__name__)


class CodistillationTask(ClassificationTask):
    """A ``ClassificationTask`` whose model is codistilled.

    The models meet when the loader is first asked for a batch, after a checkpoint was loaded and the model wrapped.
    A model that fell behind catches up at the beginning of its next epoch.

    Args:
        *args, **kwargs: of ``ClassificationTask``: model, criterion and so on.
        loader: of the training data, from timm's ``create_loader``. Its batches, and all that is random about them,
            become those that every model sees.
        config: validated options; default: the environment, which ``codistill-launch`` sets.
        update_freq: batches of an update, ``--grad-accum-steps``.
        transport: replaces the one that the settings describe.
        teachers: models that never change, each alone or as (model, weight): ``timm.create_model(checkpoint_path=)``.

    Attributes:
        peers: this rank's exchange.

    Raises:
        ConfigError: a loader whose batches cannot be those of the other models; the message says why.
    """

    def __init__(
        self,
        *args: Any,
        loader: Any,
        config: CodistillationConfig | None = None,
        update_freq: int = 1,
        transport: Any = None,
        teachers: Any = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.peers = Codistiller(config, update_freq=update_freq, transport=transport, teachers=teachers)
        if self.peers.config.codistill_parts not in ("1", "auto"):
            parts = self.peers.config.codistill_parts
            raise ConfigError(f"--codistill-parts is {parts!r}; a task's step is one forward pass, leave it at 1")
        if self.peers.config.codistill_lookahead:
            raise ConfigError("--codistill-lookahead is set; a task sees no batch but the one at hand, leave it out")
        self._batches = coordinate(loader, self.peers.config.codistill_data_seed, self._before_epoch)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """timm's loss and output; in training with ``codistill_loss`` (alpha * D) in the loss, and beside it.

        Args:
            input: (batch, channels, height, width).
            target: (batch,) classes, or (batch, num_classes) where images are mixed.
        """
        found: dict[str, Tensor] = super().forward(input, target)
        if not (self.training and torch.is_grad_enabled()):
            return found
        ids = [draw.sample for draw in self._batches.at_hand()]
        classes = target if target.dim() == 1 else target.argmax(1)
        term = self.peers.term(found["output"], ids, targets=classes.long(), forward=lambda copy: copy(input))
        return {**found, "loss": found["loss"] + term, "task_loss": found["loss"], "codistill_loss": term.detach()}

    def _before_epoch(self) -> None:
        """The loader begins: meet, or say how the last epoch was, and be where the other models are."""
        if not self.peers.has_met:
            model = unwrap_model(self.get_trainable_module())
            settings = {"classes": getattr(model, "num_classes", None)}
            self.peers.meet(model, self._batches, settings=settings, remarks={"timm version": str(timm.__version__)})
            finish_at_exit(self.peers, self._batches)
        else:
            shown = (f"{name.removeprefix('codistill_')} {value:.4g}" for name, value in self.peers.figures().items())
            logger.info("codistillation: %s", ", ".join(shown))
            self.peers.skip(now=True)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Where in the data this model is, and with checkpoints the copies of its peers; timm saves it."""
        return {} if ema else {"codistill": self.peers.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """What :meth:`get_task_state` gave; before the first batch. A checkpoint without it is one to start from."""
        if state and "codistill" in state and not ema:
            self.peers.load_state_dict(state["codistill"])
            self._batches.move_to(int(state["codistill"]["count"]))


class _Batches(CoordinatedBatches):
    """Batches of :class:`Draw`, which say when an iteration over them begins."""

    def __init__(self, num_samples: int, batch_size: int, data_seed: int, before: Callable[[], None]):
        super().__init__(num_samples, batch_size, data_seed, draws=True)
        self._before, self._begun_at = before, -1

    def __iter__(self) -> Iterator[list[Any]]:
        if self._begun_at != self.elapsed:  # a loader with workers asks twice for the first of its iterations
            self._begun_at = self.elapsed
            self._before()
            self._begun_at = self.elapsed  # it may have moved on to where the others are
        self._trained_on = super().__iter__()
        return super().__iter__()

    def at_hand(self) -> list[Draw]:
        """The batch that is trained on now, whatever the loader has fetched in advance; ask once a batch."""
        return next(self._trained_on)


class _Drawn(Dataset):
    """Samples by :class:`Draw`; what is random about one is seeded by the data seed and the draw alone."""

    def __init__(self, dataset: Any, data_seed: int):
        self._dataset, self._data_seed = dataset, data_seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, draw: Draw) -> tuple[Any, int]:
        seed = augmentation_seed(self._data_seed, draw)
        with seeded(seed):
            return self._dataset[draw.sample], seed


class _Collated:
    """A collator of such samples; how it mixes them is seeded by the first of them."""

    def __init__(self, collate: Any):
        self.inner = collate

    def __call__(self, samples: list[tuple[Any, int]]) -> Any:
        with seeded(samples[0][1] + 1):
            return self.inner([sample for sample, _ in samples])


class _Mixed(_Collated, FastCollateMixup):
    """Such a collator that mixes: timm's train script looks for the class, and switches it off in the end."""

    mixup_enabled = property(
        lambda self: self.inner.mixup_enabled, lambda self, is_on: setattr(self.inner, "mixup_enabled", is_on)
    )


def coordinate(loader: Any, data_seed: int, before: Callable[[], None]) -> _Batches:
    """Change a loader of timm in place, so that it gives the batches that all models see.

    Args:
        loader: as ``create_loader`` returned it, before its first iteration.
        data_seed: shared by all models.
        before: called in the training process when an iteration over the loader begins.

    Raises:
        ConfigError: its batches cannot be those of the other models.
    """
    inner = getattr(loader, "loader", loader)  # timm's prefetcher has one
    for is_wrong, what in (
        (not isinstance(inner, DataLoader), f"is a {type(loader).__name__}; give what timm's create_loader returned"),
        (isinstance(inner, MultiEpochsDataLoader), "has started already (--use-multi-epochs-loader); leave that off"),
        (not hasattr(getattr(inner, "dataset", None), "__len__"), "has a dataset without length, whose samples have "
         "no numbers"),
        (getattr(inner, "batch_size", 1) is None, "draws batches of several sizes; leave --input-size-choices off"),
        (isinstance(getattr(inner, "sampler", None), RepeatAugSampler), "repeats images, which the order of all models "
         "does not; leave --aug-repeats off"),
        (getattr(loader, "random_erasing", None) is not None, "erases at random while it trains; use --reprob 0"),
    ):  # fmt: skip
        if is_wrong:
            raise ConfigError(f"CodistillationTask: loader {what}")
    batches = _Batches(len(inner.dataset), int(inner.batch_size), data_seed, before)
    # A loader refuses to have these replaced once it is made, but reads them only when an iteration begins.
    for name, value in (
        ("dataset", _Drawn(inner.dataset, data_seed)),
        ("batch_sampler", batches),
        ("collate_fn", (_Mixed if isinstance(inner.collate_fn, FastCollateMixup) else _Collated)(inner.collate_fn)),
    ):
        object.__setattr__(inner, name, value)
    return batches
