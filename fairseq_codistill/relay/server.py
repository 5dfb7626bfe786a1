"""Owns the socket of a relay and its loop: who joins, who is told, and what goes on to whom.

One ROUTER, one thread. It never waits for a guest and never stops reading: what does not fit for a slow one is dropped
for that one, and its peers are told to stop. It cannot read what it forwards, and keeps nothing.
"""

import logging
import signal
import time
from types import FrameType

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.transports import relay_frames
from fairseq_codistill.coordinator.transports.transport import ENCRYPTION_BYTES
from fairseq_codistill.coordinator.transports.way import FAILURES
from fairseq_codistill.coordinator.wire import LAUNCHER, WireError
from fairseq_codistill.relay.keyrings import Keyrings
from fairseq_codistill.relay.lobby import MAX_WAITING, Guest, Lobby

logger = logging.getLogger(__name__)

POLL_S = 0.02  # how often a guest without room is looked at
LONGEST_SLEEP_S = 0.5
LOOK_S = 30.0  # how often all are told how things stand: who is gone is noticed by that, and leaves room for the others
HEADER_ROOM = 2**10  # bytes that a message takes up beside its payload, at most
INCOMING = 2  # messages of one guest that ZeroMQ holds for this loop


class Relay:
    """One relay.

    Args:
        host: address or interface to listen on.
        port: likewise.
        keyrings: who may come.
        memory_bytes: what may wait for all guests together.
        max_message_bytes: guests are told to send none that is larger, or larger than what each of their peers has
            room for; a larger frame is refused before memory is taken for it, and its connection dropped.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(self, host: str, port: int, keyrings: Keyrings, memory_bytes: int, max_message_bytes: int):
        self._keyrings, self._lobby = keyrings, Lobby(memory_bytes)
        self._memory_bytes, self._max_message_bytes = memory_bytes, max_message_bytes
        self._context: zmq.Context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", keyrings)
        router = self._context.socket(zmq.ROUTER)
        router.curve_server = True
        router.curve_publickey, router.curve_secretkey = keyrings.public, keyrings.secret
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # say so when a guest is gone, or has no room
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a guest whose old connection is not known to be dead
        router.setsockopt(zmq.SNDHWM, MAX_WAITING)
        router.setsockopt(zmq.RCVHWM, INCOMING)
        router.setsockopt(zmq.MAXMSGSIZE, max_message_bytes + ENCRYPTION_BYTES)
        router.setsockopt(zmq.LINGER, 0)
        for option, value in ((zmq.TCP_KEEPALIVE, 1), (zmq.TCP_KEEPALIVE_IDLE, 10), (zmq.TCP_KEEPALIVE_INTVL, 5)):
            router.setsockopt(option, value)
        router.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
        self._monitor = router.get_monitor_socket(FAILURES)
        self._monitor.set_hwm(0)
        self._router = router
        self.counts = dict.fromkeys(("forwarded", "dropped", "refused_connections", "bytes"), 0)
        self._signal = 0
        try:
            router.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot listen on {host}:{port} ({error}); give another --port or --bind") from error

    def run(self) -> int:
        """Until a signal asks to end; returns its number."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        looked = time.monotonic()
        while not self._signal:
            if time.monotonic() - looked >= LOOK_S:
                looked = time.monotonic()
                self.look_around()
            short = [guest for guest in self._lobby.by_identity.values() if guest.full_for]
            ready = dict(poller.poll(int(1000 * (POLL_S if short else LONGEST_SLEEP_S))))
            if self._monitor in ready:
                self._count_refusals()
            if self._router in ready:
                self._take_all()
            for guest in short:
                self._note_room(guest)
        return self._signal

    def look_around(self) -> None:
        """Tell all how things stand: who is gone, and of whom nobody else would find out, is forgotten by that."""
        for guest in list(self._lobby.by_identity.values()):
            self._tell(guest)

    def close(self) -> None:
        self._router.disable_monitor()
        self._monitor.close(linger=0)
        self._router.close(linger=0)
        self._authenticator.stop()
        self._context.term()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    # -- what comes ------------------------------------------------------------------------------------------------

    def _take_all(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < LONGEST_SLEEP_S:
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._take(frames)
            except WireError as error:
                logger.warning("refused a message: %s", error)

    def _take(self, frames: list[zmq.Frame]) -> None:
        identity, kind = frames[0].bytes, frames[1].buffer[:1] if len(frames) > 1 else b""
        guest = self._lobby.by_identity.get(identity)
        if kind == relay_frames.JOIN:
            self._let_in(identity, str(frames[0].get("User-Id")), frames[1].bytes)
        elif guest is None:
            self._send(identity, [relay_frames.UNKNOWN])
        elif kind == relay_frames.DATA:
            self._forward(guest, frames[1:])
        else:
            raise WireError(f"message of an unknown kind from {guest}")

    def _let_in(self, identity: bytes, key: str, frame: bytes) -> None:
        member = self._keyrings.find(key)
        if member is None:
            return  # its key set was taken away since
        try:
            rank, session, num_senders = relay_frames.read_join(frame)
        except WireError as error:
            self._send(identity, [relay_frames.REFUSED + str(error).encode()])
            raise
        guest = Guest(identity, member, rank, session, num_senders)
        share = self._lobby.share_bytes()
        before = self._lobby.enter(guest)
        if before is not None and before.session != session:
            why = f"another process has joined as {guest}; are there two jobs of one --codistill-model-index?"
            self._send(before.identity, [relay_frames.REPLACED + why.encode()])
        logger.info("%s is here%s", guest, " again" if before is not None else "")
        if self._lobby.share_bytes() < share:
            self.look_around()  # messages that had room may have none: all need to know
        else:
            self._tell_around(guest)

    def _forward(self, sender: Guest, frames: list[zmq.Frame]) -> None:
        targets = relay_frames.read_targets(frames[0].bytes, len(frames))
        payload = frames[-1]
        for model, header in zip(targets, frames[1:-1], strict=True):
            guest = self._lobby.find(sender, model)
            if guest is None:
                self.counts["dropped"] += 1
                self._tell(sender)
                continue
            num_bytes = len(payload.buffer) + len(header.buffer)
            if not self._lobby.fits(guest, num_bytes, sender.member.model):
                self._drop(guest, num_bytes, sender.member.model)
                continue
            # One buffer for all receivers, of which each has a frame of its own to see when it has left.
            tracked = zmq.Frame(payload.buffer, track=True, copy=False, copy_threshold=0)
            try:
                self._router.send(guest.identity, zmq.NOBLOCK | zmq.SNDMORE)
                self._router.send(relay_frames.download(sender.member.model), zmq.NOBLOCK | zmq.SNDMORE)
                self._router.send(header.bytes, zmq.NOBLOCK | zmq.SNDMORE)
                self._router.send(tracked, zmq.NOBLOCK, copy=False, track=True)
            except zmq.Again:
                self._drop(guest, num_bytes, sender.member.model)
                continue
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self.counts["dropped"] += 1
                self._see_off(guest)
                continue
            guest.note(tracked.tracker, num_bytes, sender.member.model)
            self.counts["forwarded"] += 1
            self.counts["bytes"] += num_bytes
            self._note_room(guest)

    # -- what is said ----------------------------------------------------------------------------------------------

    def _drop(self, guest: Guest, num_bytes: int, sender: int) -> None:
        self.counts["dropped"] += 1
        count = self.counts["dropped"]
        if count & (count - 1) == 0:  # 1st, 2nd, 4th, 8th ...
            logger.warning("%d messages dropped so far, the last one for %s: too much waits for it", count, guest)
        if num_bytes > self._lobby.message_bytes(guest) // 2:
            logger.warning(
                "a message of %.0f MiB is more than half of what each peer may have waiting for one of %d ranks; raise "
                "--memory-mb (now %d)",
                num_bytes / 2**20,
                len(self._lobby.by_identity),
                self._memory_bytes // 2**20,
            )
        self._note_room(guest, sender)

    def _note_room(self, guest: Guest, dropped_of: int | None = None) -> None:
        """Tell each peer for which it has changed whether there is room; for one whose message was dropped is none."""
        for other in list(self._lobby.around(guest).values()):
            model = other.member.model
            if other is guest or model == LAUNCHER:
                continue
            is_short = model == dropped_of or self._lobby.is_short_of_room(guest, model)
            if is_short != (model in guest.full_for):
                guest.full_for ^= {model}
                self._tell(other)

    def _tell_around(self, guest: Guest) -> None:
        for other in list(self._lobby.around(guest).values()):
            self._tell(other)

    def _tell(self, guest: Guest) -> None:
        limit = max(0, min(self._max_message_bytes, self._lobby.message_bytes(guest) - HEADER_ROOM))
        self._send(guest.identity, relay_frames.standing(self._lobby.standing(guest), limit))

    def _send(self, identity: bytes, frames: list[bytes]) -> None:
        try:
            self._router.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.Again:  # it does not read: it hears of the next change
            pass
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._see_off(self._lobby.by_identity.get(identity))

    def _see_off(self, guest: Guest | None) -> None:
        if guest is not None and self._lobby.by_identity.get(guest.identity) is guest:
            logger.info("%s is gone", guest)
            self._lobby.leave(guest)
            for other in list(self._lobby.around(guest).values()):
                self._tell(other)

    def _count_refusals(self) -> None:
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self.counts["refused_connections"] += 1
            count = self.counts["refused_connections"]
            if count & (count - 1) == 0:
                logger.warning("refused a connection (%d so far): no key set of --keys knows its key", count)
