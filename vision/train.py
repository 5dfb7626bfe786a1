"""Owns the command ``codistill-vision``: options in, a trained model out. ``python -m vision.train`` is the same.

One process is one rank of one model. ``codistill-launch`` starts several models, and torchrun or
``codistill-launch --devices-per-model`` several ranks of a model; without either it is one model on one device.
"""

import contextlib
import dataclasses
import logging
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torchvision

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.coordinator import AlignmentError, NoPeersError
from fairseq_codistill.environment import refuse_to_be_alone
from fairseq_codistill.sampling import Timetable
from fairseq_codistill.whole_files import SaveError

from .baseline import judge, setup_of, trial_of
from .broken import KEPT_NAME, KEPT_TRANSFER_NAME, BrokenImageError
from .checkpoints import prepare, write_missing_weights
from .config import VisionConfig
from .data import augmentation_of
from .datasets import load_images
from .distributed import Place, leave, take_place
from .engine import Trainer
from .exchange import PeerExchange
from .log import RunLog
from .models import make_model, refuse_size
from .options import parse_options
from .origin import tell_other_pixels
from .stop import NonFiniteLossError, Stop
from .transfer import TransferSet

logger = logging.getLogger("vision")
FAILURES = (ConfigError, AlignmentError, NoPeersError, NonFiniteLossError, SaveError, BrokenImageError)


def run(config: VisionConfig, place: Place, stop: Stop) -> tuple[str, Trainer]:
    """Train one rank of one model.

    Returns:
        why training ended, ``finished`` or the name of a signal; and what was trained.

    Raises:
        ConfigError: a setting cannot work, or does not go with those of the other models.
        AlignmentError: the other models train on other batches.
        NoPeersError: none of the other models is there, and one is required.
        NonFiniteLossError, SaveError, BrokenImageError: see :meth:`Trainer.train`.
    """
    kept_in, transfer_kept_in = (
        None if config.no_save else Path(config.save_dir) / name for name in (KEPT_NAME, KEPT_TRANSFER_NAME)
    )
    images = load_images(config, place, kept_in)
    timetable = Timetable(
        len(images.train),
        config.data_divisor,
        config.batch_size * config.update_freq,
        place.world_size,
        config.codistill_data_seed,
        config.stretch,
    )
    if config.hook_start_epochs:
        start = round(config.hook_start_epochs * timetable.updates_per_epoch)
        config = dataclasses.replace(config, hook_start=max(start, 2))  # which PowerSGD needs
    torch.manual_seed(config.seed)
    model = make_model(config, images.num_classes)
    refuse_size(model, config.model, augmentation_of(config, images)[1])
    if place.is_first:
        tell_other_pixels(config, model, images)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model = model.to(place.device, memory_format=layout)  # type: ignore[call-overload]
    transfer = None
    if config.transfer_dataset and config.is_codistilled:
        transfer = TransferSet(config, place, images, transfer_kept_in)
    exchange = PeerExchange(config, place, timetable, transfer)
    stop.interrupt = exchange.interrupt
    reason = "failed"
    try:
        trainer = Trainer(config, place, images, model, timetable, exchange)
        log = RunLog(
            trainer.folder,
            place.is_first,
            trainer.elapsed,
            trainer.stop_at,
            timetable.updates_per_epoch,
            not config.no_progress_bar,
        )
        log.write("start", trainer.elapsed, **_start_record(config, trainer))
        try:
            if trainer.elapsed < trainer.stop_at:
                exchange.meet(images, model, trainer.elapsed, trainer.stop_at)
                reason = trainer.train(log, stop)
            else:
                if trainer.evaluated_at < trainer.elapsed:  # it was ended in its last evaluation
                    trainer.evaluate(log)
                    trainer.save()
                reason = "finished"
            if reason == "finished" and config.safetensors and trainer.folder is not None and place.is_first:
                write_missing_weights(trainer.folder)
        except SystemExit as error:  # a signal while the models meet: nothing was learned
            reason = _signal_of(error)
            with contextlib.suppress(SaveError):
                log.write("end", trainer.elapsed, reason=reason)
            raise
        except Exception as error:
            reason = "failed"
            what = str(error) if isinstance(error, FAILURES) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(SaveError):  # it may be why training failed
                log.write("end", trainer.elapsed, reason=f"failed: {what}")
            raise
        else:
            log.write("end", trainer.elapsed, reason=reason)
        finally:
            log.close()
    finally:
        exchange.peers.close(reason)
    return reason, trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``codistill-vision``.

    Returns:
        0 when training is finished; 128 + the number of the signal that interrupted it, after it was saved; 2 for a
        setting that cannot work; 1 for other errors: other models that are not there or train on other batches, a loss
        that is not finite, a disk that is full, an image that cannot be read. With ``--verify-baseline`` a
        :class:`~vision.baseline.Verdict` where there would be 0.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s | %(levelname)s | %(name)s | %(message)s", stream=sys.stderr
    )
    try:
        config = parse_options(argv)
        if config.verify_baseline:
            config = trial_of(config)
        else:
            refuse_to_be_alone(config.codistill_num_models)
        stop = Stop()
        place = take_place(config.cpu)
        if not place.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        if not config.no_save and place.is_first:
            prepare(Path(config.save_dir))
        reason, trainer = run(config, place, stop)
        logger.info("ended: %s", reason)
        if reason != "finished":
            return 128 + signal.Signals[reason].value
        if config.verify_baseline:
            verdict, line = judge(setup_of(trainer), trainer.last_valid["valid_top1"])
            if place.is_first:
                print(f"baseline: {line}")
            return verdict.value
        return 0
    except FAILURES as error:
        print(f"codistill-vision: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("codistill-vision: interrupted once more, so nothing is saved", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        leave()


def _signal_of(error: SystemExit) -> str:
    """Name of the signal that :class:`Stop` ended the process by."""
    with contextlib.suppress(ValueError, TypeError):
        return signal.Signals(error.code - 128).name  # type: ignore[operator]
    return f"failed: exit code {error.code}"


def _start_record(config: VisionConfig, trainer: Trainer) -> dict[str, object]:
    return {
        "options": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "classes": trainer.images.num_classes,
        "class_names": list(trainer.images.classes),
        "images": len(trainer.images.train),
        "images_left_out": trainer.images.num_broken,
        "updates": trainer.stop_at,
        "device": str(trainer.place.device),
        "world_size": trainer.place.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__),
            "timm": str(timm.__version__),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
