"""Owns addresses: where every rank of every model listens, and what of an address can be bound. No sockets."""

import ipaddress
import socket

from fairseq_codistill.config import ConfigError


def parse_addresses(addresses: str, num_models: int, world_size: int) -> list[list[tuple[str, int]]]:
    """Where every rank of every model listens.

    Args:
        addresses: ``--codistill-addresses``.
        num_models: n.
        world_size: X, ranks of one model.

    Returns:
        ``[model][rank] -> (host, port)``.

    Raises:
        ConfigError: an entry is not HOST:PORT, there are not n of them, ranks do not divide over the hosts of an
            entry, or two ranks would share an address.
    """
    entries = [entry.strip() for entry in addresses.split(",") if entry.strip()]
    if len(entries) != num_models:
        raise ConfigError(f"--codistill-addresses lists {len(entries)} entries; {num_models} models need {num_models}")
    table = []
    for entry in entries:
        hosts_text, _, port_text = entry.rpartition(":")
        hosts = hosts_text.split("+")
        for host in (entry, *hosts):
            refuse_ipv6(f"--codistill-addresses: {entry!r}", host)
        if not port_text.isdecimal() or not all(map(is_host, hosts)) or not 0 < int(port_text) < 65536:
            raise ConfigError(
                f"--codistill-addresses: {entry!r} is not HOST:PORT (or HOST+HOST:PORT); HOST is a name or an IPv4 "
                "address, without a scheme, in ASCII"
            )
        if world_size % len(hosts):
            raise ConfigError(
                f"--codistill-addresses: {entry!r} names {len(hosts)} hosts, over which {world_size} ranks "
                "do not divide"
            )
        per_host = world_size // len(hosts)
        ranks = [(hosts[r // per_host], int(port_text) + r % per_host) for r in range(world_size)]
        if ranks[-1][1] > 65535:
            raise ConfigError(f"--codistill-addresses: {entry!r} with {world_size} ranks goes past port 65535")
        table.append(ranks)
    everyone = [address for ranks in table for address in ranks]
    for address in everyone:
        if everyone.count(address) > 1:
            raise ConfigError(
                f"--codistill-addresses {addresses!r}: two ranks would both listen on {address[0]}:{address[1]}; "
                f"leave {world_size} ports between models of one host"
            )
    return table


def is_host(text: str) -> bool:
    """Whether it can be the name or the IPv4 address of a host, as ZeroMQ takes it.

    >>> [is_host(text) for text in ("node1", "10.0.0.1", "tcp://node1", "node1 ", "münchen.de", "*", "")]
    [True, True, False, False, False, False, False]
    """
    return bool(text) and text.isascii() and not any(letter in "/:*" or letter.isspace() for letter in text)


def refuse_ipv6(what: str, host: str) -> None:
    """Raises:
    ConfigError: it is an address of IPv6, in brackets or not.
    """
    try:
        version = ipaddress.ip_address(host.strip("[]")).version
    except ValueError:  # a name
        return
    if version == 6:
        raise ConfigError(f"{what} is IPv6, which is not supported; give an IPv4 address, or a name that has one")


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine alone, by whatever name. A host name of one's own is not: others may use it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def binds_to_loopback(bind: str) -> bool:
    """Whether who listens on that address or interface is reached from this machine alone."""
    return is_loopback(bind) or bind in ("lo", "lo0")


def bindable(host: str, peer_hosts: list[str]) -> str:
    """The numeric address of ``host``; ZeroMQ binds to addresses and interfaces, not to names."""
    try:
        address = socket.gethostbyname(host)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--codistill-addresses: {host!r} has no IPv4 address that can be found out ({error}); name it by that"
        ) from error
    loopback = ipaddress.ip_address(address).is_loopback
    if loopback and host != address and host != "localhost" and any(peer != host for peer in peer_hosts):
        raise ConfigError(
            f"--codistill-addresses: {host!r} resolves to {address} on its own host, where no other host reaches it; "
            "give --codistill-bind the interface or address to listen on"
        )
    return address
