"""Owns the keys of a run: a CURVE key pair a model and one of the launcher, made once, and who may connect to whom.

A key set is a folder: ``model-0.key_secret`` … (private, one a model) and ``model-0.key`` … (public). Every host needs
the public files and the private one of its own model. With ``launcher.key_secret`` one can say that a model has ended,
and nothing else. What is there for a relay: :mod:`~fairseq_codistill.coordinator.transports.relay_keys`.
"""

import argparse
import dataclasses
import os
import stat

import zmq
import zmq.auth

from fairseq_codistill import __version__
from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.transports.relay_keys import check_public, make_relay_keys, whole

LAUNCHER = "launcher"


@dataclasses.dataclass(frozen=True)
class KeySet:
    """What one model needs of a key set; keys are in ZeroMQ's Z85 form, 40 bytes each.

    Attributes:
        public: model -> its public key, of all models of the run.
        secret: the private key of this model, or of the launcher.
        launcher: its public key; None in a key set of before there was one.
    """

    public: dict[int, bytes]
    secret: bytes = dataclasses.field(repr=False)
    launcher: bytes | None = None


def make_keys(folder: str, num_models: int, relay: str | None = None) -> None:
    """Make a key set of ``num_models`` key pairs, one of the launcher, and what a relay needs.

    Args:
        folder: made if need be, readable by its owner only.
        num_models: n, at least 1.
        relay: ``relay.key`` of a relay that is there; None makes a key pair for one.

    Raises:
        ConfigError: the folder holds a key already; it would be lost, and with it every run that uses it. Or
            ``relay`` is no public key.
    """
    if num_models < 1:
        raise ConfigError(f"--num-models is {num_models}; it must be at least 1")
    if relay is not None:
        check_public(relay)  # before a set is begun that would stay without it
    os.makedirs(folder, mode=0o700, exist_ok=True)
    present = sorted(name for name in os.listdir(folder) if name.endswith((".key", ".key_secret")))
    if present:
        raise ConfigError(f"{folder!r} holds {present[0]} already; give another folder, or remove its keys first")
    previous = os.umask(0o077)
    try:
        for name in (*map(_name, range(num_models)), LAUNCHER):
            zmq.auth.create_certificates(folder, name)
        make_relay_keys(folder, relay)
    finally:
        os.umask(previous)


def load_keys(folder: str, model: int, num_models: int) -> KeySet:
    """Read what ``model`` needs.

    Raises:
        ConfigError: a key is missing or damaged, or others can read the private one.
    """
    has_launcher = os.path.exists(os.path.join(folder, f"{LAUNCHER}.key"))
    launcher = _load(folder, f"{LAUNCHER}.key", num_models)[0] if has_launcher else None
    return KeySet(_load_public(folder, num_models), _load_private(folder, _name(model), num_models), launcher)


def load_launcher_keys(folder: str, num_models: int) -> KeySet:
    """Read what the launcher needs to speak for a model that has ended.

    Raises:
        ConfigError: a key is missing or damaged, or others can read the private one.
    """
    launcher = _load(folder, f"{LAUNCHER}.key", num_models)[0]
    return KeySet(_load_public(folder, num_models), _load_private(folder, LAUNCHER, num_models), launcher)


def _load_public(folder: str, num_models: int) -> dict[int, bytes]:
    return {index: _load(folder, f"{_name(index)}.key", num_models)[0] for index in range(num_models)}


def _load_private(folder: str, name: str, num_models: int) -> bytes:
    path = os.path.join(folder, f"{name}.key_secret")
    own, secret = _load(folder, f"{name}.key_secret", num_models)
    if secret is None or own != _load(folder, f"{name}.key", num_models)[0]:
        raise ConfigError(f"--codistill-keys: {path} does not belong to {name}.key; copy both from one key set")
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        raise ConfigError(f"--codistill-keys: others can read the private key {path}; run: chmod 600 {path}")
    return secret


def _name(model: int) -> str:
    return f"model-{model}"


def _load(folder: str, name: str, num_models: int) -> tuple[bytes, bytes | None]:
    path = os.path.join(folder, name)
    try:
        public, secret = zmq.auth.load_certificate(path)
        return whole(public), None if secret is None else whole(secret)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--codistill-keys: cannot read {path} ({error}); make a key set with: codistill-keys --num-models "
            f"{num_models} FOLDER, and copy it to every host"
        ) from error


def main() -> None:
    """Console script ``codistill-keys``."""
    parser = argparse.ArgumentParser(
        prog="codistill-keys",
        description="Make the keys by which the models of a run know each other and encrypt what they send. Copy the "
        "folder to every host (of the *.key_secret files each needs only its own model's, and the launcher's where "
        "codistill-launch runs) and give it to every job as --codistill-keys FOLDER. Where a relay is used, the relay "
        "needs the *.key files and relay.key_secret, and every job run.key_secret.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("folder", help="where to put them")
    parser.add_argument("--num-models", type=int, required=True, metavar="N", help="n, one key pair a model")
    parser.add_argument(
        "--relay", metavar="FILE", help="relay.key of a relay that is there already, for a run that shall share it"
    )
    options = parser.parse_args()
    try:
        make_keys(options.folder, options.num_models, options.relay)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    print(f"{options.num_models} key pairs in {options.folder}; keep the *.key_secret files private")
