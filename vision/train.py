"""Owns the command ``codistill-vision``: options in, a trained model out. ``python -m vision.train`` is the same.

One process is one rank of one model. ``codistill-launch`` starts several models, and torchrun or
``codistill-launch --devices-per-model`` several ranks of a model; without either it is one model on one device.
"""

import dataclasses
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torchvision

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.coordinator import AlignmentError
from fairseq_codistill.sampling import Timetable

from .config import VisionConfig
from .datasets import load_images
from .distributed import Place, leave, take_place
from .engine import Stop, Trainer
from .exchange import PeerExchange
from .log import RunLog
from .models import make_model
from .options import parse_options

logger = logging.getLogger("vision")


def run(config: VisionConfig, place: Place, stop: Stop) -> str:
    """Train one rank of one model.

    Returns:
        why training ended: ``finished`` or the name of a signal.

    Raises:
        ConfigError: a setting cannot work, or does not go with those of the other models.
        AlignmentError: the other models train on other batches.
    """
    images = load_images(config)
    timetable = Timetable(
        len(images.train),
        config.data_divisor,
        config.batch_size,
        place.world_size,
        config.codistill_data_seed,
        config.stretch,
    )
    torch.manual_seed(config.seed)
    model = make_model(config, images.num_classes)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model = model.to(place.device, memory_format=layout)  # type: ignore[call-overload]
    exchange = PeerExchange(config, place, timetable)
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
                exchange.meet(images, model, trainer.elapsed)
                reason = trainer.train(log, stop)
            else:
                reason = "finished"
        finally:
            log.write("end", trainer.elapsed, reason=reason)
            log.close()
    finally:
        exchange.peers.close(reason)
    return reason


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``codistill-vision``.

    Returns:
        0 when training is finished, or was interrupted by a signal and saved; 1 when the models do not train on the
        same batches; 2 for a setting that cannot work.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s | %(levelname)s | %(name)s | %(message)s", stream=sys.stderr
    )
    try:
        config = parse_options(argv)
        stop = Stop()
        place = take_place(config.cpu)
        if not place.is_first:
            logging.getLogger().setLevel(logging.WARNING)
        if config.save_dir and not config.no_save and place.is_first:
            Path(config.save_dir).mkdir(parents=True, exist_ok=True)
        reason = run(config, place, stop)
        logger.info("ended: %s", reason)
    except ConfigError as error:
        print(f"codistill-vision: error: {error}", file=sys.stderr)
        return 2
    except AlignmentError as error:
        print(f"codistill-vision: error: {error}", file=sys.stderr)
        return 1
    finally:
        leave()
    return 0


def _start_record(config: VisionConfig, trainer: Trainer) -> dict[str, object]:
    return {
        "options": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "classes": trainer.images.num_classes,
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
