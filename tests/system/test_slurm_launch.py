"""``codistill-launch --on slurm`` on a real cluster: ``pytest -m slurm tests/system/test_slurm_launch.py``.

Two nodes of two cores, on one machine or several; ``sinfo`` has to find them, and all see the repository and ``/tmp``.
What kills a node needs those of two network namespaces on this machine, ``codns1`` and ``codns2``, and root.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers import environment
from launching import lines_until, pids, wait_until_gone

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

LOOP = str(Path(__file__).parents[1] / "distributed" / "plain_loop.py")
WAITING = """
import os, signal, socket, sys, time
model, rank = os.environ["CODISTILL_MODEL_INDEX"], os.environ["RANK"]
def save(number, frame):
    open(f"saved-{model}-{rank}", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("on", socket.gethostname(), "pid", os.getpid(), flush=True)
while not os.path.exists("go"):
    time.sleep(0.05)
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def _cluster():
    if shutil.which("sinfo") is None or subprocess.run(["sinfo", "-h"], capture_output=True).returncode:
        pytest.skip("no SLURM here: sinfo finds no cluster")


@pytest.fixture
def launch(tmp_path):
    """Starts a launch that waits for its job; whatever a failed test leaves is cancelled."""
    started = []

    def start(*arguments, models=2, devices=2, slurm="--cpus-per-task=1 --gpus-per-node=0", wait=True):
        command = [
            sys.executable, "-m", "fairseq_codistill.launch.cli", "--on", "slurm", "--num-models", str(models),
            "--devices-per-model", str(devices), "--run-dir", "run", "--log-dir", "logs", "--slurm", slurm,
            *(["--wait"] if wait else []), *map(str, arguments),
        ]  # fmt: skip
        env = {name: text for name, text in environment().items() if not name.startswith("SLURM_")}
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=env
            )
        )
        return started[-1]

    yield start
    for launcher in started:
        if launcher.poll() is None:
            launcher.kill()
        launcher.wait()
        launcher.stdout.close()
    for log in (tmp_path / "run").glob("slurm-*.log"):
        subprocess.run(["scancel", re.search(r"slurm-(\d+)", log.name)[1]], capture_output=True)


@pytest.fixture
def waiting(tmp_path):
    script = tmp_path / "waiting.py"
    script.write_text(textwrap.dedent(WAITING))
    return script


EVERYONE = [f"[model {model} rank {rank}] on " for model in (0, 1) for rank in (0, 1)]


def job_of(lines):
    return re.search(r"\[launch\] job (\d+)", "\n".join(lines))[1]


def test_two_models_on_two_nodes_teach_each_other(launch, tmp_path):
    launcher = launch("--", LOOP, "out{model}", "{model+1}", "--batches", "10")
    output, _ = launcher.communicate()
    assert launcher.returncode == 0, output
    for model in (0, 1):
        assert (tmp_path / f"out{model}").exists()
        for rank in (0, 1):
            assert f"[model {model} rank {rank}] 10 1.0" in output
        assert f"[model {model} rank 1] 10 1.0" in (tmp_path / f"logs/model-{model}.log").read_text()
    assert re.search(r"CODISTILL_ADDRESSES=(\S+):\d+,(?!\1)\S+:\d+ ", output)
    keys = list((tmp_path / "run/keys").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((tmp_path / "run/keys").stat().st_mode) == 0o700


@pytest.mark.parametrize("more", ["", "--export=NONE", "--chdir=elsewhere"])
def test_two_models_share_a_node_whatever_the_job_itself_is_given(launch, waiting, tmp_path, more):
    (tmp_path / "elsewhere").mkdir()
    waiting.write_text(waiting.read_text().replace('os.environ["RANK"]', 'os.environ["CUDA_VISIBLE_DEVICES"]'))
    slurm = f"--cpus-per-task=1 --gpus-per-node=0 {more}"
    launcher = launch("--devices-per-node", "2", "--", waiting, devices=1, slurm=slurm)
    lines = lines_until(launcher, "[model 0] on ", "[model 1] on ")
    (tmp_path / ("elsewhere" if "chdir" in more else ".") / "go").touch()
    rest, _ = launcher.communicate()
    assert launcher.returncode == 0, rest
    assert len(set(re.findall(r"\] on (\S+) ", "\n".join(lines)))) == 1


def test_a_job_that_is_requeued_goes_on_from_its_checkpoints(launch, tmp_path):
    until = tmp_path / "enough"
    more = ("--batches", "1000000", "--until", until, "--save-every", "5", "--resume")
    launcher = launch("--", LOOP, "out{model}", "{model+1}", *more)
    lines = lines_until(launcher, "[model 0 rank 0] 8 1.0", "[model 1 rank 0] 8 1.0")
    subprocess.run(["scontrol", "requeue", job_of(lines)], check=True)
    lines_until(launcher, "[launch] model 1: CODISTILL_ADDRESSES=")
    first, teaching = {}, set()
    while len(teaching) < 4:
        line = launcher.stdout.readline()
        assert line, "the launcher ended"
        if match := re.match(r"\[(model \d rank \d)\] (\d+) (\d)\.0$", line):
            first.setdefault(match[1], int(match[2]))
            teaching |= {match[1]} if match[3] == "1" else set()
    until.touch()
    rest, _ = launcher.communicate()
    assert launcher.returncode == 0, rest
    assert min(first.values()) > 5, f"it began from the start: {first}"


def test_a_model_that_fails_is_told_and_the_other_goes_on(launch, waiting, tmp_path):
    waiting.write_text(
        waiting.read_text() + "\nif model == '1' and rank == '1': sys.exit(3)\n"
        "if model == '0':\n    while not os.path.exists('end'): time.sleep(0.05)\n"
    )
    (tmp_path / "go").touch()
    launcher = launch("--", waiting)
    lines_until(launcher, "the other models go on without it")
    (tmp_path / "end").touch()
    output, _ = launcher.communicate()
    assert launcher.returncode == 1
    assert "[launch] model 1 failed: exit code 3" in output


@pytest.fixture
def second_node():
    """The namespace of the node that a test kills; its daemon is started again afterwards."""
    folder = Path(os.environ.get("SLURM_TEST_DIR", "/tmp/slurm-two-hosts"))
    if os.geteuid() != 0 or not (folder / "2.pid").exists():
        pytest.skip("the nodes are not network namespaces of this machine")
    yield "codns2"
    inside = ["nsenter", "--net=/var/run/netns/codns2", "unshare", "-u", "sh", "-c"]
    with open(folder / "log" / "n2.out", "ab") as log:
        daemon = subprocess.Popen(
            [*inside, "hostname n2; exec slurmd -N n2 -D"], stdout=log, stderr=log, start_new_session=True
        )
    (folder / "2.pid").write_text(f"{daemon.pid}\n")
    deadline = time.monotonic() + 120
    while "idle" not in subprocess.run(["sinfo", "-h", "-n", "n2", "-o", "%T"], capture_output=True, text=True).stdout:
        subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], capture_output=True)
        assert time.monotonic() < deadline, "the node does not come back"
        time.sleep(1)


def test_a_node_that_dies_costs_its_model_and_the_other_goes_on(launch, waiting, tmp_path, second_node):
    launcher = launch("--", waiting)
    lines = lines_until(launcher, *EVERYONE)
    assert "[model 1 rank 0] on n2 " in "\n".join(lines)
    found = subprocess.run(["ip", "netns", "pids", second_node], capture_output=True, text=True, check=True)
    for number in found.stdout.split():  # its daemon and all that it runs, as when its power is cut
        os.kill(int(number), signal.SIGKILL)
    lines = lines_until(launcher, "the other models go on without it")
    assert "[launch] model 1: " in lines[-1]
    (tmp_path / "go").touch()
    output, _ = launcher.communicate()
    assert launcher.returncode == 1
    assert "[model 0 rank 1] done" in output
    assert "[launch] model 1 failed: " in output


def test_ctrl_c_lets_every_rank_save(launch, waiting, tmp_path):
    launcher = launch("--", waiting)
    lines = lines_until(launcher, *EVERYONE)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate()
    assert launcher.returncode == 130, output
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0-0", "saved-0-1", "saved-1-0", "saved-1-1"}
    wait_until_gone(pids(lines))


def test_a_failed_model_is_started_again_in_its_place(launch, waiting, tmp_path):
    waiting.write_text(
        waiting.read_text() + "\nif model == '1' and not os.path.exists('second'):\n"
        "    time.sleep(1)\n    open('second', 'w').close()\n    sys.exit(3)\n"
    )
    (tmp_path / "go").touch()
    launcher = launch("--max-restarts", "1", "--", waiting)
    output, _ = launcher.communicate()
    assert "it is started again (0 restarts left)" in output
    assert launcher.returncode == 0, output


def test_without_waiting_the_job_goes_on_alone(launch, waiting, tmp_path):
    launcher = launch("--", waiting, wait=False)
    output, _ = launcher.communicate()
    assert launcher.returncode == 0
    job = job_of([output])
    (tmp_path / "go").touch()
    code = tmp_path / f"run/slurm-{job}.exit"
    deadline = time.monotonic() + 120
    while not code.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert code.read_text() == "0\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": 5}, "configuration is not available|Node count"),
        ({"devices": 64}, "configuration is not available|CPU count"),
        ({"slurm": "--gpus-per-node=0 --partition nowhere"}, "invalid partition"),
        ({"slurm": "--nodes 7"}, "--nodes is set by codistill-launch"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_starts(launch, waiting, values, message):
    launcher = launch("--", waiting, **values)
    output, _ = launcher.communicate()
    assert launcher.returncode == 2
    assert re.search(message, output), output


def test_an_allocation_that_is_too_small_is_refused_inside(waiting, tmp_path):
    command = [
        "srun", "--nodes=1", "--ntasks=1", sys.executable, "-m", "fairseq_codistill.launch.cli", "--on", "slurm",
        "--num-models", "2", "--devices-per-model", "2", "--devices-per-node", "2", "--", str(waiting),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert "and the plan needs 2" in ended.stderr
