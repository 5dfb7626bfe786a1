"""Owns who is at a relay: ranks by run, model and number, and what waits in ZeroMQ to be sent to each. No sockets."""

import collections
import dataclasses
import os
from typing import Any

from fairseq_codistill.coordinator.transports.relay_frames import TOKEN_BYTES, Standing
from fairseq_codistill.coordinator.wire import LAUNCHER
from fairseq_codistill.relay.keyrings import Member

MAX_WAITING = 256  # messages for one guest, whatever their size
MIN_SHARES = 4  # so that the first to come does not take what the second needs


@dataclasses.dataclass
class Guest:
    """One rank, over one connection.

    Attributes:
        identity: by which ZeroMQ knows the connection.
        member: run and model, as its key says.
        rank: as it says itself.
        session: of its process.
        token: drawn for this connection.
        num_senders: peers that send to it at once.
        waiting: what ZeroMQ has not sent to it yet: a tracker, its bytes, and the model that sent them.
        waiting_by: bytes of those, by model.
        largest: bytes of the largest message so far.
        full_for: models that were told last that it has no room for them.
    """

    identity: bytes
    member: Member
    rank: int
    session: bytes
    num_senders: int = 1
    token: bytes = dataclasses.field(default_factory=lambda: os.urandom(TOKEN_BYTES))
    waiting: collections.deque[tuple[Any, int, int]] = dataclasses.field(default_factory=collections.deque)
    waiting_by: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    largest: int = 0
    full_for: set[int] = dataclasses.field(default_factory=set)

    @property
    def place(self) -> int | bytes:
        """In its room. A launcher has one for each death that it tells of: they may come together."""
        return self.identity if self.member.model == LAUNCHER else self.member.model

    @property
    def waiting_bytes(self) -> int:
        return self.waiting_by.total()

    def note(self, tracker: Any, num_bytes: int, sender: int) -> None:
        """ZeroMQ has taken a message for it."""
        self.waiting.append((tracker, num_bytes, sender))
        self.waiting_by[sender] += num_bytes
        self.largest = max(self.largest, num_bytes)

    def settle(self) -> None:
        """Forget what has been sent."""
        while self.waiting and self.waiting[0][0].done:
            _, num_bytes, sender = self.waiting.popleft()
            self.waiting_by[sender] -= num_bytes

    def __str__(self) -> str:
        model = "the launcher" if self.member.model == LAUNCHER else f"model {self.member.model}"
        return f"{model} rank {self.rank} of {self.member.run}"


class Lobby:
    """All guests.

    Args:
        memory_bytes: what may wait for all of them together.
    """

    def __init__(self, memory_bytes: int):
        self._memory_bytes = memory_bytes
        self.by_identity: dict[bytes, Guest] = {}
        self._by_place: dict[tuple[str, int], dict[int | bytes, Guest]] = {}  # run and rank -> place -> guest
        self._left: list[Guest] = []  # for whom ZeroMQ may still hold something: their connections may be open

    def enter(self, guest: Guest) -> Guest | None:
        """Take the place of that rank; returns another process that had it."""
        if (old := self.by_identity.get(guest.identity)) is not None:  # ZeroMQ holds what it held for it
            guest.waiting, old.waiting = old.waiting, guest.waiting
            guest.waiting_by, old.waiting_by = old.waiting_by, guest.waiting_by
            guest.largest, guest.full_for = old.largest, old.full_for
        self.leave(old)
        room = self._by_place.setdefault((guest.member.run, guest.rank), {})
        before = room.get(guest.place)
        if before is not None:
            self.leave(before)
            room = self._by_place.setdefault((guest.member.run, guest.rank), {})
        room[guest.place] = guest
        self.by_identity[guest.identity] = guest
        return before

    def leave(self, guest: Guest | None) -> None:
        """It is not there any more. Unknown guests may leave too."""
        if guest is None or self.by_identity.get(guest.identity) is not guest:
            return
        del self.by_identity[guest.identity]
        place = (guest.member.run, guest.rank)
        del self._by_place[place][guest.place]
        if not self._by_place[place]:
            del self._by_place[place]
        if guest.waiting:
            self._left.append(guest)

    def find(self, sender: Guest, model: int) -> Guest | None:
        """The same rank of another model of the sender's run."""
        return self.around(sender).get(model) if model != sender.member.model else None

    def around(self, guest: Guest) -> dict[int | bytes, Guest]:
        """Place -> guest, of those who see each other: one run, one rank."""
        return self._by_place.get((guest.member.run, guest.rank), {})

    def standing(self, guest: Guest) -> dict[int, Standing]:
        """What ``guest`` is told of the others."""
        return {
            one.member.model: Standing(one.session, one.token, guest.member.model not in one.full_for)
            for one in self.around(guest).values()
            if one is not guest and one.member.model != LAUNCHER
        }

    def share_bytes(self) -> int:
        """What may wait for one guest. For a launcher, which has a word to say and goes, nothing waits."""
        num_ranks = sum(one.member.model != LAUNCHER for one in self.by_identity.values())
        return self._memory_bytes // max(MIN_SHARES, num_ranks)

    def message_bytes(self, guest: Guest) -> int:
        """The largest message that always has room in a share, of which each that sends at once has a part."""
        return self.share_bytes() // max(1, guest.num_senders)

    def fits(self, guest: Guest, num_bytes: int, sender: int) -> bool:
        """Whether so much more of ``sender`` may wait for it, within its share and the memory of all."""
        for one in self.by_identity.values():
            one.settle()
        waiting, part = self._account(guest, sender)
        if self._is_owed_too_much(guest) or waiting + num_bytes > part:
            return False
        total = sum(one.waiting_bytes for one in (*self.by_identity.values(), *self._left))
        return total + num_bytes <= self._memory_bytes

    def is_short_of_room(self, guest: Guest, sender: int) -> bool:
        """Whether ``sender`` should stop: half its part is taken, and the rest is for what is on its way.

        Of large messages there are few: it need not stop before one has been dropped. By the time that it sends the
        next, the last may have been read, of which it would hear too late.
        """
        guest.settle()
        waiting, part = self._account(guest, sender)
        if guest.largest < part // 8:
            is_taken = waiting > part // 2
        else:
            # Where a part has become smaller than the largest so far, what comes may still have room.
            is_taken = sender in guest.full_for and waiting + min(guest.largest, part) > part
        return is_taken or len(guest.waiting) > MAX_WAITING // 2 or self._is_owed_too_much(guest)

    def _account(self, guest: Guest, sender: int) -> tuple[int, int]:
        """Bytes that wait, of those that count for ``sender``, and how many may: of all, where not all send at once."""
        share = self.share_bytes()
        num_peers = sum(one.member.model not in (guest.member.model, LAUNCHER) for one in self.around(guest).values())
        if guest.num_senders >= num_peers and sender != LAUNCHER:
            return guest.waiting_by[sender], share // max(1, guest.num_senders)
        return guest.waiting_bytes, share

    def _is_owed_too_much(self, guest: Guest) -> bool:
        """Whether more than a share waits for those who had its place before: one that is dead takes no more."""
        for one in self._left:
            one.settle()
        self._left = [one for one in self._left if one.waiting]
        place = (guest.member, guest.rank)
        return sum(one.waiting_bytes for one in self._left if (one.member, one.rank) == place) > self.share_bytes()
