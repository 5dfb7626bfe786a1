"""Owns what codistillation adds to vision training: which images, augmentation and model the others are told of.

A thin adapter of :class:`~fairseq_codistill.codistiller.Codistiller`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import timm
from torch import Tensor, nn

from fairseq_codistill.codistiller import Batch, Codistiller, Pending
from fairseq_codistill.coordinator.keys import DataOrder, SampleMarks, part_fingerprint
from fairseq_codistill.figures import with_shared
from fairseq_codistill.sampling import Timetable

from .config import VisionConfig
from .data import pixel_settings
from .datasets import Images
from .distributed import Place
from .metrics import Sums
from .teachers import load_teacher
from .transfer import TransferSet

LONGEST_NAMES = 16 * 1024  # bytes of the names of all classes: what the models tell of themselves is short
NUM_DIGESTS = 256


class PeerExchange:
    """One rank's exchange with the same rank of the other models.

    Args:
        config: validated options.
        place: of this process in its model.
        timetable: of the run.
        transfer: what is exchanged in place of what is trained on.

    Attributes:
        peers: as every training loop has them.
    """

    def __init__(self, config: VisionConfig, place: Place, timetable: Timetable, transfer: TransferSet | None = None):
        self._config, self._timetable, self._transfer = config, timetable, transfer
        self._order = DataOrder(timetable.updates_per_pass * config.update_freq, [config.update_freq])
        self.peers = Codistiller(config, rank=place.rank, world_size=place.world_size)

    def meet(self, images: Images, model: nn.Module, elapsed: int, num_updates: int) -> None:
        """Wait for the other models, and refuse those whose settings do not go with ours.

        Args:
            images: the data set.
            model: this model, without any wrapper, on its device.
            elapsed: updates' worth of batches before its first one.
            num_updates: of the whole run.

        Raises:
            ConfigError: a peer runs with other settings, or holds the same parameters.
        """
        config = self._config
        pixels = pixel_settings(config, images)
        size = pixels.pop("--image-size")
        settings: dict[str, Any] = {"classes": images.num_classes, "--image-size": size}
        if config.codistill_exchange == "checkpoints":  # models of equal shapes may compute other things
            architecture = config.model.partition(".")[0]  # what follows names timm's weights of it
            keywords = sorted(config.model_kwargs)
            settings |= {"--model": architecture, "--model-kwargs": keywords, "--view": config.split}
        if config.codistill_own_data or config.transfer_dataset:  # else batches are compared, targets among them
            settings["names of the classes"] = told_of(images.classes)
        if config.codistill_own_data:  # else those of --dataset: a copy gets the pixels as this model normalises them
            settings["mean and std of the images"] = [*images.mean, *images.std]
        batch_settings = {
            "--dataset": config.dataset.partition(":")[0],  # folders may differ between hosts
            "--batch-size": config.batch_size,
            "--update-freq": config.update_freq,
            **pixels,
            "--data-fraction": f"1/{config.data_divisor}",
            "images": len(images.train),
            "updates per epoch": self._timetable.updates_per_epoch,
        }
        remarks = {"timm version": str(timm.__version__), "--model": config.model}
        self.peers.meet(
            model,
            self._order,
            settings=settings,
            batch_settings=batch_settings,
            remarks=remarks,
            seed=config.seed,
            elapsed=elapsed,
            num_updates=num_updates,
            transfer=None if self._transfer is None else self._transfer.settings,
            load_teacher=lambda file: load_teacher(config, file, images, size),
            fixed_inputs=True,  # or rather: a sample is known by its pixels as well
        )

    def interrupt(self, reason: str) -> None:
        """End the wait for a peer that is under way, and let no other begin; a signal handler may call it."""
        self.peers.interrupt(reason)

    def parts_of(self, elapsed: int, micro_batch: int) -> int:
        """In how many parts to cut a batch, as the models agreed on."""
        return self.peers.parts_of(self._batch(elapsed, micro_batch, b""))

    def begin(
        self,
        predictions: Tensor,
        elapsed: int,
        micro_batch: int,
        fingerprint: bytes,
        forward: Callable[[nn.Module], Tensor],
        samples: SampleMarks | None = None,
        part: tuple[int, Sequence[tuple[int, int]]] = (0, [(0, 0)]),
    ) -> "Begun":
        """Send what this model predicts of a batch or of a part of it. Does not wait.

        Args:
            predictions: (part, num_classes) float32 logits of this model, with gradient.
            elapsed: updates' worth of batches since the start.
            micro_batch: index inside the update.
            fingerprint: of the batch.
            forward: a copy of a peer, or a teacher -> its (part, num_classes) logits, where there are such.
            samples: what each image of the batch is called, where the predictions of teachers are kept.
            part: which of the parts it is, and the (start, stop) of all of them.
        """
        index, bounds = part
        batch = dataclasses.replace(self._batch(elapsed, micro_batch, fingerprint), samples=samples)
        if len(bounds) > 1:
            start, stop = bounds[index]
            if samples is not None:
                samples = SampleMarks(samples.marks[start:stop], samples.num_rows[start:stop], samples.ids[start:stop])
            mark = part_fingerprint(fingerprint, start, stop)
            batch = dataclasses.replace(batch, fingerprint=mark, parts=len(bounds), part=index, samples=samples)
        pending = self.peers.begin(batch, predictions, forward=forward)
        return Begun(batch, predictions, pending, self.peers.sums)

    def is_next_due(self, elapsed: int, micro_batch: int) -> bool:
        """Whether the predictions of the batch that comes next, at that place, are to be sent now."""
        return self.peers.is_next_due(self._batch(elapsed, micro_batch, b""))

    def post_ahead(self, predictions: Tensor, elapsed: int, micro_batch: int, fingerprint: bytes) -> None:
        """Send them; arguments as for :meth:`begin`."""
        self.peers.post_ahead(self._batch(elapsed, micro_batch, fingerprint), predictions)

    def finish(self, begun: "Begun", figures: Sums, predict: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """α · mean divergence from the peers at one batch, and what the teachers add. It waits.

        Args:
            begun: of :meth:`begin`.
            figures: what there is to log is added to them.
            predict: (batch, 3, size, size) uint8 images of the transfer set -> (batch, num_classes) logits.

        Returns:
            () float32, summed over the batch; None where nothing is distilled.
        """
        batch, self.peers.sums = begun.batch, begun.sums
        found = self.peers.finish(begun.pending, begun.predictions)
        total = None if found is None else found.total
        shared = dataclasses.replace(batch, is_shared=True, samples=None)
        if self._transfer is not None and predict is not None and self.peers.weight(shared) != 0.0:
            own, images = self.peers.sums, self._transfer.at(batch.elapsed, batch.key[2])
            logits = predict(images.images)
            found = self.peers.step(dataclasses.replace(shared, fingerprint=images.fingerprint), logits)
            scale = len(begun.predictions) / len(logits)  # the mean over them counts as much as that over the batch
            self.peers.sums = with_shared(own, self.peers.sums, scale)
            if found is not None:
                total = scale * found.total if total is None else total + scale * found.total
        figures.add(**self.peers.sums)
        return total

    def _batch(self, elapsed: int, micro_batch: int, fingerprint: bytes) -> Batch:
        key = self._order.key(elapsed)._replace(micro_batch=micro_batch)
        return Batch(key, elapsed, fingerprint, epoch=self._timetable.epoch(elapsed))


@dataclasses.dataclass(frozen=True)
class Begun:
    """A batch, or a part of one, whose predictions were sent.

    Attributes:
        batch: which one.
        predictions: (part, num_classes) logits with gradient.
        pending: None where nothing is due.
        sums: of it so far.
    """

    batch: Batch
    predictions: Tensor
    pending: Pending | None
    sums: dict


def told_of(classes: Sequence[str]) -> list[str]:
    """What the other models are told of the names of the classes, in their order.

    Returns:
        the names; of more than 16 KiB of them a digest of each run of neighbours, 256 at most.
    """
    if len(json.dumps(classes)) <= LONGEST_NAMES:
        return list(classes)
    size = -(-len(classes) // NUM_DIGESTS)
    runs = [classes[at : at + size] for at in range(0, len(classes), size)]
    digests = [hashlib.blake2b(json.dumps(run).encode(), digest_size=8).hexdigest() for run in runs]
    return [
        f"digest {digest} of classes {at * size} to {at * size + len(run) - 1}"
        for at, (run, digest) in enumerate(zip(runs, digests, strict=True))
    ]
