"""Faults of a real cluster, done to real processes: killed, stopped, cut off, late, slow. No run may hang or end."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import environment, free_ports

LOOP = str(Path(__file__).with_name("exchange_loop.py"))
SECONDS = 90


class Model:
    """A running exchange loop, and what it said."""

    def __init__(self, index, addresses, *extra, prefix=()):
        self.index, self.said, self.log = index, [], []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, LOOP, str(index), addresses, *extra],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
        )  # fmt: skip

        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                self.said.append(json.loads(line))
            else:
                self.log.append(line)

    def read_until(self, is_enough):
        """Wait for an entry for which ``is_enough`` holds; fails if the model ends or ``SECONDS`` pass without one."""
        deadline = time.monotonic() + SECONDS
        while not any(is_enough(entry) for entry in list(self.said)):
            assert self._reader.is_alive(), f"model {self.index} ended without it:\n{''.join(self.log)}"
            assert time.monotonic() < deadline, f"model {self.index} hangs:\n{''.join(self.log)}\n{self.said[-5:]}"
            time.sleep(0.02)

    def finish(self):
        """Its exit code must be 0; returns the exchanges it made, in order."""
        self._reader.join(SECONDS)
        assert self.process.wait(SECONDS) == 0, "".join(self.log)
        return self.exchanges()

    def exchanges(self):
        return [entry for entry in self.said if "heard" in entry]

    def skips(self):
        return [entry["skipped"] for entry in self.said if "skipped" in entry]


@pytest.fixture
def start():
    """Starts models; whatever a failed test leaves running is killed."""
    running = []

    def start_model(*args, **kwargs):
        running.append(Model(*args, **kwargs))
        return running[-1]

    yield start_model
    for model in running:
        model.process.kill()
        model.process.wait()
        model._reader.join()
        model.process.stdout.close()


def addresses_of(num_models):
    return ",".join(f"127.0.0.1:{port}" for port in free_ports(num_models))


def past(elapsed):
    return lambda entry: entry.get("elapsed", -1) >= elapsed


def everyone_but(index, num_models):
    return [j for j in range(num_models) if j != index]


@pytest.mark.parametrize("interval", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_killed_model_is_missed_once_and_back_after_its_restart(start, tmp_path, interval):
    where = addresses_of(3)
    settings = [
        ["--interval", str(interval), "--updates", "100000", "--file", str(tmp_path / str(model))] for model in range(3)
    ]
    models = [start(model, where, *settings[model]) for model in range(3)]
    for model in models:
        model.read_until(past(random.Random().randrange(8, 40)))
    models[1].process.send_signal(signal.SIGKILL)
    models[1].process.wait()
    again, restarted_at = start(1, where, *settings[1]), time.time()
    for model in (again, models[0], models[2]):  # its own failure first: the others can only wait for it
        everyone = everyone_but(model.index, 3)
        model.read_until(lambda entry, all=everyone: entry.get("heard") == all and entry["time"] > restarted_at)
    assert sum(again.skips()) > 0
    for model in (models[0], models[2]):
        together = [entry for entry in model.exchanges() if entry["heard"] == [2 - model.index]]
        assert len(together) > 5  # the two went on with each other
        assert sum(entry["wait_s"] > 0.9 for entry in model.exchanges()) <= 2  # one for the kill, one for the return
        assert model.skips() == []
        assert "model 1 is away (was present)" in "".join(model.log)


def test_a_model_that_was_stopped_skips_to_where_the_others_are(start):
    where = addresses_of(3)
    models = [start(model, where, "--updates", "300") for model in range(3)]
    models[1].read_until(past(20))
    models[1].process.send_signal(signal.SIGSTOP)
    models[0].read_until(past(150))
    models[1].process.send_signal(signal.SIGCONT)
    for model in models:
        exchanges = model.finish()
        assert exchanges[-1]["heard"] == everyone_but(model.index, 3)
    assert sum(models[1].skips()) > 50
    for model in (models[0], models[2]):
        assert sum(entry["wait_s"] > 0.9 for entry in model.exchanges()) <= 2
        assert len(model.exchanges()) == 300


@pytest.mark.slow
def test_models_that_start_late_and_in_any_order_join_the_run(start):
    where = addresses_of(3)
    first = start(2, where, "--updates", "100000", "--start-timeout", "0.5", "--require-peers", "never")
    first.read_until(past(30))
    second = start(0, where, "--updates", "100000", "--start-timeout", "20")
    second.read_until(past(60))
    third = start(1, where, "--updates", "100000", "--start-timeout", "20")
    for model in (first, second, third):
        everyone = everyone_but(model.index, 3)
        model.read_until(lambda entry, all=everyone: entry.get("heard") == all)
    assert first.skips() == []
    assert second.skips()[0] >= 30
    assert third.skips()[0] >= 60
    # who joins a run does not wait for the one that the run goes on without
    assert "met models [2] in" in "".join(second.log)
    assert second.exchanges()[0]["time"] - second.said[0]["time"] < 5


@pytest.mark.slow
def test_a_slow_model_sets_the_pace_and_nobody_is_away(start):
    where = addresses_of(2)
    quick = start(0, where, "--updates", "60", "--step-s", "0.02", "--timeout", "20")
    slow = start(1, where, "--updates", "60", "--step-s", "0.06", "--timeout", "20")
    for model in (quick, slow):
        exchanges = model.finish()
        assert [entry["heard"] for entry in exchanges] == [[1 - model.index]] * 60
        assert model.skips() == []
        assert "away" not in "".join(model.log)


@pytest.mark.slow
def test_a_model_too_slow_for_the_timeout_costs_it_now_and_then_and_keeps_coming_back(start):
    where = addresses_of(2)
    quick = start(0, where, "--updates", "250", "--step-s", "0.01", "--timeout", "0.1")
    slow = start(1, where, "--updates", "250", "--step-s", "0.3", "--timeout", "0.1")
    slow_exchanges, quick_exchanges = slow.finish(), quick.finish()
    assert len(quick_exchanges) == 250
    assert sum(entry["heard"] == [0] for entry in slow_exchanges) > 2
    assert sum(slow.skips()) > 0
    assert quick.skips() == []


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable: (name, address) of each, and a function that cuts or mends it."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    names = [f"codistill{os.getpid()}{end}" for end in "ab"]
    ends = [f"cd{os.getpid() % 100000}{end}" for end in "ab"]

    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2")

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr}")
    hosts = [(name, f"10.77.0.{number}") for number, name in enumerate(names, start=1)]
    yield hosts, lambda state: ip("-n", names[0], "link", "set", ends[0], state)
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_cut_link_costs_one_timeout_and_heals(start, two_hosts):
    hosts, set_link = two_hosts
    where = ",".join(f"{address}:29600" for _, address in hosts)
    models = [
        start(model, where, "--updates", "700", "--keys", "none", prefix=["ip", "netns", "exec", name])
        for model, (name, _) in enumerate(hosts)
    ]
    for model in models:
        model.read_until(past(20))
    set_link("down")
    time.sleep(4)
    set_link("up")
    for model in models:
        exchanges = model.finish()
        assert exchanges[-1]["heard"] == [1 - model.index]
        alone = sum(entry["heard"] == [] for entry in exchanges)
        assert 10 < alone < 600
        assert "is away (was present)" in "".join(model.log)
        assert "is present (was away)" in "".join(model.log)
