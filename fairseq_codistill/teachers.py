"""Owns the teachers: models that never change, and predict every batch without gradient.

A teacher is a copy of a peer that was read once. It computes in eval mode, on a device of its choice, and this model's
random numbers stay as they are. What a checkpoint is, the host of the training loop knows.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.keys import SampleMarks
from fairseq_codistill.coordinator.predictions import PeerPredictions
from fairseq_codistill.nested import mapped
from fairseq_codistill.option import ConfigError
from fairseq_codistill.sources import check_weight, split_teachers
from fairseq_codistill.teacher_cache import TeacherCache

logger = logging.getLogger(__name__)
Given = nn.Module | tuple[nn.Module, float]
# Of a folder: its weights and what says how to read them. Nothing else in it changes what a teacher predicts.
SAVED = frozenset((".safetensors", ".bin", ".pt", ".pth", ".json"))
# What a trainer keeps beside them to go on from.
OF_TRAINING = ("optimizer", "scheduler", "training_args", "trainer_state", "rng_state", "codistill.pt")


class Placed(nn.Module):
    """A teacher where it computes: tensors go there on the way in. What else a loop asks of a model is asked of it."""

    def __init__(self, module: nn.Module, device: torch.device):
        super().__init__()
        self.module, self._device = module, device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module predicts, left on its device."""
        args, kwargs = mapped((args, kwargs), lambda values: values.to(self._device))
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Teachers:
    """All teachers of one model.

    Args:
        config: validated options.
        given: modules, each alone or with its weight.

    Raises:
        ConfigError: a file is not there, a weight is none, or a cache without a teacher.
    """

    def __init__(self, config: CodistillationConfig, given: Iterable[Given] = ()):
        self._config = config
        self._modules: list[nn.Module | None] = []
        self.weights: list[float] = []
        self._files: list[str] = []
        for place, entry in enumerate(given):
            module, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
            if not isinstance(module, nn.Module):
                raise ConfigError(f"teachers[{place}] is a {type(module).__name__}; give a module, or (module, weight)")
            is_number = isinstance(weight, (int, float))
            checked = check_weight(float(weight) if is_number else math.nan, f"teachers[{place}] has weight {weight!r}")
            self._add(module, checked, "")
        for file, weight in split_teachers(config.codistill_teacher):
            if not Path(file).exists():
                raise ConfigError(f"--codistill-teacher is {file!r}, which is not there; give the file of a checkpoint")
            self._add(None, weight, file)
        if config.codistill_teacher_cache and not self:
            raise ConfigError(
                f"--codistill-teacher-cache is {config.codistill_teacher_cache!r} without a teacher; give "
                "--codistill-teacher CHECKPOINT"
            )
        self._cache: TeacherCache | None = None
        self._load: Callable[[str], nn.Module] | None = None
        self._model: nn.Module | None = None
        self._placed: list[nn.Module] = []

    def _add(self, module: nn.Module | None, weight: float, file: str) -> None:
        self._modules.append(module)
        self.weights.append(weight)
        self._files.append(file)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def has_cache(self) -> bool:
        """Whether batches must say what their samples are."""
        return bool(self._config.codistill_teacher_cache)

    def prepare(
        self,
        model: nn.Module,
        load: Callable[[str], nn.Module] | None,
        about: Mapping[str, Any],
        sees_inputs: bool = True,
    ) -> None:
        """Before training: read the files, and open the cache.

        Args:
            model: that is taught, on its device, without any wrapper.
            load: file of a checkpoint -> the model in it.
            about: what the samples belong to, for the cache.
            sees_inputs: a sample is known by its inputs too, or they are the same in every pass.

        Raises:
            ConfigError: a file is no checkpoint that this loop can read, or the cache belongs to something else or
                would give one input the predictions of another.
        """
        if self.has_cache and not sees_inputs:
            raise ConfigError(
                f"--codistill-teacher-cache is {self._config.codistill_teacher_cache!r}, and this training loop knows "
                "a sample by its id and targets alone: where its inputs are drawn anew in every pass (crops, masks, "
                "mixing), what a teacher predicted of others would be read. Leave the cache out; a loop of your own "
                "whose inputs never change says so: meet(..., fixed_inputs=True)"
            )
        if any(self._files) and load is None:
            raise ConfigError(
                f"--codistill-teacher is {next(filter(None, self._files))!r}, and this training loop cannot read "
                "checkpoints; give modules: Codistiller(teachers=[module])"
            )
        taught = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        for module in filter(None, self._modules):
            if module is model or any(id(each) in taught for each in module.parameters()):  # and would be no more
                raise ConfigError(
                    "one of the teachers shares parameters with the model that is taught, or is it; give a copy of it: "
                    "copy.deepcopy(model)"
                )
        self._model, self._load = model, load
        if self.has_cache:
            config = self._config
            digests = [self._digest(place) for place in range(len(self))]
            self._cache = TeacherCache(config.codistill_teacher_cache, config.codistill_teacher_codec, digests, about)
        if self._cache is None or not len(self._cache):  # else they may never be needed
            self._place()

    @torch.no_grad()
    def predict(
        self,
        forward: Callable[[nn.Module], Tensor] | None,
        rows: Tensor | None,
        samples: SampleMarks | None,
        like: Tensor,
    ) -> list[PeerPredictions]:
        """What each teacher predicts for a batch.

        Args:
            forward: a teacher -> its (num_positions, num_classes) logits.
            rows: (num_rows,) int64, the positions that count; None for all.
            samples: of the batch, in batch order; needed with a cache.
            like: (num_positions, num_classes) logits of this model.

        Raises:
            ConfigError: no ``forward``, another number of classes, or a cache that has become stale.
        """
        if samples is not None and not samples.marks:  # an empty batch
            return [like[:0].detach() for _ in self.weights]
        if self._cache is not None:
            if samples is None:
                raise ConfigError(
                    "--codistill-teacher-cache is set, and this training loop does not say what the samples of a batch "
                    "are; leave the cache out"
                )
            found = self._cache.read(samples, like.size(1), like.device)
            if found is not None:
                return found
        if forward is None:
            raise ConfigError(
                "teachers predict every batch: give loss() or term() forward=lambda teacher: teacher(inputs)"
            )
        if not self._placed:
            self._place()
        logits = [self._ask(teacher, place, forward, rows, like) for place, teacher in enumerate(self._placed)]
        if self._cache is None or samples is None:
            return list(logits)
        self._cache.add(samples, logits)
        stored = self._cache.read(samples, like.size(1), like.device)  # the same now as whenever it is read
        assert stored is not None
        return stored

    def _ask(
        self, teacher: nn.Module, place: int, forward: Callable[[nn.Module], Tensor], rows: Tensor | None, like: Tensor
    ) -> Tensor:
        devices = {value.device for module in (self._model, teacher) if module for value in module.parameters()}
        with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
            logits = forward(teacher).detach()
        if logits.shape != like.shape:
            raise ConfigError(
                f"teacher {self._files[place] or place} predicts {tuple(logits.shape)} logits where this model "
                f"predicts {tuple(like.shape)}; it must know the same classes (or dictionary)"
            )
        return logits if rows is None else logits.index_select(0, rows.to(logits.device))

    def _place(self) -> None:
        assert self._model is not None
        own = next(self._model.parameters(), torch.empty(0))
        for place, module in enumerate(self._modules):
            if module is None:
                assert self._load is not None
                with torch.random.fork_rng():
                    module = self._load(self._files[place])
            wanted = self._config.codistill_teacher_device
            given = next(module.parameters(), own).device
            device = self._device(wanted) if wanted else own.device if self._files[place] else given
            if self._files[place] and own.dtype in (torch.float16, torch.bfloat16) and device == own.device:
                module = module.to(own.dtype)
            module = module.to(device).eval().requires_grad_(False)
            self._placed.append(module if device == own.device else Placed(module, device))
            logger.info(
                "codistillation: teacher %s, weight %g, on %s", self._files[place] or place, self.weights[place], device
            )

    def _device(self, name: str) -> torch.device:
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"--codistill-teacher-device is {name!r}, which cannot be used: {str(error).splitlines()[0]}"
            ) from error
        return device

    def _digest(self, place: int) -> str:
        digest, module = hashlib.blake2b(digest_size=16), self._modules[place]
        if module is None:
            path = Path(self._files[place])
            for part in sorted(path.iterdir()) if path.is_dir() else [path]:
                is_saved = part.suffix in SAVED and not part.name.startswith(OF_TRAINING)
                if part == path or (is_saved and part.is_file()):
                    with part.open("rb") as file:
                        while block := file.read(2**24):
                            digest.update(block)
        else:
            for name, value in module.state_dict().items():
                if isinstance(value, Tensor):
                    digest.update(name.encode())
                    digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def lessons(
    weights: Sequence[float], predictions: Sequence[PeerPredictions]
) -> list[tuple[float, list[PeerPredictions]]]:
    """Teachers of the same weight together, since the loss takes the mean over those it is given: weight of the mean.

    >>> [(weight, len(who)) for weight, who in lessons([1.0, 0.5, 1.0], ["a", "b", "c"])]
    [(2.0, 2), (0.5, 1)]
    """
    groups: dict[float, list[PeerPredictions]] = {}
    for weight, one in zip(weights, predictions, strict=True):
        groups.setdefault(weight, []).append(one)
    return [(weight * len(members), members) for weight, members in groups.items()]
