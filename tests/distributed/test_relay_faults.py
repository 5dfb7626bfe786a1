"""Faults of a run whose models meet at a relay, done to real processes: its relay killed, a model killed."""

import signal
import time

import pytest
from relaying import key_set, running_relay
from test_faults import past, start  # noqa: F401 - start is a fixture

pytest.importorskip("nacl")


@pytest.fixture
def keys(tmp_path):
    return key_set(tmp_path / "keys", 3)


def through(relay, keys, num_models, *more):
    return [f"n={num_models}", "--relay", relay.address, "--keys", str(keys), *more]


def test_a_relay_that_is_killed_twice_costs_a_moment_and_no_exchange(start, tmp_path, keys):  # noqa: F811
    with running_relay(tmp_path, keys) as relay:
        models = [start(model, *through(relay, keys, 2, "--updates", "120", "--timeout", "60")) for model in range(2)]
        for at in (20, 60):
            models[0].read_until(past(at))
            relay.kill()
            time.sleep(0.5)
            relay.start()
        for model in models:
            exchanges = model.finish()
            assert [entry["elapsed"] for entry in exchanges] == list(range(120))
            assert (
                sum(entry["heard"] == [1 - model.index] for entry in exchanges) >= 118
            )  # what both sides had in the relay when it was killed may come too late
            assert "is away (was present)" not in "".join(model.log)
            (meter,) = [entry["meter"] for entry in model.said if "meter" in entry]
            assert meter["rejected_messages"] == 0


@pytest.mark.relay
def test_a_relay_that_stays_away_costs_one_timeout_and_is_taken_back(start, tmp_path, keys):  # noqa: F811
    with running_relay(tmp_path, keys) as relay:
        models = [start(model, *through(relay, keys, 2, "--updates", "100000")) for model in range(2)]
        for model in models:
            model.read_until(past(20))
        relay.kill()
        for model in models:
            model.read_until(lambda entry: entry.get("heard") == [] and entry["elapsed"] > 25)
        relay.start()
        again = time.time()
        for model in models:
            model.read_until(
                lambda entry, model=model: entry.get("heard") == [1 - model.index] and entry["time"] > again
            )


@pytest.mark.relay
def test_a_killed_model_is_missed_once_and_back_after_its_restart(start, tmp_path, keys):  # noqa: F811
    with running_relay(tmp_path, keys) as relay:
        settings = [through(relay, keys, 3, "--updates", "100000", "--file", str(tmp_path / str(j))) for j in range(3)]
        models = [start(model, *settings[model]) for model in range(3)]
        for model in models:
            model.read_until(past(20))
        models[1].process.send_signal(signal.SIGKILL)
        models[1].process.wait()
        again, restarted_at = start(1, *settings[1]), time.time()
        for model in (models[0], models[2], again):
            everyone = [other for other in range(3) if other != model.index]
            model.read_until(
                lambda entry, all=everyone: entry.get("heard") == all and entry["time"] > restarted_at + 0.5
            )
        for model in (models[0], models[2]):
            assert sum(entry["wait_s"] > 0.9 for entry in model.exchanges()) <= 2
            assert model.skips() == []
