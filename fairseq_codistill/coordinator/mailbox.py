"""Owns what has arrived: keeps it by peer and data position, and waits for what is due.

It never decodes predictions and never decides what to distil from. How messages travel is the courier's business, and
how much is kept the shelf's.
"""

import collections
import json
import time
from collections.abc import Callable, Collection, Iterable

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.checkpoint_box import CheckpointBox
from fairseq_codistill.coordinator.courier import Courier
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.late import Payload
from fairseq_codistill.coordinator.meeting import Meeting
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.peers import IN_ORDER, SAID, Peer, PeerState
from fairseq_codistill.coordinator.shelf import CAPACITY, MAX_BYTES, Shelf
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.waiting import POLL_S, Waiting
from fairseq_codistill.coordinator.wire import LAUNCHER, MAX_JSON_BYTES, Kind, Message, WireError, parse_json

__all__ = ["CAPACITY", "Mailbox"]
MAX_HELLO_BYTES = MAX_JSON_BYTES - 4096  # beside which a hello says who is there, and how far


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
        keys_per_update: positions of one update: micro-batches and their parts.
        max_queue_bytes, at_once: of what is kept of one peer, see :class:`~fairseq_codistill.coordinator.shelf.Shelf`.
        status: what a hello says beside what never changes: JSON-serialisable, asked for every hello.

    Attributes:
        peers: model -> what this rank knows of it.
        courier: carries the messages.
        meeting: who has been met and told.
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
        keys_per_update: int = 1,
        max_queue_bytes: int = MAX_BYTES,
        at_once: int = 1,
    ):
        self.peers = {j: Peer(j) for j in range(num_models) if j != model}
        self._transport, self._meter = transport, meter
        self.courier = Courier(transport, model, rank, run_id, self.peers, meter)
        self.meeting = Meeting(self.courier, self.peers, on_hello, status)
        self._waiting = Waiting(self._pump)
        self._shelf = Shelf(self.peers, keys_per_update, max_queue_bytes, at_once)
        # Positions last sent to each peer: as many as its mailbox keeps, so it can catch up from the oldest of them.
        self._sent = {j: collections.deque[BatchKey](maxlen=CAPACITY * keys_per_update) for j in self.peers}
        self._checkpoints = CheckpointBox()
        self._has_begun = self._closed = False

    def meet(self, hello: dict, timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> None:
        """Announce ``hello`` until every peer has been met and told, or the time is up.

        Args:
            hello: JSON-serialisable; must hold ``incarnation``, new at every start of the process.
            timeout_s: after that the peers not met yet are away.
            give_up: asked now and then; when true, only peers that were met are still told, then it returns.

        Raises:
            ConfigError: the others would refuse a hello as long as that.
        """
        if (length := len(json.dumps(hello))) > MAX_HELLO_BYTES:
            raise ConfigError(
                f"what this model says of itself comes to {length:,} bytes, above {MAX_HELLO_BYTES:,}: give shorter "
                "settings=, batch_settings= and remarks= (a digest in place of a long list)"
            )
        self.meeting.hello = hello
        said_at: dict[int, float] = {}

        def greet(unmet: list[Peer]) -> None:
            for peer in unmet:
                # Of one whose hellos are refused many come, each in answer to one of ours.
                if peer.hello is not None or time.monotonic() - said_at.get(peer.model, -POLL_S) >= POLL_S:
                    said_at[peer.model] = time.monotonic()
                    self.meeting.say_hello(peer.model)

        _, waited_s = self._waiting.wait(lambda: self.meeting.unmet(give_up), timeout_s, greet)
        for peer in self.peers.values():
            if peer.hello is None and not self.is_interrupted:
                peer.on_start_timeout(waited_s)
        self._has_begun = True

    def tell_again(self) -> None:
        """Say what has changed in this rank's status to every peer that was met."""
        for peer in self.peers.values():
            if self.meeting.has_met(peer) and peer.state is not PeerState.FINISHED:
                self.meeting.say_hello(peer.model)

    # -- predictions -----------------------------------------------------------------------------------------------

    def expect(self, key: BatchKey) -> None:
        """``key`` is to be collected: keep what comes for it, whatever is collected before. Part of :meth:`post`."""
        self._shelf.open(key)

    def post(
        self,
        key: BatchKey,
        fingerprint: bytes,
        num_rows: int,
        num_classes: int,
        codec: int,
        payload: Payload,
        audience: Iterable[int],
    ) -> int:
        """Send predictions to the models in ``audience``. Never blocks.

        Returns:
            bytes handed to the transport, headers included, over all peers.
        """
        self.expect(key)
        what = (key, fingerprint, num_rows, num_classes, codec)
        sent = self.courier.send_to_all(audience, self.courier.message(Kind.PREDICTIONS, payload, *what))
        for peer_model in sent:
            self._sent[peer_model].append(key)
        return sum(sent.values())

    def poll(self) -> None:
        """Take in what has arrived, without waiting: for ranks that neither post nor collect at the moment."""
        self._pump(0.0)

    def collect(
        self,
        key: BatchKey,
        wanted: Iterable[int],
        timeout_s: float,
        excused: Collection[int] = (),
        is_required: bool = True,
        meanwhile: Callable[[Message], None] = lambda message: None,
    ) -> dict[int, Message]:
        """The messages for ``key``, waiting for the peers in ``wanted`` that are present.

        Args:
            key: data position; what was posted in earlier updates and not collected by now never will be.
            wanted: models whose message is worth having.
            timeout_s: the longest wait, over all peers together.
            excused: models that are not waited for.
            is_required: whether a present peer that misses the timeout is away afterwards.
            meanwhile: called with a message for ``key``, once a model, while another is waited for; not with those that
                come when nobody is waited for any more.

        Returns:
            model -> message, of those that came.
        """
        self._meter.stale_messages += self._shelf.begin(key)
        wanted, boxes = list(wanted), self._shelf.boxes
        awaited = [self.peers[model] for model in wanted if model not in excused]
        shown: set[int] = set()

        def show(missing: list[Peer]) -> None:
            for model in wanted:
                if key in boxes[model] and model not in shown:
                    shown.add(model)
                    meanwhile(boxes[model][key])

        self._pump(0.0)
        missing, waited_s = self._waiting.wait(
            lambda: [
                peer
                for peer in awaited
                if key not in boxes[peer.model] and peer.is_waited_for and not peer.is_past(key)
            ],
            timeout_s,
            show,
        )
        for peer in missing if is_required else ():
            peer.on_missed(key, waited_s)
        found = self._shelf.take(key, wanted)
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
        self._shelf.reach(key)
        message, audience = self.courier.message(Kind.CHECKPOINT, payload, key, layout), list(audience)
        wanted = [
            model
            for model in audience
            if (waits and self.peers[model].is_waited_for) or self._checkpoints.may_send(model)
        ]
        sent = self.courier.send_to_all(wanted, message)
        for model in sent:
            self._checkpoints.on_sent(model)
            self._sent[model].append(key)
        return sum(sent.values()), [model for model in audience if model not in sent]

    def take_checkpoints(self, wanted: Iterable[int], until: BatchKey | None = None) -> dict[int, Message]:
        """The newest checkpoint of each model in ``wanted`` that has not been taken; with ``until`` none after it."""
        self._pump(0.0)
        taken = self._checkpoints.take(wanted, until)
        self._meter.delivered_messages += len(taken)
        return taken

    def wait_for_checkpoints(self, key: BatchKey, timeout_s: float) -> None:
        """Wait until every present peer has sent its checkpoint of ``key``; one that misses the timeout is away."""
        self._shelf.reach(key)
        self._pump(0.0)
        missing, waited_s = self._waiting.wait(
            lambda: [peer for peer in self.peers.values() if peer.is_waited_for and not peer.has_reached(key)],
            timeout_s,
        )
        for peer in missing:
            peer.on_missed(key, waited_s)

    # -- taking in -------------------------------------------------------------------------------------------------

    def interrupt(self, reason: str) -> None:
        """End the wait that is under way, and let no other begin; what has arrived is still used.

        A signal handler may call it.
        """
        self._waiting.interrupt(reason)
        self._transport.interrupt()

    @property
    def is_interrupted(self) -> bool:
        """Whether nothing is waited for any more."""
        return self._waiting.interruption is not None

    @property
    def interruption(self) -> str | None:
        """Why nothing is waited for any more; None while it is."""
        return self._waiting.interruption

    def _pump(self, timeout_s: float) -> None:
        self.courier.pump(timeout_s, self._accept)

    def _accept(self, message: Message) -> None:
        if message.model == LAUNCHER:
            self._on_notice(parse_json(message.payload))
            return
        peer = self.peers[message.model]
        if message.kind is Kind.PREDICTIONS:
            self.courier.note_number(message)
            self._store(peer, message)
            return
        if message.kind is Kind.CHECKPOINT:
            self.courier.note_number(message)
            self._store_checkpoint(peer, message)
            return
        if message.kind is Kind.RECEIVED:
            self.courier.note_number(message)
            self._meter.control_messages += 1
            self._checkpoints.on_confirmed(message.model)
            return
        content = parse_json(message.payload)
        self._meter.control_messages += 1
        is_another_process = peer.hello is None or content.get("incarnation") != peer.hello.get("incarnation")
        if message.kind is Kind.HELLO:
            if is_another_process:
                self._sent[peer.model].clear()  # a new process has none of what the old one was sent
                self.courier.on_restart(peer.model)
                self._checkpoints.on_confirmed(peer.model)
            self.courier.note_number(message)
            self.meeting.on_hello_of(peer, content)
        elif not is_another_process or peer.hello is None or content.get("incarnation") is None:
            self.courier.note_number(message)
            reason = content.get("reason", "no reason given")
            peer.on_goodbye(f"{SAID}{reason}", is_done=reason == IN_ORDER)
        # else of a process that was restarted since: connections overtake each other

    def _on_notice(self, content: dict) -> None:
        """The launcher says that a model has ended."""
        model = content.get("model")
        peer = self.peers.get(model) if isinstance(model, int) else None
        if peer is None:
            raise WireError(f"the launcher speaks of a model {model!r}, which is no peer")
        self._meter.control_messages += 1
        if content.get("returns") is True and not self._has_begun:
            peer.expect_again()
            self.meeting.told.discard(peer.model)
            return
        reason = content.get("reason", "no reason given")
        peer.on_notice(f"the launcher says that it has ended: {reason}", is_done=reason == IN_ORDER)

    def _store(self, peer: Peer, message: Message) -> None:
        self._note_posted(peer, message)
        self._meter.stale_messages += self._shelf.put(message)

    def _store_checkpoint(self, peer: Peer, message: Message) -> None:
        self._note_posted(peer, message)
        self._meter.stale_messages += self._checkpoints.put(message)
        self.courier.send(peer.model, self.courier.message(Kind.RECEIVED, key=message.key))

    def _note_posted(self, peer: Peer, message: Message) -> None:
        sent = self._sent[peer.model]
        peer.on_posted(message.key, sent[0] if sent else self._shelf.current)

    def accounts(self) -> dict[int, dict[str, int]]:
        """Model -> messages sent to it by this process, and of its present process those that came (by number)."""
        return self.courier.accounts()

    def close(self, reason: str, linger_s: float = 5.0) -> None:
        """Say goodbye to every peer and let go of the transport. May be called twice."""
        if self._closed:
            return
        self._closed = True
        payload = json.dumps({"reason": reason, "incarnation": self.meeting.hello.get("incarnation")}).encode()
        for peer in self.peers:
            self.courier.send(peer, self.courier.message(Kind.GOODBYE, payload))
        self._transport.close(linger_s)
