"""``--codistill-parts auto`` in real processes on a line with a delay: batches are cut by all models at once."""

import re
import subprocess
import sys
from pathlib import Path

import plain_loop
import pytest
import torch
from helpers import environment, free_ports, run_together

LOOP = str(Path(plain_loop.__file__))
PROXY = str(Path(__file__).parents[2] / "benchmarks" / "delay_proxy.py")


@pytest.fixture
def delayed():
    """Two models that hear each other so many ms later, a number a rank: the addresses that each is given."""
    lines = []

    def join(*delays_ms):
        ports, entrances = free_ports(2, len(delays_ms)), free_ports(2, len(delays_ms))
        for rank, delay_ms in enumerate(delays_ms):
            command = [sys.executable, PROXY, "--delay-ms", str(delay_ms)]
            for entrance, port in zip(entrances, ports, strict=True):
                command += ["--forward", f"{entrance + rank}=127.0.0.1:{port + rank}"]
            lines.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert lines[-1].stdout.readline() == "ready\n"
        near_and_far = [(ports[0], entrances[1]), (entrances[0], ports[1])]
        return [",".join(f"127.0.0.1:{port}" for port in ports) for ports in near_and_far]

    yield join
    for line in lines:
        line.kill()
        line.communicate()


def run_models(folder, addresses, *options, ranks=1, **settings):
    """What both models printed, rank by rank, and what they wrote."""
    settings = {f"CODISTILL_{name.upper()}": str(value) for name, value in settings.items()}
    shared = {"CODISTILL_NUM_MODELS": "2", "CODISTILL_RUN_ID": "delayed", "CODISTILL_CODEC": "fp32", **settings}
    places, commands, meeting = [], [], free_ports(2)
    for model, address in enumerate(addresses):
        for rank in range(ranks):
            where = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}
            where.update({"MASTER_PORT": str(meeting[model])} if ranks > 1 else {})
            places.append(environment(CODISTILL_MODEL_INDEX=str(model), CODISTILL_ADDRESSES=address, **shared, **where))
            commands.append([sys.executable, LOOP, str(folder / str(model)), str(model + 1), *options])
    results = run_together(commands, 120, places)
    assert all(result.returncode == 0 for result in results), [result.output for result in results]
    states = [torch.load(folder / str(model), weights_only=True) for model in range(2)]
    return [result.output for result in results], states


def changes(output):
    """(parts, update from which on) as the log tells them."""
    return re.findall(r"batches are cut in (\d) parts from update (\d+) on", output)


def test_batches_are_cut_by_both_models_at_once_where_the_line_is_slow_and_no_term_is_lost(tmp_path, delayed):
    options = ["--split", "--batches", "90", "--ms-per-sample", "2"]
    outputs, states = run_models(tmp_path, delayed(12), *options)
    assert changes(outputs[0])[:1] == changes(outputs[1])[:1] == [("2", "44")]
    for output, state in zip(outputs, states, strict=True):
        assert re.search(r"distilled on (\d+) of \1 batches due", output)
        assert len(state["losses"]) == 90


def test_a_loop_that_cannot_cut_keeps_its_peer_whole(tmp_path, delayed):
    outputs, _ = run_models(tmp_path, delayed(12), "--batches", "60", "--ms-per-sample", "1")
    assert changes(outputs[0]) == changes(outputs[1]) == []


def test_all_ranks_of_a_model_cut_from_the_same_position_on_though_one_of_them_has_the_slow_line(tmp_path, delayed):
    options = ["--split", "--batches", "60", "--ms-per-sample", "2"]
    outputs, _ = run_models(tmp_path, delayed(12, 0), *options, ranks=2)
    assert [changes(output)[:1] for output in outputs] == [[("2", "44")]] * 4
    for output in outputs:
        assert re.search(r"distilled on (\d+) of \1 batches due", output)
