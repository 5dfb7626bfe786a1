"""Owns the judgement of peers: which hello fits, which message is for this very batch, and whom nothing is taken of.

What does not align is never distilled from. A set-up that cannot work is an error at the start; a peer that joins a run
in progress and does not fit is refused alone.
"""

import logging
from typing import Any

from torch import Tensor

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.codecs.codec import Codec, CodecError
from fairseq_codistill.coordinator.introductions import Introduction
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.outgoing import seed_at
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.predictions import PeerPredictions
from fairseq_codistill.coordinator.wire import Message

logger = logging.getLogger(__name__)


class AlignmentError(RuntimeError):
    """The models do not train on the same batches. The message lists what differs."""


class Judge:
    """What one rank makes of what its peers say and send.

    Args:
        config: validated options.
        rank: rank inside this model.
        codec: of the predictions.
        meter: counts what is misaligned.

    Attributes:
        refusal: why a peer that was met at the start does not fit; the run must not begin.
        refused: models that joined a run in progress and do not fit, or were misaligned too often.
    """

    def __init__(self, config: CodistillationConfig, rank: int, codec: Codec, meter: TrafficMeter):
        self.refusal: ConfigError | None = None
        self.refused: set[int] = set()
        self._config, self._rank, self._codec, self._meter = config, rank, codec, meter
        self._introduction: Introduction | None = None
        self._met_at_start: dict[int, Any] | None = None  # model -> the incarnation of its process
        self._misaligned: dict[int, Any] = {}  # likewise, of those refused for their batches

    def introduce(self, introduction: Introduction) -> None:
        """From now on hellos can be judged."""
        self._introduction = introduction

    def on_start(self, peers: dict[int, Peer]) -> None:
        """Training begins with ``peers``: whoever comes later is refused alone."""
        self._met_at_start = {j: peer.hello.get("incarnation") for j, peer in peers.items() if peer.hello}

    @property
    def is_training(self) -> bool:
        """Whether training has begun."""
        return self._met_at_start is not None

    def check_hello(self, peer: Peer) -> None:
        """Refuse a peer with which codistillation makes no sense."""
        assert self._introduction is not None
        why = self._introduction.why_unfit(peer)
        if why is None:
            # A hello also tells how things stand; what was wrong with the batches of a process stays wrong.
            if peer.hello is None or self._misaligned.get(peer.model) != peer.hello.get("incarnation"):
                self.refused.discard(peer.model)
        elif self.is_training:
            self.refused.add(peer.model)
            logger.error("codistillation: model %d is not distilled from: %s", peer.model, why)
        else:
            # Not raised here: this runs while messages are taken in, and our hello may still be on its way.
            self.refusal = self.refusal or ConfigError(why)

    def wanted(self, peers: dict[int, Peer]) -> list[int]:
        """Models whose messages are worth having."""
        return [model for model in peers if model not in self.refused]

    def audience(self, peers: dict[int, Peer]) -> list[int]:
        """Models to send to."""
        return [model for model in self.wanted(peers) if peers[model].state is not PeerState.FINISHED]

    def verified(
        self,
        peer: Peer,
        message: Message,
        batch_fingerprint: bytes,
        shape: tuple[int, int],
        targets: Tensor | None = None,
    ) -> PeerPredictions | None:
        """The message's predictions if they are for this very batch, else None, counted and logged.

        Args:
            peer: who sent it.
            message: predictions for the position of the batch.
            batch_fingerprint: of the batch here.
            shape: (num_rows, num_classes) here.
            targets: (num_rows,) int64 classes of the batch, where it has any.

        Raises:
            AlignmentError: ``--codistill-max-mismatches`` batches in a row differed, of a peer met at the start.
        """
        predictions = self.read(message, batch_fingerprint, shape, targets)
        if isinstance(predictions, str):
            self._count_mismatch(peer, predictions, (message.key.epoch, message.key.position))
            return None
        peer.mismatches_in_a_row = 0
        return predictions

    def read(
        self, message: Message, batch_fingerprint: bytes, shape: tuple[int, int], targets: Tensor | None = None
    ) -> PeerPredictions | str:
        """The message's predictions if they are for this very batch, else what differs; nothing is counted."""
        their_shape = (message.num_rows, message.num_classes)
        if message.fingerprint != batch_fingerprint or their_shape != shape:
            return (
                f"batch {batch_fingerprint.hex()[:12]} of {shape[0]} rows x {shape[1]} classes here, "
                f"{message.fingerprint.hex()[:12]} of {their_shape[0]} x {their_shape[1]} there, both at {message.key}"
            )
        try:
            if message.codec != self._codec.code:
                raise CodecError(f"codec {message.codec}, here {self._codec.code} ({self._config.codistill_codec})")
            return self._codec.decode(message.payload, *shape, seed_at(self._config, self._rank, message.key), targets)
        except CodecError as error:
            return str(error)

    def _count_mismatch(self, peer: Peer, what: str, where: tuple[int, int]) -> None:
        self._meter.mismatched_messages += 1
        if peer.mismatched_at != where:  # an update may come in several messages: micro-batches, parts of a batch
            peer.mismatches_in_a_row += 1
        peer.mismatched_at = where
        logger.warning("codistillation: misaligned with model %d, not distilled from: %s", peer.model, what)
        if peer.mismatches_in_a_row < self._config.codistill_max_mismatches:
            return
        assert self._introduction is not None
        differences = [text for part in ("settings", "remarks") for text in self._introduction.differences(peer, part)]
        error = AlignmentError(
            f"{peer.mismatches_in_a_row} batches in a row differ between model "
            f"{self._config.codistill_model_index} and model {peer.model} ({what}). What differs in their set-up: "
            + ("; ".join(differences) or "nothing that is announced, so compare the data files themselves")
        )
        if (peer.hello or {}).get("incarnation") == (self._met_at_start or {}).get(peer.model):
            raise error
        self.refused.add(peer.model)
        self._misaligned[peer.model] = (peer.hello or {}).get("incarnation")
        logger.error("codistillation: model %d is not distilled from any more: %s", peer.model, error)
