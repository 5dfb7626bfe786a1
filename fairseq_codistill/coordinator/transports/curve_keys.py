"""Owns the keys of a run: a CURVE key pair a model, made once, and who may connect to whom.

A key set is a folder: ``model-0.key_secret`` … (private, one a model) and ``model-0.key`` … (public). Every host needs
the public files and the private one of its own model.
"""

import argparse
import dataclasses
import os
import stat

import zmq
import zmq.auth

from fairseq_codistill import __version__
from fairseq_codistill.config import ConfigError


@dataclasses.dataclass(frozen=True)
class KeySet:
    """What one model needs of a key set; keys are in ZeroMQ's Z85 form, 40 bytes each.

    Attributes:
        public: model -> its public key, of all models of the run.
        secret: this model's private key.
    """

    public: dict[int, bytes]
    secret: bytes = dataclasses.field(repr=False)


def make_keys(folder: str, num_models: int) -> None:
    """Make a key set of ``num_models`` key pairs.

    Args:
        folder: made if need be, readable by its owner only.
        num_models: n, at least 1.

    Raises:
        ConfigError: the folder holds a key already; it would be lost, and with it every run that uses it.
    """
    if num_models < 1:
        raise ConfigError(f"--num-models is {num_models}; it must be at least 1")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    present = sorted(name for name in os.listdir(folder) if name.endswith((".key", ".key_secret")))
    if present:
        raise ConfigError(f"{folder!r} holds {present[0]} already; give another folder, or remove its keys first")
    previous = os.umask(0o077)
    try:
        for model in range(num_models):
            zmq.auth.create_certificates(folder, _name(model))
    finally:
        os.umask(previous)


def load_keys(folder: str, model: int, num_models: int) -> KeySet:
    """Read what ``model`` needs.

    Raises:
        ConfigError: a key is missing or damaged, or others can read the private one.
    """
    public = {}
    for index in range(num_models):
        public[index] = _load(folder, f"{_name(index)}.key", num_models)[0]
    path = os.path.join(folder, f"{_name(model)}.key_secret")
    own, secret = _load(folder, f"{_name(model)}.key_secret", num_models)
    if secret is None or own != public[model]:
        raise ConfigError(f"--codistill-keys: {path} does not belong to {_name(model)}.key; copy both from one key set")
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        raise ConfigError(f"--codistill-keys: others can read the private key {path}; run: chmod 600 {path}")
    return KeySet(public, secret)


def _name(model: int) -> str:
    return f"model-{model}"


def _load(folder: str, name: str, num_models: int) -> tuple[bytes, bytes | None]:
    path = os.path.join(folder, name)
    try:
        return zmq.auth.load_certificate(path)
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
        "folder to every host (of the *.key_secret files each needs only its own model's) and give it to every job "
        "as --codistill-keys FOLDER.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("folder", help="where to put them")
    parser.add_argument("--num-models", type=int, required=True, metavar="N", help="n, one key pair a model")
    options = parser.parse_args()
    try:
        make_keys(options.folder, options.num_models)
    except (ConfigError, OSError) as error:
        parser.error(str(error))
    print(f"{options.num_models} key pairs in {options.folder}; keep the *.key_secret files private")
