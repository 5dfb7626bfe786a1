"""Owns who has been met and told: hellos, on both sides. It never waits; that is the mailbox's business."""

import json
from collections.abc import Callable

from fairseq_codistill.coordinator.courier import Courier
from fairseq_codistill.coordinator.peers import Peer, PeerState
from fairseq_codistill.coordinator.wire import Kind


class Meeting:
    """Both ways: two jobs that do not fit both learn of it, whichever of them finds out first.

    Args:
        courier: carries hellos.
        peers: model -> what this rank knows of it.
        on_hello: called with the peer after its hello was stored; may raise to refuse it.
        status: what a hello says beside what never changes: JSON-serialisable, asked for every hello.

    Attributes:
        hello: what this rank says of itself; empty before it says anything.
        told: peers on whose connection our hello was put.
    """

    def __init__(
        self,
        courier: Courier,
        peers: dict[int, Peer],
        on_hello: Callable[[Peer], None],
        status: Callable[[], dict],
    ):
        self.hello: dict = {}
        self.told: set[int] = set()
        self._courier, self._peers = courier, peers
        self._on_hello, self._status = on_hello, status

    def unmet(self, give_up: Callable[[], bool]) -> list[Peer]:
        """Peers that are still to be met or told; once ``give_up()`` is true, only those to be told.

        Nobody who joins a run in progress waits for a peer that the run goes on without.
        """
        return [
            peer
            for peer in self._peers.values()
            if peer.state is not PeerState.FINISHED
            and (peer.model not in self.told if peer.hello is not None else not give_up())
            and not self._is_missed(peer)
        ]

    def has_met(self, peer: Peer) -> bool:
        """Whether hellos went both ways."""
        return peer.hello is not None and peer.model in self.told

    def say_hello(self, peer_model: int) -> None:
        """Put our hello on the connection to that model, if there is one."""
        peers = self._peers.values()
        seen = [peer.model for peer in peers if peer.hello is not None]
        away = [peer.model for peer in peers if peer.state in (PeerState.AWAY, PeerState.FINISHED)]
        payload = json.dumps({**self.hello, **self._status(), "seen": seen, "away": away}).encode()
        if self._courier.send(peer_model, self._courier.message(Kind.HELLO, payload)):
            self.told.add(peer_model)

    def on_hello_of(self, peer: Peer, hello: dict) -> None:
        """Store a peer's hello, answer it where it asks for that, and judge it."""
        peer.on_hello(hello)
        seen = hello.get("seen")
        if self.hello and not (isinstance(seen, list) and self._courier.model in seen):
            self.say_hello(peer.model)  # before a refusal, so that the peer refuses too
        if self.hello:
            self._on_hello(peer)

    def _is_missed(self, peer: Peer) -> bool:
        """Whether a run in progress goes on without ``peer``, as one of those in it says."""
        hellos = [other.hello for other in self._peers.values() if other.hello is not None]
        return peer.hello is None and any(
            hello.get("is_training") is True and isinstance(hello.get("away"), list) and peer.model in hello["away"]
            for hello in hellos
        )
