"""Owns the copies of the peers that a model keeps when checkpoints are exchanged instead of predictions.

A copy is made of what travelled: parameters and buffers (the statistics of BatchNorm are part of what a model
predicts). It is swapped in whole or not at all. Framework-neutral: modules and tensors, no fairseq.
"""

import copy
import functools
import hashlib
import logging
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.codecs.codec import CodecError, as_bytes, from_bytes

logger = logging.getLogger(__name__)

COMPILED = "_orig_mod."  # which torch.compile(model) puts before names
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Layout:
    """What a checkpoint on the wire consists of: the tensors of a module in order, floats in one dtype.

    Args:
        module: the model; a parameter that is shared inside it travels once.
        codec: ``fp32``, ``fp16`` or ``bf16``, how floating-point tensors travel; others keep their dtype.

    Attributes:
        codec: as given.
        num_bytes: exact length of a payload.
        digest: 16 bytes; equal for two models exactly when names, shapes and dtypes on the wire are.
    """

    def __init__(self, module: nn.Module, codec: str):
        self.codec = codec
        self._entries = [
            (name, tuple(tensor.shape), DTYPES[codec] if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors_of(module).items()
        ]
        # Of a mask that is -inf in places no value says anything; of all else one that is not finite is damage.
        self._finite = [bool(tensor.detach().isfinite().all()) for tensor in tensors_of(module).values()]
        self._sizes = [torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in self._entries]
        self.num_bytes = sum(self._sizes)
        self.digest = hashlib.blake2b(repr(self._entries).encode(), digest_size=16).digest()

    def encode(self, module: nn.Module) -> memoryview:
        """All tensors of ``module`` as they are now, in one buffer that later updates do not change.

        Raises:
            CodecError: a value is finite in the model and not in the dtype that travels.
        """
        payload = torch.empty(self.num_bytes, dtype=torch.uint8)
        start = 0
        for (name, _, dtype), size, tensor in zip(self._entries, self._sizes, tensors_of(module).values(), strict=True):
            flat = tensor.detach().to(device="cpu", dtype=dtype).reshape(-1)
            if dtype is torch.float16 and not torch.equal(
                flat.isfinite(), tensor.detach().cpu().isfinite().reshape(-1)
            ):
                raise CodecError(f"{name} has values beyond the range of fp16; use --codistill-codec fp32 or bf16")
            if size:
                payload[start : start + size] = flat.contiguous().view(torch.uint8)
            start += size
        return as_bytes(payload)

    def decode(self, payload: bytes | memoryview) -> dict[str, Tensor]:
        """Name -> tensor, on the CPU, in the dtype that travelled; new memory.

        Raises:
            CodecError: the payload has another length, or holds a value that is not finite.
        """
        if len(payload) != self.num_bytes:
            raise CodecError(f"checkpoint of {len(payload)} bytes, but this model takes {self.num_bytes}")
        found, start = {}, 0
        for (name, shape, dtype), size, is_finite in zip(self._entries, self._sizes, self._finite, strict=True):
            tensor = from_bytes(bytes(memoryview(payload)[start : start + size]), dtype)
            if is_finite and dtype.is_floating_point and not bool(tensor.isfinite().all()):
                raise CodecError(f"{name} of the checkpoint is not finite")
            found[name] = tensor.view(shape)
            start += size
        return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by name; one that is shared appears once, one that is not saved (a constant) never.

    Names are those without ``torch.compile``, which not every model of a run may use.
    """
    saved = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    found = {**dict(module.named_parameters()), **buffers}
    return {name.replace(COMPILED, ""): tensor for name, tensor in found.items()}


def copied(module: nn.Module) -> nn.Module:
    """A copy, also of a module that keeps what it computed, such as ``weight_norm``'s weight or its own last output.

    What is a view of a parameter, as tied weights may be, is one of the copy's.

    Raises:
        ConfigError: the ``forward`` of an instance is a function of its own, which would call the model, not the copy.
    """
    memo: dict[int, Any] = {}
    own = {id(tensor): copy.deepcopy(tensor, memo) for tensor in tensors_of(module).values() if tensor.is_leaf}
    kept = (tensor for part in module.modules() for value in vars(part).values() for tensor in _tensors_in(value))
    for tensor in kept:
        if not tensor.is_leaf and id(tensor) not in memo:
            memo[id(tensor)] = _view_like(tensor, own.get(id(tensor._base)))
    twin = copy.deepcopy(module, memo)
    for part, other in zip(module.modules(), twin.modules(), strict=True):
        if _is_shared(vars(part).get("forward"), vars(other).get("forward")):
            raise ConfigError(
                f"the forward() of a {type(part).__name__} was replaced by a function, which a copy of it would share, "
                "so that every peer would predict what this model does: wrap or compile the module in place of its "
                "forward(), as torch.compile(model) does, or take --codistill-exchange predictions"
            )
        if isinstance(other, nn.SyncBatchNorm):
            kind: Any = type(other)  # a subclass, such as timm's, does more, and comes first
            other.__class__ = _OfOneRank if kind is nn.SyncBatchNorm else type(kind.__name__, (kind, _OfOneRank), {})
    return twin


def _is_shared(forward: Any, copied_forward: Any) -> bool:
    """Whether what was put in place of a ``forward`` calls the model in the copy as well.

    A function does, and what has a weak reference to its module (fairscale's ``checkpoint_wrapper``).
    """
    if forward is None or forward is copied_forward:
        return forward is not None
    bound = (*forward.args, *forward.keywords.values()) if isinstance(forward, functools.partial) else ()
    return any(isinstance(value, weakref.ref) for value in bound)


class _OfOneRank(nn.SyncBatchNorm):
    """In a copy, which each rank has at a time of its own: it waits for no other rank."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.modules.batchnorm._BatchNorm.forward(self, inputs)


def _view_like(tensor: Tensor, base: Tensor | None) -> Tensor:
    """The same view of the copy of what it is a view of; a copy of its own where it is of none."""
    if base is None or tensor._base is None:
        return tensor.detach().clone()
    offset = tensor.storage_offset() - tensor._base.storage_offset() + base.storage_offset()
    return base.detach().as_strided(tensor.size(), tensor.stride(), offset)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(entry)


def _is_frozen(part: nn.Module) -> bool:
    """Whether it is batch normalisation that predicts by its running statistics."""
    return isinstance(part, nn.modules.batchnorm._BatchNorm) and not part.training


def _has_batch_statistics(module: nn.Module) -> bool:
    """Whether it has batch normalisation that predicts, as it is now, by the statistics of the batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in module.modules())


class Replicas:
    """The peers as they were at their last checkpoint.

    Args:
        module: this model, not wrapped for data parallelism; the copies have its structure and its device.
        codec: how floating-point tensors travel.
        mode: ``--codistill-replica-mode``: ``train`` (with dropout, and with the batch's own statistics), ``eval``, or
            ``auto``: ``train`` where the module has batch normalisation that is not frozen (in evaluation mode, as in
            fine-tuning; what is frozen is so in the copies). Its running statistics lag behind parameters
            that change fast, and what a copy predicts with them is then so far off that training diverges; what a
            model sends of itself with ``--codistill-exchange predictions`` comes from the batch's statistics too.

    Attributes:
        elapsed: model -> position of its copy, in updates' worth of batches.
    """

    def __init__(self, module: nn.Module, codec: str = "fp32", mode: str = "auto"):
        self.layout = Layout(module, codec)
        self.elapsed: dict[int, int] = {}
        copied(module)  # one that cannot be is refused here, and not at the first checkpoint
        self._module = module
        self._mode = mode
        self._copies: dict[int, nn.Module] = {}

    def settings(self, max_message_mb: float) -> dict[str, str]:
        """What the other models are told, so that those whose checkpoints do not fit are refused at the meeting.

        Args:
            max_message_mb: ``--codistill-max-message-mb``.

        Raises:
            ConfigError: a checkpoint of this model is larger.
        """
        if self.layout.num_bytes > max_message_mb * 2**20:
            raise ConfigError(
                f"--codistill-max-message-mb is {max_message_mb}, but a checkpoint of this model takes "
                f"{self.layout.num_bytes / 2**20:.0f} MiB as {self.layout.codec}; raise it on every model"
            )
        name = "architecture (checkpoints need the same; --codistill-exchange predictions does not)"
        return {name: f"{self.layout.num_bytes} bytes, digest {self.layout.digest.hex()[:12]}"}

    def encode(self) -> memoryview:
        """This model as it is now, as it travels.

        Raises:
            CodecError: a value does not fit into the dtype that travels.
        """
        return self.layout.encode(self._module)

    def swap_in(self, model: int, payload: bytes | memoryview, elapsed: int) -> None:
        """Make what a peer sent its copy.

        Args:
            model: index of the peer.
            payload: of the peer's :meth:`encode`.
            elapsed: the position at which it was made.

        Raises:
            CodecError: the payload cannot be used; the copy stays what it was.
        """
        self._fill(model, self.layout.decode(payload), elapsed)

    def _fill(self, model: int, tensors: dict[str, Tensor], elapsed: int) -> None:
        replica = self._copies.get(model)
        if replica is None:
            replica = copied(self._module).requires_grad_(False)
        with torch.no_grad():
            for name, tensor in tensors_of(replica).items():
                tensor.copy_(tensors[name])
        self._copies[model] = replica
        self.elapsed[model] = elapsed

    @torch.no_grad()
    def predict(self, forward: Callable[[nn.Module], Tensor]) -> dict[int, Tensor]:
        """What each copy predicts, without gradient and without touching this model's random numbers.

        Args:
            forward: the copy -> (num_rows, num_classes) logits.
        """
        for replica in self._copies.values():
            self._put_in_mode(replica)
        devices = {parameter.device for parameter in self._module.parameters() if parameter.device.type == "cuda"}
        others = random.getstate(), np.random.get_state()  # noqa: NPY002 - some models mask by what is drawn from it
        try:
            with torch.random.fork_rng(devices=list(devices)):
                return {model: forward(replica) for model, replica in sorted(self._copies.items())}
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002

    def _put_in_mode(self, replica: nn.Module) -> None:
        is_training = self._mode == "train" or (self._mode == "auto" and _has_batch_statistics(self._module))
        replica.train(is_training)
        if is_training and self._mode == "auto":
            for own, copy in zip(self._module.modules(), replica.modules(), strict=True):
                if _is_frozen(own):
                    copy.eval()

    def forget(self, models: Iterable[int]) -> None:
        """Drop the copies of these models, where there are any, until another checkpoint of them comes."""
        for model in models:
            if self._copies.pop(model, None) is not None:
                del self.elapsed[model]
                logger.warning("codistillation: the copy of model %d teaches no more, it has left", model)

    def staleness(self, elapsed: int) -> list[int]:
        """How old each copy is at a position, in updates' worth of batches."""
        return [elapsed - then for _, then in sorted(self.elapsed.items())]

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint of this model: the copies are part of what it learns from next."""
        return {
            "elapsed": {str(model): elapsed for model, elapsed in self.elapsed.items()},
            "copies": {
                str(model): {name: tensor.detach().cpu().clone() for name, tensor in tensors_of(replica).items()}
                for model, replica in self._copies.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any], own: int = -1) -> None:
        """What :meth:`state_dict` gave. Copies that do not fit this model are left out, with a warning.

        Args:
            own: index of this model, which is no peer of its own: a checkpoint of another model may have a copy of it.
        """
        shapes = {name: tensor.shape for name, tensor in tensors_of(self._module).items()}
        for model, tensors in state.get("copies", {}).items():
            if int(model) == own:
                continue
            tensors = {name.replace(COMPILED, ""): tensor for name, tensor in tensors.items()}  # of earlier versions
            if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
                logger.warning("codistillation: the saved copy of model %s does not fit this model; left out", model)
                continue
            self._fill(int(model), tensors, int(state["elapsed"][model]))
