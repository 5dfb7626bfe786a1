"""Owns what arrives: validates messages, keeps them by peer and data position, and waits for those that are due.

The mailbox is bounded: of each peer it keeps the next ``CAPACITY`` positions. It never decodes predictions and
never decides what to distil from. How bytes move is the transport's business.
"""

import collections
import json
import logging
import time
from collections.abc import Callable, Iterable

from fairseq_codistill.coordinator.checkpoint_box import CheckpointBox
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.meter import Numbering, TrafficMeter
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.wire import Kind, Message, WireError, parse

logger = logging.getLogger(__name__)

CAPACITY = 8  # positions kept of one peer; in lock-step two are enough
MAX_HELLO_BYTES = 64 * 1024
POLL_S = 0.25  # how often a waiting rank looks up, to repeat its hello or notice a deadline


class Mailbox:
    """Post and collect, keyed by data position.

    Args:
        transport: what moves the bytes.
        model: index of this model.
        rank: rank inside this model; the mailbox speaks to the same rank of the other models.
        num_models: n.
        run_id: 8 bytes; messages of other runs are refused.
        meter: counts everything that passes.
        on_hello: called with the peer after its hello was stored; may raise to refuse it.
        status: what a hello says beside what never changes: JSON-serialisable, asked for every hello.
    """

    def __init__(
        self,
        transport: Transport,
        model: int,
        rank: int,
        num_models: int,
        run_id: bytes,
        meter: TrafficMeter,
        on_hello: Callable[[Peer], None] = lambda peer: None,
        status: Callable[[], dict] = dict,
    ):
        self.peers = {j: Peer(j) for j in range(num_models) if j != model}
        self._transport = transport
        self._model, self._rank, self._run_id = model, rank, run_id
        self._meter = meter
        self._on_hello = on_hello
        self._status = status
        self._boxes: dict[int, dict[BatchKey, Message]] = {j: {} for j in self.peers}
        self._current: BatchKey | None = None  # the position this rank is working on
        # Positions last sent to each peer: as many as its mailbox keeps, so it can catch up from the oldest of them.
        self._sent = {j: collections.deque[BatchKey](maxlen=CAPACITY) for j in self.peers}
        self._numbers = dict.fromkeys(self.peers, 0)  # of the last message sent to each peer
        self._numberings = {j: Numbering() for j in self.peers}
        self._checkpoints = CheckpointBox()
        self._hello: dict = {}
        self._told: set[int] = set()  # peers on whose connection our hello was put
        self._closed = False

    # -- meeting ---------------------------------------------------------------------------------------------------

    def meet(self, hello: dict, timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> None:
        """Announce ``hello`` until every peer has been met and told, or the time is up.

        Both ways, so that two jobs that do not fit both learn of it, whichever of them finds out first. Nobody who
        joins a run in progress waits for a peer that the run goes on without.

        Args:
            hello: JSON-serialisable; must hold ``incarnation``, new at every start of the process.
            timeout_s: after that the peers not met yet are away.
            give_up: asked now and then; when true, only peers that were met are still told, then it returns.
        """
        self._hello = hello
        started = time.monotonic()
        while True:
            unmet = [
                peer
                for peer in self.peers.values()
                if peer.state is not PeerState.FINISHED
                and (peer.model not in self._told if peer.hello is not None else not give_up())
                and not self._is_missed(peer)
            ]
            waited_s = time.monotonic() - started
            if not unmet or waited_s >= timeout_s:
                break
            for peer in unmet:
                self._say_hello(peer.model)
            self._pump(min(POLL_S, timeout_s - waited_s))
        for peer in self.peers.values():
            if peer.hello is None:
                peer.on_start_timeout(waited_s)

    def _is_missed(self, peer: Peer) -> bool:
        """Whether a run in progress goes on without ``peer``, as one of those in it says."""
        hellos = [other.hello for other in self.peers.values() if other.hello is not None]
        return peer.hello is None and any(
            hello.get("is_training") is True and isinstance(hello.get("away"), list) and peer.model in hello["away"]
            for hello in hellos
        )

    def _say_hello(self, peer_model: int) -> None:
        peers = self.peers.values()
        seen = [peer.model for peer in peers if peer.hello is not None]
        away = [peer.model for peer in peers if peer.state in (PeerState.AWAY, PeerState.FINISHED)]
        payload = json.dumps({**self._hello, **self._status(), "seen": seen, "away": away}).encode()
        if self._send(peer_model, Message(Kind.HELLO, self._model, self._rank, self._run_id, payload)):
            self._told.add(peer_model)

    # -- exchanging ------------------------------------------------------------------------------------------------

    def post(
        self,
        key: BatchKey,
        fingerprint: bytes,
        num_rows: int,
        num_classes: int,
        codec: int,
        payload: bytes | memoryview,
        audience: Iterable[int],
    ) -> int:
        """Send predictions to the models in ``audience``. Never blocks.

        Returns:
            bytes handed to the transport, headers included, over all peers.
        """
        self._current = key
        message = Message(
            Kind.PREDICTIONS,
            self._model,
            self._rank,
            self._run_id,
            payload,
            key,
            fingerprint,
            num_rows,
            num_classes,
            codec,
        )
        num_bytes = 0
        for peer_model in audience:
            sent = self._send(peer_model, message)
            num_bytes += sent
            if sent:
                self._sent[peer_model].append(key)
        return num_bytes

    def poll(self) -> None:
        """Take in what has arrived, without waiting: for ranks that neither post nor collect at the moment."""
        self._pump(0.0)

    def collect(self, key: BatchKey, wanted: Iterable[int], timeout_s: float) -> dict[int, Message]:
        """The messages for ``key``, waiting for the peers in ``wanted`` that are present.

        Args:
            key: data position.
            wanted: models whose message is worth having.
            timeout_s: the longest wait, over all peers together. A present peer that misses it is away afterwards.

        Returns:
            model -> message, of those that came.
        """
        self._current = key
        self._drop_older_than(key)
        wanted = list(wanted)
        started = time.monotonic()
        self._pump(0.0)
        while True:
            missing = [
                self.peers[j]
                for j in wanted
                if key not in self._boxes[j] and self.peers[j].is_waited_for and not self.peers[j].is_past(key)
            ]
            waited_s = time.monotonic() - started
            if not missing or waited_s >= timeout_s:
                break
            self._pump(min(POLL_S, timeout_s - waited_s))
        for peer in missing:
            peer.on_missed(key, waited_s)
        found = {j: self._boxes[j].pop(key) for j in wanted if key in self._boxes[j]}
        self._meter.delivered_messages += len(found)
        return found

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def post_checkpoint(
        self,
        key: BatchKey,
        layout: bytes,
        payload: bytes | memoryview,
        audience: Iterable[int],
        waits: bool = False,
    ) -> tuple[int, list[int]]:
        """Send a checkpoint to the models in ``audience`` that have confirmed the last one. Never blocks.

        Args:
            key: data position.
            layout: digest of what the payload consists of.
            payload: the tensors.
            audience: models to send to.
            waits: whether models wait for each other's. Then one that is present gets each: it has asked for this one
                by sending its last, even if the confirmation is still on its way.

        Returns:
            bytes handed to the transport over all peers, and the models that were passed over.
        """
        self._current = key
        message = Message(Kind.CHECKPOINT, self._model, self._rank, self._run_id, payload, key, layout)
        num_bytes, passed_over = 0, []
        for model in audience:
            is_wanted = (waits and self.peers[model].is_waited_for) or self._checkpoints.may_send(model)
            sent = self._send(model, message) if is_wanted else 0
            num_bytes += sent
            if sent:
                self._checkpoints.on_sent(model)
                self._sent[model].append(key)
            else:
                passed_over.append(model)
        return num_bytes, passed_over

    def take_checkpoints(self, wanted: Iterable[int], until: BatchKey | None = None) -> dict[int, Message]:
        """The newest checkpoint of each model in ``wanted`` that has not been taken; with ``until`` none after it."""
        self._pump(0.0)
        taken = self._checkpoints.take(wanted, until)
        self._meter.delivered_messages += len(taken)
        return taken

    def wait_for_checkpoints(self, key: BatchKey, timeout_s: float) -> None:
        """Wait until every present peer has sent its checkpoint of ``key``; one that misses the timeout is away."""
        self._current = key
        started = time.monotonic()
        self._pump(0.0)
        while True:
            missing = [peer for peer in self.peers.values() if peer.is_waited_for and not peer.has_reached(key)]
            waited_s = time.monotonic() - started
            if not missing or waited_s >= timeout_s:
                break
            self._pump(min(POLL_S, timeout_s - waited_s))
        for peer in missing:
            peer.on_missed(key, waited_s)

    def accounts(self) -> dict[int, dict[str, int]]:
        """Model -> messages sent to it by this process, and of its present process those that came (by number)."""
        return {j: {"sent": self._numbers[j], **self._numberings[j].summary()} for j in self.peers}

    def close(self, reason: str, linger_s: float = 5.0) -> None:
        """Say goodbye to every peer and let go of the transport. May be called twice."""
        if self._closed:
            return
        self._closed = True
        payload = json.dumps({"reason": reason, "incarnation": self._hello.get("incarnation")}).encode()
        for peer in self.peers:
            self._send(peer, Message(Kind.GOODBYE, self._model, self._rank, self._run_id, payload))
        self._transport.close(linger_s)

    # -- messages --------------------------------------------------------------------------------------------------

    def _send(self, peer_model: int, message: Message) -> int:
        header = message.header(self._numbers[peer_model] + 1)
        if not self._transport.send(peer_model, header, message.payload):
            self._meter.unsent_messages += 1
            return 0
        self._numbers[peer_model] += 1
        num_bytes = len(header) + len(message.payload)
        self._meter.count_sent(num_bytes)
        return num_bytes

    def _pump(self, timeout_s: float) -> None:
        """Take in everything that is there; if nothing is, wait up to ``timeout_s`` for something."""
        while True:
            try:
                frames = self._transport.receive(timeout_s)
                self._meter.refused_connections = self._transport.num_refused_connections
                if frames is None:
                    self._note_lost_peers()
                    return
                header, payload = frames
                self._meter.count_received(len(header) + len(payload))
                message, sender = parse(header, payload), self._transport.sender
                if sender is not None and sender != message.model:
                    raise WireError(f"message in the name of model {message.model} came from model {sender}")
                self._accept(message)
            except WireError as error:
                self._reject(str(error))
            timeout_s = 0.0

    def _note_lost_peers(self) -> None:
        """After what they sent last has been taken in: a goodbye makes the loss of the connection no news."""
        for model, reason in self._transport.lost_peers().items():
            if self.peers[model].state is not PeerState.FINISHED:
                logger.error(
                    "codistillation: model %d is lost, training goes on without it: %s. This transport cannot take it "
                    "back: restart all models, or use --codistill-transport zmq",
                    model,
                    reason,
                )
                self.peers[model].on_goodbye("its connection was lost")

    def _accept(self, message: Message) -> None:
        if message.run_id != self._run_id:
            raise WireError(f"message of another run, from its model {message.model}: check --codistill-run-id")
        peer = self.peers.get(message.model)
        if peer is None or message.rank != self._rank:
            raise WireError(f"message of model {message.model} rank {message.rank} came to rank {self._rank}")
        if message.kind is Kind.PREDICTIONS:
            self._count_lost(message)
            self._store(peer, message)
            return
        if message.kind is Kind.CHECKPOINT:
            self._count_lost(message)
            self._store_checkpoint(peer, message)
            return
        if message.kind is Kind.RECEIVED:
            self._count_lost(message)
            self._meter.control_messages += 1
            self._checkpoints.on_confirmed(message.model)
            return
        content = _read_json(message.payload)
        self._meter.control_messages += 1
        if message.kind is Kind.HELLO:
            self._on_hello_of(peer, content, message)
        elif peer.hello is None or content.get("incarnation") in (None, peer.hello.get("incarnation")):
            self._count_lost(message)
            peer.on_goodbye(f"it said goodbye: {content.get('reason', 'no reason given')}")
        # else of a process that was restarted since: connections overtake each other

    def _on_hello_of(self, peer: Peer, hello: dict, message: Message) -> None:
        if peer.hello is None or peer.hello.get("incarnation") != hello.get("incarnation"):
            self._sent[peer.model].clear()  # a new process has none of what the old one was sent
            self._numberings[peer.model].restart()
            self._checkpoints.on_confirmed(peer.model)
        self._count_lost(message)
        peer.on_hello(hello)
        seen = hello.get("seen")
        if self._hello and not (isinstance(seen, list) and self._model in seen):
            self._say_hello(peer.model)  # before a refusal, so that the peer refuses too
        if self._hello:
            self._on_hello(peer)

    def _count_lost(self, message: Message) -> None:
        self._numberings[message.model].note(message.number)
        self._meter.lost_messages = sum(numbering.num_lost for numbering in self._numberings.values())

    def _store(self, peer: Peer, message: Message) -> None:
        sent = self._sent[peer.model]
        peer.on_posted(message.key, sent[0] if sent else self._current)
        if self._current is not None and message.key < self._current:
            self._meter.stale_messages += 1
            return
        box = self._boxes[peer.model]
        box[message.key] = message
        if len(box) > CAPACITY:
            del box[max(box)]  # whoever catches up with a peer that is ahead needs the oldest first
            self._meter.stale_messages += 1

    def _store_checkpoint(self, peer: Peer, message: Message) -> None:
        sent = self._sent[peer.model]
        peer.on_posted(message.key, sent[0] if sent else self._current)
        self._meter.stale_messages += self._checkpoints.put(message)
        self._send(peer.model, Message(Kind.RECEIVED, self._model, self._rank, self._run_id, b"", message.key))

    def _drop_older_than(self, key: BatchKey) -> None:
        for box in self._boxes.values():
            for old in [k for k in box if k < key]:
                del box[old]
                self._meter.stale_messages += 1

    def _reject(self, why: str) -> None:
        self._meter.rejected_messages += 1
        count = self._meter.rejected_messages
        if count & (count - 1) == 0:  # 1st, 2nd, 4th, 8th ...: a flood must not fill the log
            logger.warning("codistillation: refused a message (%d so far): %s", count, why)


def _read_json(payload: bytes | memoryview) -> dict:
    if len(payload) > MAX_HELLO_BYTES:
        raise WireError(f"hello of {len(payload)} bytes, at most {MAX_HELLO_BYTES} expected")
    try:
        value = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise WireError(f"hello is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("hello is not a JSON object")
    return value
