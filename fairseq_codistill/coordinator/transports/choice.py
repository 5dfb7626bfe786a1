"""Owns the choice of a transport: the one that the options describe, with the keys it needs."""

import os

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.transports.addresses import (
    binds_to_loopback,
    is_loopback,
    parse_addresses,
    refuse_ipv6,
)
from fairseq_codistill.coordinator.transports.curve_keys import load_keys
from fairseq_codistill.coordinator.transports.gloo import GlooTransport
from fairseq_codistill.coordinator.transports.relay import RelayTransport, parse_relay
from fairseq_codistill.coordinator.transports.relay_keys import RELAY, load_run_key, public_key
from fairseq_codistill.coordinator.transports.transport import Transport
from fairseq_codistill.coordinator.transports.zeromq import ZeroMqTransport


def make_transport(config: CodistillationConfig, rank: int, world_size: int, messages_per_update: int = 1) -> Transport:
    """The transport of one rank.

    Args:
        config: validated options.
        rank: rank inside this model.
        world_size: X, ranks of this model.
        messages_per_update: how many a rank posts in one update.

    Raises:
        ConfigError: an address cannot be used, or keys are needed and not there.
    """
    if config.codistill_relay:
        return relay_transport(config, rank, messages_per_update)
    table = parse_addresses(config.codistill_addresses, config.codistill_num_models, world_size)
    me = config.codistill_model_index
    exposed = ""  # what others than this machine may reach
    refuse_ipv6(f"--codistill-bind {config.codistill_bind!r}", config.codistill_bind)
    if config.codistill_bind and not binds_to_loopback(config.codistill_bind):
        exposed = f"--codistill-bind {config.codistill_bind!r}"
    if not all(is_loopback(host) for ranks in table for host, _ in ranks):
        exposed = repr(config.codistill_addresses)
    listen, peers = table[me][rank], {model: ranks[rank] for model, ranks in enumerate(table) if model != me}
    if config.codistill_transport == "gloo":
        if config.codistill_keys != "none" and (config.codistill_keys or exposed):
            raise ConfigError(
                f"--codistill-transport is 'gloo' and --codistill-keys is {config.codistill_keys!r}: a process group "
                "is neither encrypted nor does it ask who connects. On a network that only you can reach, pass "
                "--codistill-keys none; else use --codistill-transport zmq"
            )
        return GlooTransport(
            me,
            listen,
            peers,
            config.codistill_start_timeout,
            config.codistill_bind,
            config.codistill_max_message_mb * 2**20,
            messages_per_update,
            config.codistill_max_queue_mb * 2**20,
            config.most_parts,
        )
    keys = None
    if config.codistill_keys and config.codistill_keys != "none":
        keys = load_keys(config.codistill_keys, me, config.codistill_num_models)
    elif not config.codistill_keys and exposed:
        raise ConfigError(
            f"--codistill-keys is not set, and {exposed} is not on loopback: anyone who reaches these ports "
            "could read and send predictions. Run codistill-keys --num-models "
            f"{config.codistill_num_models} FOLDER, copy FOLDER to every host and pass --codistill-keys FOLDER to "
            "every job; on a network that only you can reach, --codistill-keys none"
        )
    return ZeroMqTransport(
        listen=listen,
        peers=peers,
        bind_host=config.codistill_bind,
        max_message_bytes=config.codistill_max_message_mb * 2**20,
        model=me,
        keys=keys,
        messages_per_update=messages_per_update,
        max_queue_bytes=config.codistill_max_queue_mb * 2**20,
        at_once=config.most_parts,
    )


def relay_transport(config: CodistillationConfig, rank: int, messages_per_update: int = 1) -> RelayTransport:
    """That of one rank whose options name a relay.

    Raises:
        ConfigError: the relay is no HOST:PORT, or a key is missing.
    """
    folder, me = config.codistill_keys, config.codistill_model_index
    return RelayTransport(
        parse_relay(config.codistill_relay),
        me,
        [model for model in range(config.codistill_num_models) if model != me],
        rank,
        load_keys(folder, me, config.codistill_num_models),
        public_key(os.path.join(folder, f"{RELAY}.key")),
        load_run_key(folder),
        config.codistill_max_message_mb * 2**20,
        messages_per_update,
        config.codistill_max_queue_mb * 2**20,
        config.most_parts,
        config.codistill_peers_per_position,
    )
