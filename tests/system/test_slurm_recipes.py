"""The SLURM files: what they would start; real processes on a stand-in for SLURM, and on a cluster where one is.

``pytest -m slurm`` submits to the cluster that ``sinfo`` finds: two nodes, two tasks each, the repository on both.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import free_ports, json_logs
from vision_helpers import records

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = {"imagenet": "imagenet/slurm.sbatch", "wmt": "wmt16_en_de/slurm.sbatch"}

SRUN = """#!{python}
import argparse, os, subprocess, sys, threading
parser = argparse.ArgumentParser()
for name in ("exact", "label"):
    parser.add_argument("--" + name, action="store_true")
for name in ("kill-on-bad-exit", "nodes", "ntasks", "ntasks-per-node", "nodelist", "export"):
    parser.add_argument("--" + name)
options, command = parser.parse_known_args()
assert not command[0].startswith("-"), command
assert len(options.nodelist.split(",")) == int(options.nodes)
def show(task, lines):
    for line in lines:
        os.write(1, (f"{{task}}: " if options.label else "").encode() + line)
tasks, readers = [], []
for task in range(int(options.ntasks)):
    env = dict(os.environ, SLURM_PROCID=str(task), SLURM_LOCALID=str(task % int(options.ntasks_per_node)))
    tasks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    readers.append(threading.Thread(target=show, args=(task, tasks[-1].stdout)))
    readers[-1].start()
for reader in readers:
    reader.join()
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of two nodes (two addresses of this machine) of two tasks each."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n")
    (tools / "srun").write_text(SRUN.format(python=sys.executable))
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    # A dry run would build every model to count its parameters.
    (tools / "codistill-launch").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m fairseq_codistill.launch.cli --plan-parameters 1 "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(RECIPES.parent), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_JOB_ID": "7", "PYTHON": str(tools / "python")}
    job |= {"PATH": f"{tools}:{os.environ['PATH']}", "BASE_PORT": str(free_ports(1, 5)[0])}
    return {**os.environ, "RECIPE_HAS_GPU": "no", **job}


def run(file, *arguments, env, check=True):
    ended = subprocess.run(
        ["bash", str(RECIPES / FILES[file]), *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert (ended.returncode == 0) == check, ended.stdout[-6000:]
    return ended.stdout


def steps(file, *arguments, env):
    """The words of every srun that would be started."""
    said = run(file, *arguments, env={**env, "DRY_RUN": "commands"})
    return [shlex.split(line) for line in said.splitlines() if line.startswith("srun ")]


def value(words, flag):
    return words[len(words) - words[::-1].index(flag)]


@pytest.mark.parametrize("file", [pytest.param("imagenet", marks=pytest.mark.slow), "wmt"])
def test_nodes_are_dealt_out_to_the_models_or_all_one_models(slurm, file):
    first, second = steps(file, env=slurm)
    assert [value(step, "--nodelist") for step in (first, second)] == ["127.0.0.1", "127.0.0.2"]
    for model, step in enumerate((first, second)):
        assert (value(step, "--nodes"), value(step, "--ntasks")) == ("1", "2")
        assert value(step, "--codistill-model-index") == value(step, "--save-dir")[-1] == str(model)
        addresses = f"127.0.0.1:{slurm['BASE_PORT']},127.0.0.2:{slurm['BASE_PORT']}"
        assert value(step, "--codistill-addresses") == addresses
        assert value(step, "--seed") == str(model + 1)
    for arm in ("all_reduce", "plain"):
        [step] = steps(file, "--arm", arm, env=slurm)
        assert (value(step, "--nodes"), value(step, "--ntasks")) == ("2", "4")
        assert value(step, "--nodelist") == "127.0.0.1,127.0.0.2"
        assert (value(step, "--codistill-num-models"), "--codistill-keys" in step) == ("1", False)
        assert value(step, "--save-dir").endswith(f"{arm}/0")


@pytest.mark.parametrize("file", [pytest.param("imagenet", marks=pytest.mark.slow), "wmt"])
def test_a_node_of_one_device_has_one_rank(slurm, file):
    for arm, ranks in (("codistill", "1"), ("all_reduce", "2")):
        found = steps(file, "--arm", arm, env={**slurm, "SLURM_NTASKS_PER_NODE": "1"})
        assert [(value(step, "--nodes"), value(step, "--ntasks")) for step in found] == [(ranks, ranks)] * len(found)


def test_the_arms_on_a_cluster_are_those_of_one_machine(slurm):
    codistilled, all_reduce = (steps("imagenet", "--arm", arm, env=slurm)[0] for arm in ("codistill", "all_reduce"))
    assert codistilled[codistilled.index("--config") :][1:3] == ["resnet50_goyal", "codistill_shifted"]
    assert all_reduce[all_reduce.index("--config") :][1:3] == ["resnet50_goyal", "--dataset"]
    assert "WORLD_SIZE=2" in codistilled
    assert "WORLD_SIZE=4" in all_reduce
    for arm in ("codistill", "all_reduce"):  # 2 and 4 devices: 64 batches of one model, 128 of both
        assert value(steps("wmt", "--arm", arm, env=slurm)[0], "--update-freq") == "32"
    mixed = steps("imagenet", "--mixed", "resnet18,resnet50", env=slurm)
    assert [value(step, "--model") for step in mixed] == ["resnet18", "resnet50"]


@pytest.mark.parametrize("file", FILES)
def test_nodes_that_do_not_divide_are_refused(slurm, file):
    said = run(file, "--models", "3", env={**slurm, "DRY_RUN": "commands"}, check=False)
    assert "--models is 3, but the job has 2 node(s)" in said
    said = run(file, "--devices", "4", env={**slurm, "DRY_RUN": "commands"}, check=False)
    assert "--devices is 4, but the devices are those of the job" in said


def test_what_both_files_share_is_written_once():
    lines = [set((RECIPES / file).read_text().splitlines()) for file in FILES.values()]
    code = {line for line in lines[0] & lines[1] if line and not line.startswith(("#", "source "))}
    assert code == set()


def test_a_launch_inside_an_allocation_labels_its_ranks_and_leaves_its_exit_code(slurm, tmp_path):
    script = tmp_path / "say.py"
    script.write_text(
        "import os, sys\n"
        "model, rank = os.environ['CODISTILL_MODEL_INDEX'], os.environ['RANK']\n"
        "print('keys', oct(os.stat(os.environ['CODISTILL_KEYS']).st_mode), os.environ['CODISTILL_ADDRESSES'])\n"
        "sys.exit(3 * (model + rank == '11'))\n"
    )
    command = [
        sys.executable, "-m", "fairseq_codistill.launch.cli", "--on", "slurm", "--num-models", "2", "--run-dir", "run",
        "--devices-per-model", "2", "--log-dir", "logs", "--", "say.py",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=slurm)
    assert ended.returncode == 1
    assert "[launch] model 1 failed: exit code 3" in ended.stderr
    assert (tmp_path / "run/slurm-7.exit").read_text() == "1\n"
    for model in (0, 1):
        log = (tmp_path / f"logs/model-{model}.log").read_text()
        for rank in (0, 1):
            for text in (ended.stdout, log):
                line = re.search(rf"^\[model {model} rank {rank}\] keys 0o40700 (\S+)$", text, re.MULTILINE)
                assert re.fullmatch(r"127.0.0.1:(\d+),127.0.0.2:\1", line[1])


@pytest.mark.recipes
@pytest.mark.timeout(1200)
def test_images_on_a_stand_in_for_slurm_and_a_job_that_is_submitted_again(slurm, tmp_path):
    env = {**slurm, "SMOKE": "1"}
    for arm, models, size in (("codistill", 2, 2), ("all_reduce", 1, 4)):
        out = tmp_path / arm
        run("imagenet", "--arm", arm, "--out", out, "--max-updates", "2", "--model", "resnet18", env=env)
        run("imagenet", "--arm", arm, "--out", out, "--max-updates", "4", "--model", "resnet18", env=env)
        for model in range(models):
            assert [start["world_size"] for start in records(out / str(model), "start")] == [size, size]
            assert [start["update"] for start in records(out / str(model), "start")] == [0, 2]
            assert records(out / str(model), "end")[-1]["reason"] == "finished"
            if models > 1:
                assert all(record["codistill_peers"] == 1 for record in records(out / str(model), "train"))


@pytest.fixture(scope="module")
def wmt_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wmt") / "data"
    prepare = ["bash", str(RECIPES / "wmt16_en_de/prepare.sh"), "--out", str(folder)]
    subprocess.run(prepare, env={**os.environ, "SMOKE": "1"}, check=True)
    return folder


def check_translation(out, models, updates):
    for model in range(models):
        log = (out / f"model-{model}.log").read_text()
        record = json_logs(log, "train")[-1]
        assert record["train_num_updates"] == updates
        assert record.get("train_codistill_peers", 0) == models - 1
        assert "Traceback" not in log


@pytest.mark.recipes
@pytest.mark.timeout(1200)
def test_translation_on_a_stand_in_for_slurm(slurm, wmt_data, tmp_path):
    env = {**slurm, "SMOKE": "1"}
    for arm, models in (("codistill", 2), ("all_reduce", 1)):
        where = ["--arm", arm, "--data", wmt_data, "--out", tmp_path / arm, "--max-update", "6"]
        assert f"training: {arm}" in run("wmt", *where, env=env)
        check_translation(tmp_path / arm, models, 6)


@pytest.mark.slurm
@pytest.mark.timeout(1800)
class TestRealCluster:
    """Two models of two devices on two nodes, and one model of four; SMOKE=1."""

    @pytest.fixture(autouse=True)
    def _cluster(self):
        if shutil.which("sinfo") is None or subprocess.run(["sinfo", "-h"], capture_output=True).returncode:
            pytest.skip("no SLURM here: sinfo finds no cluster")

    def submit(self, file, *arguments, out):
        """Submit a file and wait for its job; returns its state and what it printed."""
        out.mkdir(exist_ok=True)
        command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1"]
        command += ["--export=ALL,SMOKE=1", f"--output={out}/job-%j.log", str(RECIPES / FILES[file])]
        command += ["--out", str(out), *map(str, arguments)]
        submitted = subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True)
        assert submitted.returncode == 0, submitted.stderr
        job = submitted.stdout.strip()
        return job, out / f"job-{job}.log"

    def finish(self, job):
        while True:
            shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
            state = re.search(r"JobState=(\S+)", shown)[1]
            if state not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
                return state
            time.sleep(1)

    @pytest.mark.parametrize(("arm", "models", "size"), [("codistill", 2, 2), ("all_reduce", 1, 4)])
    def test_images(self, tmp_path, arm, models, size):
        for updates in ("2", "4"):
            job, log = self.submit(
                "imagenet", "--arm", arm, "--model", "resnet18", "--max-updates", updates, out=tmp_path / arm
            )
            assert self.finish(job) == "COMPLETED", log.read_text()
        for model in range(models):
            assert [start["world_size"] for start in records(tmp_path / arm / str(model), "start")] == [size, size]
            assert [start["update"] for start in records(tmp_path / arm / str(model), "start")] == [0, 2]

    @pytest.mark.parametrize(("arm", "models"), [("codistill", 2), ("all_reduce", 1)])
    def test_translation(self, wmt_data, tmp_path, arm, models):
        arguments = ("--arm", arm, "--data", wmt_data, "--max-update", "6")
        job, log = self.submit("wmt", *arguments, out=tmp_path / arm)
        assert self.finish(job) == "COMPLETED", log.read_text()
        check_translation(tmp_path / arm, models, 6)

    def test_a_step_that_dies_costs_its_model_only(self, tmp_path):
        out = tmp_path / "codistill"
        job, log = self.submit("imagenet", "--model", "resnet18", "--max-updates", "40", out=out)
        deadline = time.monotonic() + 600
        while not (out / "1/log.jsonl").exists() or not records(out / "1", "train"):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        asked = ["squeue", "--steps", "--noheader", "--jobs", job, "--format", "%i %N"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
        node_of = dict(line.split() for line in shown if re.match(rf"{job}\.\d+ ", line))  # step -> node
        assert len(node_of) == 2, shown
        last = max(node_of, key=lambda step: node_of[step])  # nodes are dealt out in order
        subprocess.run(["scancel", "--signal=KILL", last], check=True)
        assert self.finish(job) == "FAILED"
        assert records(out / "0", "end")[-1]["reason"] == "finished"
        assert "[launch] model 1 failed: " in log.read_text()
