"""Trainings through a relay between hosts (network namespaces), one of which accepts nothing: as root, -m relay."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import codistill_command, environment, free_ports, make_toy_data, recorded_command, run_together
from relaying import key_set, running_relay, switched_hosts
from test_faults import past, start  # noqa: F401 - start is a fixture

pytestmark = [pytest.mark.relay, pytest.mark.timeout(900)]
pytest.importorskip("nacl")

PLAIN_LOOP = str(Path(__file__).with_name("plain_loop.py"))
MBIT_PER_S = 20


@pytest.fixture
def hosts():
    """The relay's, one that all reach, and one that nobody reaches; all send at 20 Mbit/s."""
    with switched_hosts(3, "10.79.1") as found:
        for host in found:
            host.limit(MBIT_PER_S)
        found[2].accept_nothing()
        yield found


@pytest.fixture
def relay(hosts, tmp_path):
    keys = key_set(tmp_path / "keys", 2)
    with running_relay(tmp_path, keys, prefix=hosts[0].prefix, bind=hosts[0].address) as running:
        yield running


def test_nobody_reaches_the_host_that_accepts_nothing_and_it_reaches_everybody(hosts):
    code = (
        "import socket, sys\n"
        "try: socket.create_connection((sys.argv[1], 29600), timeout=3)\n"
        "except ConnectionRefusedError: print('refused')\n"
        "except TimeoutError: print('no answer')"
    )

    def seen(there, here):
        command = [*here.prefix, sys.executable, "-c", code, there.address]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert seen(hosts[2], hosts[1]) == "no answer"
    assert seen(hosts[1], hosts[2]) == "refused"


def test_a_plain_loop_has_the_losses_of_a_direct_link(hosts, relay, tmp_path):
    def losses(name, env, prefixes):
        commands = [
            [*prefix, sys.executable, PLAIN_LOOP, str(tmp_path / f"{name}{model}"), str(model + 1), "--batches", "40"]
            for model, prefix in enumerate(prefixes)
        ]
        envs = [environment(CODISTILL_NUM_MODELS="2", CODISTILL_MODEL_INDEX=str(model), **env) for model in range(2)]
        for result in run_together(commands, 300, envs):
            assert result.returncode == 0, result.output
        return [torch.load(tmp_path / f"{name}{model}", weights_only=True)["losses"] for model in range(2)]

    ports = free_ports(2)
    direct = losses("direct", {"CODISTILL_ADDRESSES": ",".join(f"127.0.0.1:{port}" for port in ports)}, [(), ()])
    keys = str(relay.folders[0])
    relayed = losses(
        "relayed", {"CODISTILL_RELAY": relay.address, "CODISTILL_KEYS": keys}, [host.prefix for host in hosts[1:]]
    )
    assert relayed == direct
    assert len(direct[0]) == 40


def test_translation_has_the_losses_of_a_direct_link(hosts, relay, tmp_path):
    data = make_toy_data(tmp_path / "toy", num_train=120)
    keys = str(relay.folders[0])

    def losses(name, prefixes, *options, addresses="a:1,b:2"):
        commands = []
        for model, prefix in enumerate(prefixes):
            command = codistill_command(
                data, tmp_path / name / str(model), model, addresses, "--seed", str(model + 1), "--max-update", "25",
                "--codistill-timeout", "120", *options,
            )  # fmt: skip
            commands.append([*prefix, *recorded_command(command, tmp_path / f"{name}{model}.json")])
        results = run_together(commands, 600)
        for result in results:
            assert result.returncode == 0, result.output
            assert '"train_codistill_peers": "1"' in result.output
        return [json.loads((tmp_path / f"{name}{model}.json").read_text()) for model in range(2)]

    direct = losses("direct", [(), ()], addresses=",".join(f"127.0.0.1:{port}" for port in free_ports(2)))
    relayed = losses(
        "relayed", [host.prefix for host in hosts[1:]], "--codistill-relay", relay.address, "--codistill-addresses", "",
        "--codistill-keys", keys,
    )  # fmt: skip
    assert relayed == direct
    assert len(direct[0]) == 25


def test_a_link_that_is_cut_and_a_relay_that_is_killed_heal(hosts, relay, start):  # noqa: F811
    settings = ["n=2", "--relay", relay.address, "--keys", str(relay.folders[0]), "--updates", "1500"]
    models = [start(model, *settings, prefix=hosts[model + 1].prefix) for model in range(2)]
    for model in models:
        model.read_until(past(20))
    hosts[2].ip("link", "set", "eth0", "down")
    for model in models:
        model.read_until(lambda entry: entry.get("heard") == [])
    hosts[2].ip("link", "set", "eth0", "up")
    relay.kill()
    relay.start()
    for model in models:
        exchanges = model.finish()
        assert exchanges[-1]["heard"] == [1 - model.index]
        assert "is present (was away)" in "".join(model.log)
