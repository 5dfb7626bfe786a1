"""Owns what a relay may not read: payloads and headers, sealed with the key that all models of a run share.

A relay is somebody else's machine: it forwards, and learns sizes, times and who speaks to whom. The key never goes
there. A header is bound to its payload and to the process that receives it, and is taken once; what was changed, mixed
or repeated on the way is refused. Models of one run trust each other, here as elsewhere.
"""

import os
import struct

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.wire import WireError

NONCE_BYTES = 24
TAG_BYTES = 16
SESSION_BYTES = 8
# Session, number, receiving model and its session, nonce of the payload.
_INNER = struct.Struct(f"<{SESSION_BYTES}sQH{SESSION_BYTES}s{NONCE_BYTES}s")
# What sealing adds to a header and to a payload, in bytes.
HEADER_OVERHEAD = _INNER.size + NONCE_BYTES + TAG_BYTES
PAYLOAD_OVERHEAD = NONCE_BYTES + TAG_BYTES


class Seal:
    """Seals what one process sends, and opens what its peers sent.

    Args:
        key: 32 bytes, of :func:`~fairseq_codistill.coordinator.transports.curve_keys.load_run_key`.
        model: index of this model, the receiver of what is opened.

    Attributes:
        session: of this process, drawn anew.

    Raises:
        ConfigError: PyNaCl is not installed.
    """

    def __init__(self, key: bytes, model: int):
        try:
            import nacl.exceptions
            import nacl.secret
        except ImportError as error:
            raise ConfigError(
                "--codistill-relay is set, and PyNaCl, which seals what a relay forwards, is not installed; run: "
                "pip install 'fairseq-codistill[relay]'"
            ) from error
        self._box, self._broken = nacl.secret.SecretBox(key), nacl.exceptions.CryptoError
        self.session = os.urandom(SESSION_BYTES)
        self._model = model
        self._number = 0
        self._last: dict[int, tuple[bytes, int]] = {}  # model -> session and number that came last
        self._past: dict[int, set[bytes]] = {}  # model -> its earlier sessions

    def seal(
        self, headers: dict[int, bytes], payload: bytes | memoryview, sessions: dict[int, bytes]
    ) -> tuple[dict[int, bytes], bytes]:
        """One message, for everybody who gets it.

        Args:
            headers: receiving model -> its header.
            payload: the same for all.
            sessions: receiving model -> that of its process.

        Returns:
            the headers and the payload, sealed.
        """
        nonce = os.urandom(NONCE_BYTES)
        self._number += 1
        sealed = {}
        for model, header in headers.items():
            inner = _INNER.pack(self.session, self._number, model, sessions[model], nonce) + header
            sealed[model] = bytes(self._box.encrypt(inner))
        return sealed, bytes(self._box.encrypt(bytes(payload), nonce))

    def open(self, sender: int, header: bytes, payload: bytes) -> tuple[bytes, bytes] | None:
        """What a peer sealed.

        Args:
            sender: model that the relay says it came from.
            header: sealed.
            payload: sealed.

        Returns:
            header and payload; None for what came before, as after a connection that broke.

        Raises:
            WireError: it was not sealed with this run's key, not for this process of this model, or not together.
        """
        try:
            inner = self._box.decrypt(bytes(header))
            if len(inner) < _INNER.size:
                raise WireError("sealed header that is too short")
            session, number, receiver, its_session, nonce = _INNER.unpack_from(inner)
            if receiver != self._model:
                raise WireError(f"sealed message for model {receiver} came to model {self._model}")
            if its_session != self.session:
                raise WireError(
                    f"message that was sealed for another process of model {self._model}, of before a restart"
                )
            if not self._is_new(sender, session, number):
                return None
            if payload[:NONCE_BYTES] != nonce:
                raise WireError("sealed header and payload are not of one message")
            opened = self._box.decrypt(payload[NONCE_BYTES:], nonce)
        except self._broken as error:
            raise WireError("what came through the relay was not sealed with this run's key") from error
        self._note(sender, session, number)
        return inner[_INNER.size :], opened

    def _is_new(self, sender: int, session: bytes, number: int) -> bool:
        last = self._last.get(sender)
        if session in self._past.get(sender, ()):
            return False
        return last is None or last[0] != session or number > last[1]

    def _note(self, sender: int, session: bytes, number: int) -> None:
        last = self._last.get(sender)
        if last is not None and last[0] != session:
            self._past.setdefault(sender, set()).add(last[0])
        self._last[sender] = (session, number)
