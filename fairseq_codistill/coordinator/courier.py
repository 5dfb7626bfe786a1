"""Owns the post of one rank: its messages become frames, numbered and counted, and frames become messages.

What is damaged, of another run or in another's name ends here, counted and never acted upon. It never looks into a
payload, and never decides whether to wait.
"""

import logging
from collections.abc import Callable, Iterable
from typing import cast

from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.late import LatePayload, Payload, bytes_of
from fairseq_codistill.coordinator.meter import Numbering, TrafficMeter
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import (
    EMPTY_FINGERPRINT,
    LAUNCHER,
    Header,
    Kind,
    LateHeader,
    Message,
    WireError,
    parse,
)

logger = logging.getLogger(__name__)

NOWHERE = BatchKey(0, 0, 0)  # of messages that are about no position
LATE_BYTES = 2**16  # of a payload whose checksum is not taken here


class Courier:
    """Sends and receives in the name of one rank.

    Args:
        transport: what moves the bytes.
        model: index of this model.
        rank: rank inside this model; it speaks to the same rank of the other models.
        run_id: 8 bytes; messages of other runs are refused.
        peers: model -> what this rank knows of it.
        meter: counts everything that passes.
    """

    def __init__(
        self, transport: Transport, model: int, rank: int, run_id: bytes, peers: dict[int, Peer], meter: TrafficMeter
    ):
        self.model = model
        self._transport, self._rank, self._run_id = transport, rank, run_id
        self._peers, self._meter = peers, meter
        self._numbers = dict.fromkeys(peers, 0)  # of the last message sent to each peer
        self._numberings = {j: Numbering() for j in peers}
        self._foreign: set[int] = set()  # models that messages of another run claim to be of
        self._last_refusal = ""
        self._num_unsent = dict.fromkeys(peers, 0)  # predictions and checkpoints that a present peer will not get

    def message(
        self,
        kind: Kind,
        payload: Payload = b"",
        key: BatchKey = NOWHERE,
        fingerprint: bytes = EMPTY_FINGERPRINT,
        num_rows: int = 0,
        num_classes: int = 0,
        codec: int = 0,
    ) -> Message:
        """A message of this rank; see :class:`~fairseq_codistill.coordinator.wire.Message`."""
        who = (self.model, self._rank, self._run_id)
        is_checked = not self._transport.authenticates
        if not self._transport.takes_late_payloads:
            payload = bytes_of(payload)
        return Message(
            kind, *who, cast(memoryview, payload), key, fingerprint, num_rows, num_classes, codec, 0, is_checked
        )

    def send(self, peer_model: int, message: Message) -> int:
        """Hand a message over without blocking; returns its size in bytes, 0 if it could not be queued."""
        return self.send_to_all([peer_model], message).get(peer_model, 0)

    def send_to_all(self, peer_models: Iterable[int], message: Message) -> dict[int, int]:
        """Hand a message over for several peers without blocking.

        Returns:
            model -> bytes that leave this rank for it, of those for which it was queued.
        """
        is_late = len(message.payload) > LATE_BYTES or isinstance(message.payload, LatePayload)
        make = LateHeader if message.is_checked and is_late else Message.header
        headers: dict[int, Header] = {model: make(message, self._numbers[model] + 1) for model in peer_models}
        sent = self._transport.send_to_all(headers, message.payload) if headers else {}
        self._meter.unsent_messages += len(headers) - len(sent)
        for model, num_bytes in sent.items():
            self._numbers[model] += 1
            self._meter.count_sent(num_bytes)
        if message.kind in (Kind.PREDICTIONS, Kind.CHECKPOINT):
            is_too_large = self.limit_bytes is not None and len(message.payload) > self.limit_bytes
            for model in () if is_too_large else headers.keys() - sent.keys():  # of which the transport speaks itself
                self._note_unsent(self._peers[model])
        return sent

    def pump(self, timeout_s: float, accept: Callable[[Message], None]) -> None:
        """Take in everything that is there; if nothing is, wait up to ``timeout_s`` for something.

        Args:
            timeout_s: seconds; 0 does not wait.
            accept: called with each message of a peer; a WireError that it raises refuses the message.
        """
        while True:
            try:
                frames = self._transport.receive(timeout_s)
                self._meter.refused_connections = self._transport.num_refused_connections
                if frames is None:
                    self._note_lost_peers()
                    return
                header, payload = frames
                self._meter.count_received(len(header) + len(payload))
                message = parse(header, payload, self._transport.checksum, self._transport.authenticates)
                self._check_sender(message)
                accept(message)
            except WireError as error:
                self._reject(str(error))
            timeout_s = 0.0

    def note_number(self, message: Message) -> None:
        """Count what was lost before a message that came."""
        self._numberings[message.model].note(message.number)
        self._meter.lost_messages = sum(numbering.num_lost for numbering in self._numberings.values())

    def on_restart(self, peer_model: int) -> None:
        """A new process of that model counts its messages from the beginning."""
        self._numberings[peer_model].restart()

    def accounts(self) -> dict[int, dict[str, int]]:
        """Model -> messages sent to it by this process, and of its present process those that came (by number)."""
        return {j: {"sent": self._numbers[j], **self._numberings[j].summary()} for j in self._peers}

    @property
    def limit_bytes(self) -> int | None:
        """See :attr:`Transport.limit_bytes`."""
        return self._transport.limit_bytes

    def describe(self, peer_model: int) -> str:
        """What is seen of a peer that was not met, in words for an error."""
        if peer_model in self._foreign:
            return "its messages are of another run: give all jobs the same --codistill-run-id, or the same addresses"
        return self._transport.describe(peer_model)

    def strangers(self) -> str:
        """What came from nobody in particular and was refused, in words for an error; empty if nothing did."""
        found = []
        if self._meter.refused_connections:
            found.append(f"{self._meter.refused_connections} connections to this rank had not the right key")
        if self._meter.rejected_messages:
            found.append(f"{self._meter.rejected_messages} messages were refused, the last one: {self._last_refusal}")
        return "; ".join(found)

    def _check_sender(self, message: Message) -> None:
        sender = self._transport.sender
        if sender is not None and sender != message.model:
            raise WireError(f"message in the name of {_who(message.model)} came from {_who(sender)}")
        if message.model == LAUNCHER and (not self._transport.hears_launcher or message.kind is not Kind.GOODBYE):
            raise WireError("message in the name of the launcher that may not be its own")
        if message.run_id != self._run_id:
            self._foreign.add(message.model)
            raise WireError(f"message of another run, from its model {message.model}: check --codistill-run-id")
        if message.model not in (*self._peers, LAUNCHER) or message.rank != self._rank:
            raise WireError(f"message of model {message.model} rank {message.rank} came to rank {self._rank}")

    def _note_lost_peers(self) -> None:
        """After what they sent last has been taken in: a goodbye makes the loss of the connection no news."""
        for model, reason in self._transport.lost_peers().items():
            if self._peers[model].state is not PeerState.FINISHED:
                logger.error(
                    "codistillation: model %d is lost, training goes on without it: %s. %s",
                    model,
                    reason,
                    self._transport.remedy,
                )
                self._peers[model].on_goodbye(f"its connection was lost: {reason}")

    def _note_unsent(self, peer: Peer) -> None:
        """Say so of a peer that is there: of one that is not, nothing else was to be expected."""
        if not peer.is_waited_for:
            return
        self._num_unsent[peer.model] += 1
        count = self._num_unsent[peer.model]
        if count & (count - 1) == 0:
            logger.warning(
                "codistillation: a message for model %d was left out (%d so far): what may wait for it is full, or its "
                "connection is broken. Where that goes on, its link is too slow for what is sent: take a codec that "
                "sends less, or a larger --codistill-interval",
                peer.model,
                count,
            )

    def _reject(self, why: str) -> None:
        self._meter.rejected_messages += 1
        self._last_refusal = why
        count = self._meter.rejected_messages
        if count & (count - 1) == 0:  # 1st, 2nd, 4th, 8th ...: a flood must not fill the log
            logger.warning("codistillation: refused a message (%d so far): %s", count, why)


def _who(model: int) -> str:
    return "the launcher" if model == LAUNCHER else f"model {model}"
