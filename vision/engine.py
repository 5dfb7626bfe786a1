"""Owns the training loop: one update after another, with the schedules, evaluations and checkpoints between them."""

import dataclasses
import hashlib
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_codistill import schedules
from fairseq_codistill.sampling import Timetable

from . import checkpoints
from .config import VisionConfig
from .data import Batch, train_loader, valid_loader
from .datasets import Images
from .distributed import Place, wrap_model
from .exchange import PeerExchange
from .log import RunLog
from .metrics import Sums, evaluate
from .models import Distance, make_optimizer

logger = logging.getLogger("vision.engine")
STOP_CHECK_UPDATES = 10  # ranks of a model agree every so many updates on whether to stop
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Stop:
    """Remembers that SIGTERM or SIGINT came, once there is something to save; a second SIGINT ends the process at once.

    Attributes:
        reason: name of the signal; empty until one came.
        is_training: set it once there is something to save. Before, a signal ends the process by ``SystemExit``.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.is_training = False
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if not self.is_training:
            sys.exit(128 + number)
        self.reason = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
        self.stop_at = round(config.epochs * timetable.updates_per_epoch)
        if config.max_updates:
            self.stop_at = min(self.stop_at, config.max_updates)
        self.sums = Sums(place.device)
        self.distance = Distance(model)
        self.stored_optimizer = make_optimizer(config, model)
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.amp == "fp16")
        self._resume()
        self.wrapped, self.optimizer = wrap_model(config, place, model, self.stored_optimizer, self.elapsed)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.wrapped) if config.compile else self.wrapped
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(images.mean, device=place.device).view(shape) * 255
        self._std = torch.tensor(images.std, device=place.device).view(shape) * 255

    def train(self, log: RunLog, stop: Stop) -> str:
        """Train until the end, or until a signal.

        Returns:
            why it ended.
        """
        config = self.config
        evaluate_every = max(1, round(config.eval_epochs * self.timetable.updates_per_epoch))
        on_gpu = self.place.device.type == "cuda"
        self.model.train()
        self.sums.restart()
        stop.is_training = True
        speed = None
        self._catch_up(log, within_reach=False)
        while self.elapsed < self.stop_at:
            loader = train_loader(
                config, self.images, self.timetable, self.place.rank, self.elapsed, self.stop_at, pin_memory=on_gpu
            )
            for batch in loader:
                self.update(batch)
                self.elapsed += 1
                is_end = self.elapsed == self.stop_at
                if self.elapsed % config.log_updates == 0 or is_end:
                    record = self.sums.train_record(self.place)
                    speed = record["images_per_s"]
                    log.write("train", self.elapsed, **record, **self._schedule_record(), distance=self.distance())
                    self.sums.restart()
                log.advance(speed)
                if not is_end and self._must_stop(stop):
                    self.save()
                    return stop.reason or "a signal to another rank"
                if self.elapsed % evaluate_every == 0 or is_end:
                    self.evaluate(log)
                    self.save()
                elif config.save_updates and self.elapsed % config.save_updates == 0:
                    self.save()
                if not is_end and self._catch_up(log):
                    break  # the loader would go on with the batches that are skipped
        return "finished"

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

    def update(self, batch: Batch) -> None:
        """One update (Algorithm 1 of the paper, lines 3 to 5) with this rank's batch."""
        config, device = self.config, self.place.device
        torch.manual_seed(update_seed(config.seed, self.place.rank, self.elapsed))
        self._set_schedules()
        targets = batch.targets.to(device, non_blocking=True)
        inputs = self._normalised(batch.images)
        predictions = self._logits(self.forward, inputs)
        smoothing = schedules.label_smoothing(
            config.label_smoothing,
            config.label_smoothing_end,
            self.timetable.epoch(self.elapsed),
            self.elapsed,
            config.label_smoothing_decay_updates,
            config.label_smoothing_decay_epochs,
            config.label_smoothing_drop_epoch,
        )
        supervised = F.cross_entropy(predictions, targets, reduction="sum", label_smoothing=smoothing)
        term = self.exchange.term(
            predictions, self.elapsed, batch.fingerprint, lambda replica: self._logits(replica, inputs), self.sums
        )
        loss = supervised if term is None else supervised + term
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss / len(targets)).backward()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The data position goes on where fp16 skips an update: the other models do not skip theirs.
        self.sums.add(
            updates=1,
            images=len(targets),
            loss=loss.detach(),
            nll_loss=supervised.detach(),
            correct=(predictions.detach().argmax(dim=1) == targets).sum(),
            overflows=float(self.scaler.get_scale() < scale),
        )

    def predict(self, images: Tensor) -> Tensor:
        """(batch, 3, size, size) uint8 images -> (batch, num_classes) float32 logits of the model as it is."""
        return self._logits(self.model, self._normalised(images))

    def _normalised(self, images: Tensor) -> Tensor:
        inputs = (images.to(self.place.device, non_blocking=True).float() - self._mean) / self._std
        return inputs.contiguous(memory_format=torch.channels_last) if self.config.channels_last else inputs

    def _logits(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        precision = DTYPES.get(self.config.amp)
        with torch.autocast(self.place.device.type, precision, enabled=self.config.amp != "none"):
            return forward(inputs).float()

    def evaluate(self, log: RunLog) -> None:
        """Evaluate on all ranks, and keep the checkpoint if it is the best one."""
        self.place.share_buffers(self.model)
        self.model.eval()
        on_gpu = self.place.device.type == "cuda"
        loader = valid_loader(self.config, self.images, self.place.rank, self.place.world_size, pin_memory=on_gpu)
        record = evaluate(self.predict, loader, self.place, self.exchange.peers.poll)
        self.model.train()
        is_best = record["valid_top1"] > self.best_top1
        self.best_top1 = max(self.best_top1, record["valid_top1"])
        log.write("valid", self.elapsed, **record, distance=self.distance(), best_top1=self.best_top1)
        if is_best:
            self.save(checkpoints.BEST)

    def save(self, name: str = checkpoints.LAST) -> None:
        """Write a checkpoint; the first rank does."""
        if self.folder is None or not self.place.is_first:
            return
        checkpoint = checkpoints.Checkpoint(
            model=self.model.state_dict(),
            optimizer=self.stored_optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            elapsed=self.elapsed,
            replicas=self.exchange.peers.replicas_state(),
            best_top1=self.best_top1,
            options=self._options(),
        )
        checkpoints.save(self.folder, name, checkpoint)

    def _must_stop(self, stop: Stop) -> bool:
        """Whether a signal came to any rank."""
        return self._ranks_ask_now() and self.place.any(bool(stop.reason))

    def _ranks_ask_now(self) -> bool:
        """Ranks stop, and skip, at the same update, so they ask each other, now and then."""
        return self.place.world_size == 1 or self.elapsed % STOP_CHECK_UPDATES == 0

    def _resume(self) -> None:
        checkpoint = None if self.folder is None else checkpoints.load(self.folder)
        if checkpoint is None or self.folder is None:
            return
        checkpoints.check_options(checkpoint, self._options(), self.folder)
        self.model.load_state_dict(checkpoint.model)
        self.stored_optimizer.load_state_dict(checkpoint.optimizer)
        self.scaler.load_state_dict(checkpoint.scaler)
        self.exchange.peers.load_replicas_state(checkpoint.replicas)
        self.elapsed, self.best_top1 = checkpoint.elapsed, checkpoint.best_top1
        logger.info("going on from %s, update %d", self.folder / checkpoints.LAST, self.elapsed)

    def _options(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.config), "devices_per_model": self.place.world_size}

    def _set_schedules(self) -> None:
        values = self._schedule_record()
        for group in self.stored_optimizer.param_groups:
            group["lr"] = values["lr"]
            if group["is_decayed"]:
                group["weight_decay"] = values["weight_decay"]

    def _schedule_record(self) -> dict[str, float]:
        config, progress = self.config, self.timetable.progress(self.elapsed)
        batch_size = config.batch_size * self.place.world_size
        return {
            "lr": learning_rate(config, progress, batch_size),
            "weight_decay": schedules.staircase(config.weight_decay, progress, config.weight_decay_milestones),
        }
