"""Owns whether anybody is there to learn from, as ``--codistill-require-peers`` asks, and what is said if nobody is.

It never waits, and never ends a run that asks for nobody.
"""

import time
from typing import Any

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.mailbox import Mailbox
from fairseq_codistill.coordinator.peers import Peer, PeerState

SIGNS = 4  # of life in a timeout
# Timeouts that one may be silent that nobody waits for and so nobody misses. Behind a checkpoint on a slow line no sign
# of life comes through.
DEAD = {"predictions": 2, "checkpoints": 10}


class NoPeersError(RuntimeError):
    """Nobody is there to codistil with. The message says what was seen of each peer."""


class Attendance:
    """Of the peers of one rank.

    Args:
        config: validated options.
        mailbox: of this rank.
    """

    def __init__(self, config: CodistillationConfig, mailbox: Mailbox):
        self._config, self._mailbox = config, mailbox
        self._sign_due_at = 0.0
        self._checked_at = self._listening_since = time.monotonic()

    def why_not_start(self, waited_s: float, elapsed: int = 0) -> NoPeersError | None:
        """The error if after that wait nobody was met, and somebody is required.

        It is none where a peer has finished in order, nor where this run goes on from a checkpoint and a peer that was
        there was told to stop, nor where this model is started again after a peer has failed for good. One that failed
        before it was met was never there.

        Args:
            waited_s: for the others.
            elapsed: position of the first batch to come.
        """
        peers = self._peers()
        if self._config.codistill_require_peers == "never" or not peers:
            return None
        if any(self._mailbox.meeting.has_met(peer) or peer.is_done for peer in peers):
            return None
        gone = [peer for peer in peers if peer.state is PeerState.FINISHED]
        if any(peer.is_given_up or (elapsed and peer.was_stopped) for peer in gone):
            return None
        return NoPeersError(
            f"model {self._config.codistill_model_index} met none of the other models in {waited_s:.0f} s "
            f"(--codistill-start-timeout {self._config.codistill_start_timeout:g}). {self._what_was_seen(peers)}. "
            f"To train alone rather than not at all{', as where the others have finished' if elapsed else ''}, set "
            "--codistill-require-peers never"
        )

    def check(self, refused: set[int]) -> None:
        """While training. Now and then the peers are told that this rank lives: nothing may be exchanged for long.

        Args:
            refused: models that nothing is taken of.

        Raises:
            NoPeersError: somebody is always required, nobody was heard for ``--codistill-timeout`` seconds (of one that
                nobody has waited for: twice, with checkpoints ten times that), and no peer has finished in order.
        """
        peers = self._peers()
        if not peers or self._config.codistill_weight == 0:
            return
        now = time.monotonic()
        if now >= self._sign_due_at:  # whatever is required here: a peer may require this rank
            self._sign_due_at = now + self._config.codistill_timeout / SIGNS
            self._mailbox.tell_again()
        if self._config.codistill_require_peers != "always":
            return
        timeout = self._config.codistill_timeout
        if now - self._checked_at > timeout:  # as after a validation, in which the others were as silent as this rank
            self._listening_since = now
        self._checked_at = now
        silent_since, dead_since = now - timeout, now - DEAD[self._config.codistill_exchange] * timeout
        if self._listening_since > dead_since:
            dead_since = float("-inf")
        if any(peer.is_done or not (peer.model in refused or peer.is_gone(silent_since, dead_since)) for peer in peers):
            return
        raise NoPeersError(
            f"no model is left to teach model {self._config.codistill_model_index} (--codistill-require-peers always). "
            f"{self._what_was_seen(peers)}. To train on alone in such a case, set --codistill-require-peers start"
        )

    def _peers(self) -> list[Peer]:
        return [] if self._mailbox.is_interrupted else list(self._mailbox.peers.values())

    def summary(self) -> dict[str, Any]:
        """``peers_met`` (models), and how often one was lost (``peers_lost``) and found again (``peers_found``)."""
        peers = self._mailbox.peers.values()
        return {
            "peers_met": [peer.model for peer in peers if peer.hello is not None],
            "peers_lost": sum(peer.num_lost for peer in peers),
            "peers_found": sum(peer.num_found for peer in peers),
        }

    def _what_was_seen(self, peers: list[Peer]) -> str:
        seen = "; ".join(f"model {peer.model}: {self._describe(peer)}" for peer in peers)
        strangers = self._mailbox.courier.strangers()
        return f"Seen: {seen}" + (f". {strangers}" if strangers else "")

    def _describe(self, peer: Peer) -> str:
        """Where a peer stands; of one that was never met, what is seen of it."""
        if self._mailbox.meeting.has_met(peer):
            silence = f", nothing heard for {peer.silent_s:.0f} s" if peer.state is PeerState.PRESENT else ""
            return f"{peer.state.value}, {peer.reason}{silence}"
        is_known = peer.state is PeerState.FINISHED or peer.hello is not None
        return (f"{peer.reason}; " if is_known else "") + self._mailbox.courier.describe(peer.model)
