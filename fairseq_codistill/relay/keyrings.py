"""Owns who may use a relay: the public keys of several runs, and which model of which run each belongs to.

A folder is a key set, or holds key sets, one a run. It is read again when somebody knocks whom nobody knows, so that a
run can be added while others go on. A key set in a folder that cannot be used is left out, with a warning: it must not
keep the other runs away. No private key of a model is ever read.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.transports.relay_keys import RELAY, RUN_KEY, public_key, secret_key
from fairseq_codistill.coordinator.wire import LAUNCHER

logger = logging.getLogger(__name__)

READ_AGAIN_S = 1.0
_PUBLIC = re.compile(r"(?:model-(\d{1,4})|launcher)\.key")


class Member(NamedTuple):
    """Whose key it is: a model (or ``LAUNCHER``) of the run whose key set is in that folder."""

    run: str
    model: int


class Keyrings:
    """Of all runs that share a relay.

    Args:
        folders: key sets, or folders of key sets.

    Attributes:
        public: key of the relay, in ZeroMQ's Z85 form.
        secret: its private key.

    Raises:
        ConfigError: a folder holds no key set or is one that cannot be used, none holds the relay's private key, or
            they hold those of two relays.
    """

    def __init__(self, folders: Sequence[str]):
        self._folders = list(folders)
        self._lock = threading.Lock()
        self._read_at = time.monotonic()
        self._places: set[str] = set()  # key sets in use
        self._left_out: set[str] = set()  # key sets that cannot be used, which is said once
        secrets = {}
        for folder in folders:
            sets = list(_key_sets(folder))
            if not sets:
                raise ConfigError(
                    f"--keys {folder}: no key set is there (model-0.key and so on); make one with: codistill-keys "
                    "--num-models N FOLDER"
                )
            for place in {folder, *sets}:
                path = os.path.join(place, f"{RELAY}.key_secret")
                if os.path.exists(path):
                    secrets[secret_key(path)] = os.path.join(place, f"{RELAY}.key")
        if len(secrets) != 1:
            found = "; ".join(sorted(secrets.values())) or f"no {RELAY}.key_secret"
            raise ConfigError(
                f"--keys {' '.join(folders)}: a relay has one key pair, and found was: {found}. Copy the key set of "
                "one run with its relay.key_secret here; make those of the others with codistill-keys --relay relay.key"
            )
        ((self.secret, path),) = secrets.items()
        self.public = public_key(path)
        self._members = self._read()
        for folder in folders:
            for place in _key_sets(folder):
                if os.path.exists(os.path.join(place, RUN_KEY)):
                    logger.warning(
                        "%s holds %s, by which the run seals what it sends; a relay on somebody else's host must not "
                        "have it",
                        place,
                        RUN_KEY,
                    )

    def find(self, key: str) -> Member | None:
        """Whose key that is; any thread may ask."""
        with self._lock:
            if key not in self._members and time.monotonic() - self._read_at > READ_AGAIN_S:
                self._read_at = time.monotonic()
                with contextlib.suppress(ConfigError):  # a folder is away: nothing has changed
                    self._members = self._read(is_start=False)
            return self._members.get(key)

    def callback(self, domain: str, key: bytes) -> bool:
        """In the form that ZeroMQ's authenticator asks for."""
        return self.find(key.decode()) is not None

    def runs(self) -> list[str]:
        return sorted({member.run for member in self._members.values()})

    def _read(self, is_start: bool = True) -> dict[str, Member]:
        found: dict[str, Member] = {}
        for folder in self._folders:
            # A run that is going on keeps its place, whoever has copied its keys.
            for place in sorted(_key_sets(folder), key=lambda place: place not in self._places):
                try:
                    self._check_relay(place)
                    members = _members_of(place)
                    for key in members.keys() & found.keys():
                        if found[key].run != place:
                            raise ConfigError(
                                f"--keys: {place} and {found[key].run} hold the same key; give each run its own"
                            )
                except (ConfigError, OSError) as error:
                    if is_start and place == os.path.normpath(folder):
                        raise
                    if place not in self._left_out:
                        logger.warning("the key set %s is left out: %s", place, error)
                    self._left_out.add(place)
                    continue
                self._left_out.discard(place)
                found |= members
        self._places = {member.run for member in found.values()}
        return found

    def _check_relay(self, place: str) -> None:
        path = os.path.join(place, f"{RELAY}.key")
        if public_key(path) != self.public:
            raise ConfigError(
                f"--keys: {path} is the key of another relay; make the key set with: codistill-keys --relay relay.key"
            )


def _members_of(place: str) -> dict[str, Member]:
    """Public key -> whose it is, of one key set."""
    found = {}
    for name in sorted(os.listdir(place)):
        match = _PUBLIC.fullmatch(name)
        if match is not None:
            model = LAUNCHER if match[1] is None else int(match[1])
            found[public_key(os.path.join(place, name)).decode()] = Member(place, model)
    return found


def _key_sets(folder: str) -> Iterator[str]:
    """The folder itself, if it is a key set, and those in it."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"--keys {folder}: {error}") from error
    for place in (folder, *(os.path.join(folder, name) for name in names)):
        if os.path.isfile(os.path.join(place, "model-0.key")):
            yield os.path.normpath(place)
