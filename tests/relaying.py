"""What tests of the relay share: a real one in a process of its own, key sets, and transports through it."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import environment, free_ports

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.transports.choice import make_transport
from fairseq_codistill.coordinator.transports.curve_keys import make_keys


@dataclasses.dataclass
class Relay:
    """A process of ``codistill-relay``, which can be killed and started again on its port."""

    port: int
    folders: list
    log: object
    options: tuple = ()
    prefix: tuple = ()
    bind: str = "127.0.0.1"
    process: subprocess.Popen = None

    @property
    def address(self):
        return f"{self.bind}:{self.port}"

    def start(self):
        command = [
            *self.prefix, sys.executable, "-m", "fairseq_codistill.relay.command", "--port", str(self.port),
            "--bind", self.bind, "--keys", *map(str, self.folders), *self.options,
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def said(self):
        return self.log.read_text()

    def wait_for(self, text, seconds=30.0):
        until(lambda: text in self.said(), seconds, lambda: f"{text!r} is not in:\n{self.said()}")


@contextlib.contextmanager
def running_relay(tmp_path, *folders, options=(), **values):
    """A relay that serves these key sets."""
    relay = Relay(free_ports(1)[0], list(folders), tmp_path / "relay.log", options, **values)
    relay.start()
    try:
        relay.wait_for("listening on")
        yield relay
    finally:
        if relay.process.poll() is None:
            relay.process.send_signal(signal.SIGTERM)
            relay.process.wait(30)


def key_set(folder, num_models=2, relay=None):
    make_keys(str(folder), num_models, relay)
    return folder


def config(relay, keys, model, num_models=2, **changes):
    return CodistillationConfig(
        codistill_num_models=num_models, codistill_model_index=model, codistill_relay=relay,
        codistill_keys=str(keys), **{"codistill_codec": "fp32", **changes},
    )  # fmt: skip


def transport(relay, keys, model, num_models=2, rank=0, messages_per_update=1):
    return make_transport(config(relay, keys, model, num_models), rank, 1, messages_per_update)


def until(condition, seconds=30.0, why=lambda: "it never became true"):
    """What ``condition()`` gives as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.005)
    return value


def resident_bytes(pid):
    with open(f"/proc/{pid}/status") as status:
        (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


@dataclasses.dataclass(frozen=True)
class Host:
    """A network namespace on the switch."""

    name: str
    address: str

    @property
    def prefix(self):
        return ("ip", "netns", "exec", self.name)

    def ip(self, *arguments):
        run("ip", "-n", self.name, *arguments)

    def limit(self, mbit_per_s):
        """What it sends, by a token bucket with the queue of a home router."""
        rate = f"tbf rate {mbit_per_s}mbit burst 16kb limit 128kb".split()
        run("tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "root", *rate)

    def accept_nothing(self):
        """Drop every TCP packet that would open a connection to it, as a router with NAT does."""
        if shutil.which("nft") is None:
            pytest.skip("dropping connections needs nftables")
        for rule in (
            "add table inet codistill",
            "add chain inet codistill input { type filter hook input priority 0; }",
            "add rule inet codistill input tcp flags & (syn | ack) == syn drop",
        ):
            run(*self.prefix, "nft", rule)

    def sent_bytes(self):
        shown = subprocess.run(
            [*self.prefix, "cat", "/sys/class/net/eth0/statistics/tx_bytes"], capture_output=True, text=True, check=True
        )
        return int(shown.stdout)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True)


@contextlib.contextmanager
def switched_hosts(count, prefix="10.79.0"):
    """So many hosts that all reach each other."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("network namespaces need root and iproute2")
    switch, *names = [f"cr{os.getpid()}{end}" for end in ("s", *range(count))]
    hosts = [Host(name, f"{prefix}.{number}") for number, name in enumerate(names, start=1)]
    try:
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        for number, host in enumerate(hosts):
            run("ip", "netns", "add", host.name)
            host.ip("link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", switch)
            run("ip", "-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            host.ip("link", "set", "lo", "up")
        yield hosts
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
