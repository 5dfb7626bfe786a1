"""Owns the training loop: one update after another, with the schedules, evaluations and checkpoints between them."""

import contextlib
import dataclasses
import hashlib
import logging
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_codistill import schedules
from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.coordinator import AlignmentError, NoPeersError
from fairseq_codistill.lookahead import with_next
from fairseq_codistill.sampling import Timetable

from . import checkpoints
from .broken import BrokenImageError
from .config import VisionConfig
from .data import Batch, Loader, pixel_settings, train_loader, train_transform_of, valid_loader
from .datasets import Images
from .distributed import Place, wrap_model
from .exchange import PeerExchange
from .log import RunLog
from .metrics import Sums, evaluate
from .mixing import Mixing
from .models import Distance, make_optimizer
from .prefetch import in_groups, on_device
from .step import Step, finite_buffers, loss_scale
from .stop import NonFiniteLossError, NonFiniteRun, Stop

logger = logging.getLogger("vision.engine")
STOP_CHECK_UPDATES = 10  # ranks of a model agree every so many updates on whether to stop
SLOW_UPDATE_S = 0.5  # from where on they do at every update: who asks them to end does not wait long
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(config: VisionConfig, progress: float, batch_size: int) -> float:
    """The learning rate in force.

    Args:
        config: validated options.
        progress: epochs since the start.
        batch_size: of this model, over all its devices.
    """
    peak = schedules.scaled_learning_rate(config.lr, batch_size, config.lr_batch_size)
    if config.lr_schedule == "step":
        rate = peak * schedules.step_decay(progress, config.lr_milestones, config.lr_decay)
    elif config.lr_schedule == "cosine":
        rate = peak * schedules.half_cosine(progress, config.epochs)
    else:
        rate = peak
    start = config.warmup_lr if config.warmup_lr >= 0 else min(config.lr, peak)
    return schedules.warm_up(rate, start, progress, config.warmup_epochs)


def update_seed(seed: int, rank: int, elapsed: int) -> int:
    """Seed of the random numbers (dropout) of one update on one rank: resuming needs no state of a generator."""
    name = repr((seed, rank, elapsed)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


class Trainer:
    """One rank of one model.

    Args:
        config: validated options.
        place: of this process in its model.
        images: the data set.
        model: on the device, at its start.
        timetable: of the run.
        exchange: with the other models.
    """

    def __init__(
        self,
        config: VisionConfig,
        place: Place,
        images: Images,
        model: nn.Module,
        timetable: Timetable,
        exchange: PeerExchange,
    ):
        self.config, self.place, self.images, self.model = config, place, images, model
        self.timetable, self.exchange = timetable, exchange
        self.folder = None if config.no_save else Path(config.save_dir)
        self.elapsed, self.best_top1 = 0, -1.0  # so that the first evaluation is the best one
        self.evaluated_at = 0  # position of the latest evaluation
        self._asks_every, self._asked_time = 1, time.monotonic()
        self.evaluate_every = max(1, round(config.eval_epochs * timetable.updates_per_epoch))
        self.stop_at = max(1, round(config.epochs * timetable.updates_per_epoch))
        self.stop_at = min(self.stop_at, config.max_updates or self.stop_at)
        if config.verify_baseline:
            self.stop_at = timetable.updates_per_epoch
        self.sums = Sums(place.device)
        self.nonfinite = NonFiniteRun(place.device)
        self.last_valid: dict[str, float] = {}  # figures of the latest evaluation
        self.distance = Distance(model)
        self.finite = checkpoints.Finite(model)
        self.stored_optimizer = make_optimizer(config, model)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.amp == "fp16")
        train_transform_of(config, images)  # a policy that timm does not know is an error before the models meet
        self.mixing = Mixing(config, images.num_classes, place.rank) if config.is_mixed else None
        self._valid_loader: Loader | None = None
        self.ema: ModelEmaV3 | None = None
        self._resume()
        self.wrapped, self.optimizer = wrap_model(config, place, model, self.stored_optimizer, self.elapsed)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.wrapped) if config.compile else self.wrapped
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(images.mean, device=place.device).view(shape) * 255
        self._std = torch.tensor(images.std, device=place.device).view(shape) * 255

    def train(self, log: RunLog, stop: Stop) -> str:
        """Train until the end, or until a signal, after which there is a checkpoint to go on from.

        Returns:
            why it ended: ``finished``, or the name of the signal, which is the same on all ranks.

        Raises:
            NonFiniteLossError: the loss was not finite for ``--max-nonfinite`` updates in a row. The last checkpoint is
                one whose parameters are finite.
            SaveError: a file cannot be written.
            BrokenImageError: an image cannot be read. With this and the next two, what was learned so far is saved.
            NoPeersError: no other model is left, and one is always required.
            AlignmentError: the other models train on other batches.
        """
        self.model.train()
        stop.is_training = True
        if self._is_due():  # training was interrupted just before it
            self.evaluate(log)
            self.save()
            if number := self.place.largest(stop.number):
                return signal.Signals(number).name
        self.sums.restart()
        self._catch_up(log, within_reach=False)
        try:
            return self._train_on(log, stop)
        except (BrokenImageError, NoPeersError, AlignmentError):
            # No update that was made need be lost. A rank may be alone with its error, and has the parameters of all,
            # but between the averages of local steps.
            self.save(by_any_rank=True)
            raise

    def _train_on(self, log: RunLog, stop: Stop) -> str:
        config = self.config
        on_gpu = self.place.device.type == "cuda"
        speed = None
        while self.elapsed < self.stop_at:
            loader = train_loader(
                config, self.images, self.timetable, self.place.rank, self.elapsed, self.stop_at, pin_memory=on_gpu
            )
            batches = on_device(loader, self.place.device)
            pairs = with_next(batches) if config.codistill_lookahead else ((batch, None) for batch in batches)
            for group in in_groups(pairs, config.update_freq):
                self.update([batch for batch, _ in group], [following for _, following in group])
                self.elapsed += 1
                is_end = self.elapsed == self.stop_at
                if self.elapsed % config.log_updates == 0 or is_end:
                    record = self.sums.train_record(self.place)
                    speed = record["images_per_s"]
                    log.write("train", self.elapsed, **record, **self._schedule_record(), distance=self.distance())
                    self.sums.restart()
                log.advance(speed)
                self._check_finite(is_end)
                if not is_end and (number := self._signal_to_any_rank(stop)):
                    self._settle()
                    self.save()
                    return signal.Signals(number).name
                is_evaluated = self._is_due() or is_end
                with self.sums.paused():
                    if is_evaluated:
                        self._settle()
                        self.save()  # an evaluation may be long, and is made again where it is not finished
                        self.evaluate(log)
                        self.save()
                    elif config.save_updates and self.elapsed % config.save_updates == 0:
                        self._settle()
                        self.save()
                if is_evaluated and not is_end and (number := self.place.largest(stop.number)):
                    return signal.Signals(number).name  # it came meanwhile, and all is saved
                if not is_end and self._catch_up(log):
                    break  # the loader would go on with the batches that are skipped
        if config.max_nonfinite and not self.finite.holds(self.model.state_dict()):
            raise NonFiniteLossError("parameters are not finite at the end of training; what was saved last is finite")
        return "finished"

    def _settle(self) -> None:
        """Where each rank takes steps of its own: one model of all, before it is saved or evaluated."""
        if self.config.comm_hook == "post_localsgd" and self.elapsed > self.config.hook_start:
            self.place.average(self.model)
            if self.ema is not None:
                self.place.average(self.ema.module)

    def _is_due(self) -> bool:
        """Whether an evaluation is, or was at a position that was passed without one."""
        return self.elapsed // self.evaluate_every > self.evaluated_at // self.evaluate_every

    def _catch_up(self, log: RunLog, within_reach: bool = True) -> bool:
        """Skip the batches that lie between this model and the others; returns whether there were any."""
        if within_reach and not self._ranks_ask_now():
            return False
        behind = self.place.largest(self.exchange.peers.num_behind(self.elapsed, within_reach))
        if not behind:
            return False
        target = min(self.elapsed + behind, self.stop_at - 1)  # the last update brings the last evaluation
        logger.warning(
            "codistillation: the other models are ahead; skipped %d updates' worth of batches, from update %d to %d",
            target - self.elapsed,
            self.elapsed,
            target,
        )
        log.write("skip", target, skipped=target - self.elapsed)
        self.elapsed = target
        return True

    def update(self, batches: Sequence[Batch], following: Sequence[Batch | None] = ()) -> None:
        """One update (Algorithm 1 of the paper, lines 3 to 5) with this rank's batches, of equal size.

        Args:
            batches: of the update.
            following: after each of them the one that comes next, for ``--codistill-lookahead``.
        """
        torch.manual_seed(update_seed(self.config.seed, self.place.rank, self.elapsed))
        self._set_schedules()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.place.device)
        with finite_buffers(self.model, self.scaler.is_enabled()):
            for index, batch in enumerate(batches):
                # Gradients are averaged over the ranks once, with the last batch.
                with contextlib.nullcontext() if index == len(batches) - 1 else self._no_sync():
                    step = Step(self, batch, index, following[index] if following else None)
                    total += step.run(len(batch.targets) * len(batches))
        scale = loss_scale(self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.nonfinite.add(total)
        if self.ema is not None:
            self.ema.update(self.model, step=self.elapsed + 1)
            self.finite.mend(self.ema.module, self.model)
        # The data position goes on where fp16 skips an update: the other models do not skip theirs.
        self.sums.add(updates=1, overflows=loss_scale(self.scaler).lt(scale).float())

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        return self.wrapped.no_sync() if isinstance(self.wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def predict(self, images: Tensor) -> Tensor:
        """(batch, 3, size, size) uint8 images -> (batch, num_classes) float32 logits of what is evaluated."""
        return self.logits(self.evaluated, self.normalised(images))

    @property
    def evaluated(self) -> nn.Module:
        """The moving average of the model where there is one, else the model as it is."""
        return self.model if self.ema is None else self.ema.module

    def normalised(self, images: Tensor) -> Tensor:
        """(batch, 3, size, size) uint8 images -> float32 on the device, as the model takes them."""
        inputs = (images.to(self.place.device, non_blocking=True).float() - self._mean) / self._std
        return inputs.contiguous(memory_format=torch.channels_last) if self.config.channels_last else inputs

    def logits(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """(batch, num_classes) float32 logits, in the precision that is set."""
        precision = DTYPES.get(self.config.amp)
        with torch.autocast(self.place.device.type, precision, enabled=self.config.amp != "none"):
            return forward(inputs).float()

    def evaluate(self, log: RunLog) -> None:
        """Evaluate on all ranks, and keep the checkpoint if it is the best one."""
        self.place.share_buffers(self.model)
        if self.ema is not None:
            self.place.share_buffers(self.ema.module)
        self.model.eval()
        if self._valid_loader is None:
            place, on_gpu = self.place, self.place.device.type == "cuda"
            self._valid_loader = valid_loader(self.config, self.images, place.rank, place.world_size, pin_memory=on_gpu)
        batches = on_device(self._valid_loader, self.place.device)
        record = self.last_valid = evaluate(self.predict, batches, self.place, self.exchange.peers.poll)
        self.exchange.peers.tell_validation(record["valid_loss"])
        self.model.train()
        self.evaluated_at = self.elapsed
        is_best = record["valid_top1"] > self.best_top1
        self.best_top1 = max(self.best_top1, record["valid_top1"])
        log.write("valid", self.elapsed, **record, distance=self.distance(), best_top1=self.best_top1)
        if is_best:
            self.save(checkpoints.BEST)

    def save(self, name: str = checkpoints.LAST, by_any_rank: bool = False) -> None:
        """Write a checkpoint, if all parameters are finite; the first rank does, or every one that is told to.

        Raises:
            SaveError: it cannot be written.
        """
        if self.folder is None or not (self.place.is_first or by_any_rank):
            return
        state = self.model.state_dict()
        ema = {} if self.ema is None else self.ema.module.state_dict()
        if not (self.finite.holds(state) and self.finite.holds(ema)):
            logger.warning(
                "%s is not written at update %d: there are parameters that are not finite", name, self.elapsed
            )
            return
        checkpoint = checkpoints.Checkpoint(
            model=state,
            optimizer=self.stored_optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            elapsed=self.elapsed,
            replicas=self.exchange.peers.replicas_state(),
            best_top1=self.best_top1,
            options=self._options(),
            evaluated_at=self.evaluated_at,
            ema=ema,
        )
        checkpoints.save(self.folder, name, checkpoint, "" if self.place.is_first else f".rank{self.place.rank}")
        if name == checkpoints.BEST:
            checkpoints.save_best_weights(self.folder, checkpoint, self.config.safetensors)

    def _signal_to_any_rank(self, stop: Stop) -> int:
        """Number of a signal that came to any rank; 0 for none."""
        if not self._ranks_ask_now():
            return 0
        now = time.monotonic()
        if self.place.world_size > 1 and self.elapsed % STOP_CHECK_UPDATES == 0:
            spent_ms = self.place.largest(int(1000 * (now - self._asked_time)))
            self._asks_every = 1 if spent_ms > 1000 * STOP_CHECK_UPDATES * SLOW_UPDATE_S else STOP_CHECK_UPDATES
            self._asked_time = time.monotonic()
        return self.place.largest(stop.number)

    def _check_finite(self, is_end: bool) -> None:
        """Raises: NonFiniteLossError, on all ranks at once."""
        most = self.config.max_nonfinite
        on_cpu = self.place.device.type == "cpu" and self.place.world_size == 1
        # Elsewhere asking waits for the device, and for the other ranks.
        if most and (on_cpu or is_end or self.elapsed % STOP_CHECK_UPDATES == 0):
            self.nonfinite.check(most, self.elapsed, self.place.largest)

    def _ranks_ask_now(self) -> bool:
        """Ranks stop, and skip, at the same update, so they ask each other, now and then."""
        return self.place.world_size == 1 or self.elapsed % self._asks_every == 0

    def _resume(self) -> None:
        checkpoint = None if self.folder is None else checkpoints.load(self.folder)
        if checkpoint is not None and self.folder is not None:
            checkpoints.check_options(checkpoint, self._options(), self.folder)
            checkpoints.load_into(self.model, checkpoint.model, self.folder)
            self.stored_optimizer.load_state_dict(checkpoint.optimizer)
            if checkpoint.scaler:  # none of a training without --amp fp16
                self.scaler.load_state_dict(checkpoint.scaler)
            self.exchange.peers.load_replicas_state(checkpoint.replicas)
            self.elapsed, self.best_top1 = checkpoint.elapsed, checkpoint.best_top1
            self.evaluated_at = self.elapsed if checkpoint.evaluated_at is None else checkpoint.evaluated_at
            logger.info("going on from %s, update %d", self.folder / checkpoints.LAST, self.elapsed)
            if self.place.is_first:
                checkpoints.tell_changes(checkpoint, self._options(), self.folder)
                self.exchange.peers.compare_settings(checkpoint.options)
        if self.config.ema_decay:  # from here on, where the checkpoint has none
            self.ema = ModelEmaV3(self.model, self.config.ema_decay, use_warmup=self.config.ema_warmup)
            if checkpoint is not None and checkpoint.ema:
                self.ema.module.load_state_dict(checkpoint.ema)
                self.finite.mend(self.ema.module, self.model)  # earlier versions did not
        found = self.place.gather(self.elapsed)
        if len(set(found)) > 1:
            raise ConfigError(
                f"--save-dir is {str(self.folder)!r}: the ranks of this model find checkpoints of updates {found} in "
                "it; give a folder that all of them see"
            )

    def _options(self) -> dict[str, Any]:
        images = self.images
        found = {"num_images": len(images.train), "pixels": pixel_settings(self.config, images)}
        found["class_names"] = list(images.classes)
        return {**dataclasses.asdict(self.config), "devices_per_model": self.place.world_size, **found}

    def _set_schedules(self) -> None:
        values = self._schedule_record()
        for group in self.stored_optimizer.param_groups:
            group["lr"] = values["lr"]
            if group["is_decayed"]:
                group["weight_decay"] = values["weight_decay"]

    def rate_at(self, elapsed: int) -> float:
        """The learning rate after so many updates."""
        config = self.config
        batch_size = config.batch_size * config.update_freq * self.place.world_size
        return learning_rate(config, self.timetable.progress(elapsed), batch_size)

    def decay_at(self, elapsed: int) -> float:
        """The weight decay after so many updates."""
        progress = self.timetable.progress(elapsed)
        return schedules.staircase(self.config.weight_decay, progress, self.config.weight_decay_milestones)

    def _schedule_record(self) -> dict[str, float]:
        return {"lr": self.rate_at(self.elapsed), "weight_decay": self.decay_at(self.elapsed)}
