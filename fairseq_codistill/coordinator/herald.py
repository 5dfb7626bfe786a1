"""Owns the notice of a death: who started the models tells the survivors that one has ended, in its place.

A survivor then goes on at once instead of waiting out a timeout. It imports no torch, so that a launcher stays light.
Over gloo there is no need: a connection that breaks is noticed by itself.
"""

import json
import logging
import os
import time
from collections.abc import Callable

import zmq

from fairseq_codistill.config import ConfigError
from fairseq_codistill.coordinator.peers import IN_ORDER
from fairseq_codistill.coordinator.transports.addresses import is_loopback, parse_addresses
from fairseq_codistill.coordinator.transports.curve_keys import KeySet, load_launcher_keys
from fairseq_codistill.coordinator.transports.relay import RelayTransport, parse_relay
from fairseq_codistill.coordinator.transports.relay_keys import RELAY, load_run_key, public_key
from fairseq_codistill.coordinator.wire import LAUNCHER, Kind, Message, run_id_from

logger = logging.getLogger(__name__)

POLL_S = 0.05
LINGER_S = 1.0  # for a notice that was taken by a live connection to leave


def announce_death(
    addresses: str,
    num_models: int,
    world_size: int,
    model: int,
    run_id: str,
    keys: str | None,
    reason: str,
    timeout_s: float = 2.0,
    returns: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Tell every rank of the other models that ``model`` has ended.

    Whoever has not opened its port yet is told as soon as it has, until ``timeout_s``: for a model that dies while the
    others still load their data give it as long as they may take, and ``stop``, in a thread.

    Args:
        addresses: ``--codistill-addresses``.
        num_models: n.
        world_size: X, ranks of one model.
        model: the one that has ended.
        run_id: ``--codistill-run-id``, empty where it is not set.
        keys: ``--codistill-keys``, whose ``launcher.key_secret`` must be here; None, empty or ``none`` without keys.
            Then only ranks that listen on loopback are told.
        reason: for their logs; ``"finished"`` says that it came to the end of its training.
        timeout_s: how long to try to reach them.
        returns: it is started again: who has not begun to train waits for it.
        stop: asked now and then; when true, nobody more is told, as before ``model`` is started again.

    Returns:
        ranks that were told.

    Raises:
        ConfigError: the addresses are none.
    """
    table = parse_addresses(addresses, num_models, world_size)
    key_set: KeySet | None = None
    if keys and keys != "none":
        try:
            key_set = load_launcher_keys(keys, num_models)
        except ConfigError as error:
            _say_untold(model, reason, error)
            return 0
    payload = json.dumps({"model": model, "reason": reason, "returns": returns}).encode()
    context: zmq.Context = zmq.Context()
    try:
        untold: dict[zmq.Socket, bytes] = {}  # socket -> header
        for survivor, ranks in enumerate(table):
            for rank, (host, port) in enumerate(ranks):
                if survivor == model or not (key_set or is_loopback(host)):
                    continue
                message = Message(Kind.GOODBYE, LAUNCHER, rank, run_id_from(run_id or addresses), payload)
                untold[_connect(context, survivor, host, port, key_set)] = message.header()
        return _tell(untold, payload, time.monotonic() + timeout_s, stop)
    finally:
        context.destroy(linger=int(LINGER_S * 1000))


def announce_death_through_relay(
    relay: str,
    num_models: int,
    world_size: int,
    model: int,
    run_id: str,
    keys: str,
    reason: str,
    timeout_s: float = 2.0,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Tell every rank of the other models that ``model`` has ended, through the relay that they use.

    Args:
        relay: ``--codistill-relay``; the rest as for :func:`announce_death`.

    Returns:
        ranks that were told.

    Raises:
        ConfigError: the relay is no HOST:PORT.
    """
    where = parse_relay(relay)
    try:
        key_set = load_launcher_keys(keys, num_models)
        relay_key, run_key = public_key(os.path.join(keys, f"{RELAY}.key")), load_run_key(keys)
    except ConfigError as error:
        _say_untold(model, reason, error)
        return 0
    payload = json.dumps({"model": model, "reason": reason, "returns": False}).encode()
    survivors = [survivor for survivor in range(num_models) if survivor != model]
    lines = [
        RelayTransport(where, LAUNCHER, survivors, rank, key_set, relay_key, run_key) for rank in range(world_size)
    ]
    try:
        untold = [(rank, survivor) for rank in range(world_size) for survivor in survivors]
        num_untold, deadline = len(untold), time.monotonic() + timeout_s
        while untold and not stop() and time.monotonic() < deadline:
            for rank, survivor in list(untold):
                header = Message(Kind.GOODBYE, LAUNCHER, rank, run_id_from(run_id or RELAY), payload).header()
                if lines[rank].send(survivor, header, payload):
                    untold.remove((rank, survivor))
            if untold:
                time.sleep(POLL_S)
        return num_untold - len(untold)
    finally:
        for line in lines:
            line.close(LINGER_S)


def _say_untold(model: int, reason: str, error: ConfigError) -> None:
    """A warning, but of a model that has finished: most have it from that model itself."""
    level = logging.INFO if reason == IN_ORDER else logging.WARNING
    logger.log(level, "codistillation: nobody is told that model %d has ended: %s", model, error)


def _connect(context: zmq.Context, survivor: int, host: str, port: int, key_set: KeySet | None) -> zmq.Socket:
    push = context.socket(zmq.PUSH)
    if key_set is not None:
        assert key_set.launcher is not None
        push.curve_publickey, push.curve_secretkey = key_set.launcher, key_set.secret
        push.curve_serverkey = key_set.public[survivor]
    push.setsockopt(zmq.IMMEDIATE, 1)  # only a live connection takes a message
    push.connect(f"tcp://{host}:{port}")
    return push


def _tell(untold: dict[zmq.Socket, bytes], payload: bytes, deadline: float, stop: Callable[[], bool]) -> int:
    """Send to each as soon as it is connected; returns how many were reached."""
    num_told = 0
    poller = zmq.Poller()
    for push in untold:
        poller.register(push, zmq.POLLOUT)
    while untold and not stop():
        for push, _ in poller.poll(int(POLL_S * 1000)):
            push.send_multipart([untold.pop(push), payload], zmq.NOBLOCK)
            poller.unregister(push)
            num_told += 1
        if time.monotonic() >= deadline:
            break
    return num_told
