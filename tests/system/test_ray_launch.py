"""``codistill-launch --on ray`` on a real Ray cluster of two nodes on this machine: ``pytest -m ray tests/system``."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import environment
from launching import is_running, lines_until, pids, wait_until_gone

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LOOP = str(Path(__file__).parents[1] / "distributed" / "plain_loop.py")
# Says who it is, waits for a file, and saves when it is asked to end.
WAITING = """
import os, signal, sys, time
model, rank = os.environ["CODISTILL_MODEL_INDEX"], os.environ["RANK"]
def save(number, frame):
    open(f"saved-{model}-{rank}", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("pid", os.getpid(), flush=True)
while not os.path.exists("go"):
    time.sleep(0.05)
"""


@pytest.fixture
def cluster():
    """Two nodes of two cores, and no more of it afterwards."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.second = made.add_node(num_cpus=2)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(*arguments, devices=2):
        command = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--on", "ray", "--num-models", "2"]
        started.append(
            subprocess.Popen(
                [*command, "--devices-per-model", str(devices), "--log-dir", "logs", *map(str, arguments)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment(),
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for launcher in started:
        if launcher.poll() is None:
            launcher.kill()
        launcher.wait()
        launcher.stdout.close()


@pytest.fixture
def waiting(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(textwrap.dedent(WAITING))
    return script


def nodes_of_models(address):
    """Node of every bundle of every placement group, seen from another driver."""
    code = (
        "import ray, json; from ray.util import placement_group_table as table\n"
        f"ray.init(address={address!r}, log_to_driver=False)\n"
        "print(json.dumps([sorted(set(group['bundles_to_node_id'].values())) for group in table().values()"
        " if group['state'] == 'CREATED']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return eval(found.stdout.strip().splitlines()[-1])


def test_each_model_is_on_a_node_of_its_own_and_they_teach_each_other(cluster, launch, tmp_path):
    launcher = launch(
        "--ray-address", cluster.address, "--", LOOP, "out{model}", "{model+1}", "--batches", "1000000",
        "--until", str(tmp_path / "enough"),
    )  # fmt: skip
    lines = lines_until(launcher, *(f"[model {model} rank {rank}] 5 1.0" for model in (0, 1) for rank in (0, 1)))
    placed = nodes_of_models(cluster.address)
    assert [len(nodes) for nodes in placed] == [1, 1]
    assert placed[0] != placed[1]
    (tmp_path / "enough").touch()
    rest, _ = launcher.communicate()
    assert launcher.returncode == 0, "\n".join(lines) + rest
    for model in (0, 1):
        assert (tmp_path / f"out{model}").exists()
        assert f"[model {model} rank 1] 3 1.0" in (tmp_path / f"logs/model-{model}.log").read_text()


def test_without_an_address_a_cluster_is_started_here(launch, tmp_path):
    pytest.importorskip("ray")
    launcher = launch("--", LOOP, "out{model}", "{model+1}", "--batches", "5")
    output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    assert (tmp_path / "out1").exists()


def test_a_node_that_is_lost_costs_its_model_and_the_other_goes_on(cluster, launch, tmp_path, waiting):
    launcher = launch("--ray-address", cluster.address, "--", waiting)
    lines = lines_until(launcher, *(f"[model {model} rank {rank}] pid" for model in (0, 1) for rank in (0, 1)))
    everyone = pids(lines)
    cluster.remove_node(cluster.second, allow_graceful=False)
    lines += lines_until(launcher, "the other models go on without it")
    survivors = [number for number in everyone if is_running(number)]
    (tmp_path / "go").touch()
    rest, _ = launcher.communicate()
    assert len(survivors) == 2
    assert launcher.returncode == 1
    assert re.search(r"\[launch\] model [01] failed: ", rest)
    wait_until_gone(everyone)


def test_a_model_whose_node_is_lost_is_started_again_where_there_is_room(cluster, launch, tmp_path, waiting):
    launcher = launch("--max-restarts", "1", "--ray-address", cluster.address, "--", waiting)
    wanted = [f"[model {model} rank {rank}] pid" for model in (0, 1) for rank in (0, 1)]
    lines_until(launcher, *wanted)
    cluster.remove_node(cluster.second, allow_graceful=False)
    cluster.add_node(num_cpus=2)
    lines = lines_until(launcher, "it is started again (0 restarts left)")
    model = re.search(r"model (\d): .* it is started again", "\n".join(lines))[1]
    lines_until(launcher, *(f"[model {model} rank {rank}] pid" for rank in (0, 1)))
    (tmp_path / "go").touch()
    rest, _ = launcher.communicate()
    assert launcher.returncode == 0, rest


def test_the_survivors_are_told_of_a_death_and_wait_for_no_timeout(cluster, launch, tmp_path):
    """Model 1 kills itself after a batch; without the notice model 0 would wait 300 seconds."""
    began = time.monotonic()
    launcher = launch(
        "--ray-address", cluster.address, "--", LOOP, "out{model}", "{model+1}", "--batches", "6",
        "--kill-after", "{model}", devices=1,
    )  # fmt: skip
    output, _ = launcher.communicate()
    assert launcher.returncode == 1, output
    assert "nobody is told" not in output
    assert (tmp_path / "out0").exists()
    assert time.monotonic() - began < 200


def test_a_rank_that_fails_ends_its_model_and_its_exit_code_is_told(cluster, launch, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['CODISTILL_MODEL_INDEX'] + os.environ['RANK'] == '01': sys.exit(3)\n"
        "time.sleep(600 * (os.environ['CODISTILL_MODEL_INDEX'] == '0'))\n"
    )
    launcher = launch("--ray-address", cluster.address, "--", script)
    output, _ = launcher.communicate()
    assert launcher.returncode == 1
    assert "[launch] model 0 failed: rank 1 exit code 3" in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_every_rank_save(cluster, launch, tmp_path, waiting, number, code):
    launcher = launch("--ray-address", cluster.address, "--", waiting)
    lines = lines_until(launcher, *(f"[model {model} rank {rank}] pid" for model in (0, 1) for rank in (0, 1)))
    launcher.send_signal(number)
    output, _ = launcher.communicate()
    assert launcher.returncode == code, output
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0-0", "saved-0-1", "saved-1-0", "saved-1-1"}
    wait_until_gone(pids(lines))


def test_of_a_launcher_that_is_killed_nothing_is_left(cluster, launch, waiting):
    launcher = launch("--ray-address", cluster.address, "--", waiting)
    lines = lines_until(launcher, *(f"[model {model} rank {rank}] pid" for model in (0, 1) for rank in (0, 1)))
    launcher.kill()
    launcher.wait()
    wait_until_gone(pids(lines))


def test_a_plan_that_does_not_fit_is_refused_before_anything_starts(cluster, launch, waiting):
    launcher = launch("--ray-address", cluster.address, "--", waiting, devices=3)
    output, _ = launcher.communicate()
    assert launcher.returncode == 2
    assert "does not fit the Ray cluster: no node has room for model 0" in output
    assert "[model" not in output


def test_a_cluster_that_is_not_there_is_named(launch, waiting):
    pytest.importorskip("ray")
    launcher = launch("--ray-address", "127.0.0.1:1", "--", waiting)
    output, _ = launcher.communicate()
    assert launcher.returncode == 2
    assert "--ray-address is '127.0.0.1:1'" in output


def test_a_busy_cluster_is_not_waited_for_for_ever(cluster, launch, waiting, monkeypatch):
    first = launch("--ray-address", cluster.address, "--", waiting)
    lines_until(first, "[model 1 rank 1] pid")
    started = time.monotonic()
    second = launch("--ray-address", cluster.address, "--", waiting)
    output, _ = second.communicate()
    assert second.returncode == 2
    assert "others use the cluster" in output
    assert time.monotonic() - started < 300
    os.kill(first.pid, signal.SIGTERM)
    first.communicate()
