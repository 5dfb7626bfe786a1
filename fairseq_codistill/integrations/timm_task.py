"""Owns codistillation as a task of timm, for timm's own train script: coordinated batches, the term in the loss, state.

A thin adapter of :class:`~fairseq_codistill.codistiller.Codistiller`. It is timm's classification task in all else:
criterion, DistributedDataParallel, compilation and moving average stay timm's.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_codistill.codistiller import Codistiller
from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.integrations.endings import finish_at_exit

try:
    import timm
    from timm.task import ClassificationTask
    from timm.utils import unwrap_model

    from fairseq_codistill.integrations.timm_batches import are_mixed_elsewhere, coordinate
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
        if self.peers.config.codistill_peer_weights == "validation":
            raise ConfigError(
                "--codistill-peer-weights is 'validation', which timm does not tell a task; use 'uniform'"
            )
        self._batches = coordinate(loader, self.peers.config.codistill_data_seed, self._before_epoch)
        self._loader = loader
        self._is_mixed_elsewhere: bool | None = None  # asked for where targets are vectors

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """timm's loss and output; in training with ``codistill_loss`` (alpha * D) in the loss, and beside it.

        Args:
            input: (batch, channels, height, width).
            target: (batch,) classes, or (batch, num_classes) where images are mixed.
        """
        found: dict[str, Tensor] = super().forward(input, target)
        if not (self.training and torch.is_grad_enabled()):
            return found
        if target.dim() == 2 and self._is_mixed_elsewhere is None:
            self._is_mixed_elsewhere = are_mixed_elsewhere(self._loader)
        if target.dim() == 2 and self._is_mixed_elsewhere:
            raise ConfigError(
                "images are mixed where every model draws by itself; leave --no-prefetcher off, or --mixup"
            )
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
