"""Owns the part of a key set that is about a relay: the relay's own key pair, and the key by which a run seals.

``relay.key`` tells the jobs that they speak to their relay, ``relay.key_secret`` is the relay's alone, and
``run.key_secret``, the models' alone, keeps what they exchange from the relay.
"""

import os
import shutil
import stat
import struct

import zmq.auth
import zmq.utils.z85

from fairseq_codistill.config import ConfigError

RELAY = "relay"
RUN_KEY = "run.key_secret"
RUN_KEY_BYTES = 32
Z85_BYTES = 40  # of a key of 32 bytes in ZeroMQ's text form


def make_relay_keys(folder: str, relay: str | None = None) -> None:
    """Add them to a key set that is being made; the caller's umask keeps private what is.

    Args:
        folder: of the key set.
        relay: ``relay.key`` of a relay that is there, which the run shall use; None makes a new pair.

    Raises:
        ConfigError: ``relay`` is no public key.
    """
    if relay is None:
        zmq.auth.create_certificates(folder, RELAY)
    else:
        check_public(relay)
        shutil.copyfile(relay, os.path.join(folder, f"{RELAY}.key"))
    descriptor = os.open(os.path.join(folder, RUN_KEY), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(os.urandom(RUN_KEY_BYTES).hex() + "\n")


def whole(key: bytes) -> bytes:
    """A key in Z85 form, if it has the length of one.

    Raises:
        ValueError: it has not: the file was cut off, or something else is in it.
    """
    if len(key) != Z85_BYTES:
        raise ValueError(f"damaged: its key has {len(key)} characters, not {Z85_BYTES}")
    try:
        zmq.utils.z85.decode(key)
    except (KeyError, struct.error) as error:
        raise ValueError("damaged: its key is not in the form of ZeroMQ (Z85)") from error
    return key


def check_public(path: str) -> None:
    """Raises:
    ConfigError: it is no public key, or holds the private one as well, which is not to be copied.
    """
    public_key(path)
    if zmq.auth.load_certificate(path)[1] is not None:
        raise ConfigError(f"--relay {path} holds the relay's private key; give its relay.key")


def public_key(path: str) -> bytes:
    """The public key in a file, in ZeroMQ's Z85 form.

    Raises:
        ConfigError: there is none.
    """
    try:
        return whole(zmq.auth.load_certificate(path)[0])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the public key {path} ({error}); codistill-keys makes it, and all who use a relay need it"
        ) from error


def secret_key(path: str) -> bytes:
    """The private key in a file, in ZeroMQ's Z85 form.

    Raises:
        ConfigError: there is none, or others can read it.
    """
    secret, reason = None, ""
    try:
        secret = zmq.auth.load_certificate(path)[1]
    except (OSError, ValueError) as error:
        reason = f" ({error})"
    if secret is None or len(secret) != Z85_BYTES:
        raise ConfigError(
            f"there is no private key, or not all of it, in {path}{reason}; copy it, for this user to read, from the "
            "key set that codistill-keys made"
        )
    _check_private(path)
    return secret


def load_run_key(folder: str) -> bytes:
    """The 32 bytes by which all models of a run seal what a relay forwards.

    Raises:
        ConfigError: it is not there, damaged, or others can read it.
    """
    path = os.path.join(folder, RUN_KEY)
    try:
        with open(path, encoding="ascii") as file:
            key = bytes.fromhex(file.read().strip())
        if len(key) != RUN_KEY_BYTES:
            raise ValueError(f"{len(key)} bytes, expected {RUN_KEY_BYTES}")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--codistill-relay: cannot read {path} ({error}); a key set that codistill-keys makes has it, and every "
            "model needs it, the relay not"
        ) from error
    _check_private(path)
    return key


def _check_private(path: str) -> None:
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        raise ConfigError(f"--codistill-keys: others can read the private key {path}; run: chmod 600 {path}")
