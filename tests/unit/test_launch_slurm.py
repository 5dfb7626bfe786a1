"""A launch on SLURM as it is planned: who is on which node, what the batch script says, what is refused. No cluster."""

import contextlib
import os
import shlex
import signal
import stat
import subprocess
import sys
import textwrap

import pytest

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch import cli, slurm, slurm_task
from fairseq_codistill.launch.slurm_batch import batch_script, submit

COMMAND = ["fairseq-train", "data", "--seed", "1", "--save-dir", "out/0"]


def commands(num_models, *more):
    return [[*COMMAND, *more] for _ in range(num_models)]


def value(words, flag):
    return words[words.index(flag) + 1]


class TestLayout:
    @pytest.mark.parametrize(
        ("models", "devices", "per_node", "nodes", "tasks"),
        [
            (2, 8, None, [[0], [1]], 8),
            (2, 16, 8, [[0, 1], [2, 3]], 8),
            (4, 2, 4, [[0], [0], [1], [1]], 2),
            (3, 1, 2, [[0], [0], [1]], 1),
        ],
    )
    def test_models_take_whole_nodes_or_share_one(self, models, devices, per_node, nodes, tasks):
        layout = slurm.make_layout(models, devices, per_node)
        assert [list(layout.place(model)[0]) for model in range(models)] == nodes
        assert layout.tasks_per_node == tasks
        assert layout.num_nodes == 1 + max(map(max, nodes))

    @pytest.mark.parametrize(("devices", "per_node"), [(3, 2), (12, 8), (3, 8)])
    def test_what_does_not_divide_is_refused(self, devices, per_node):
        with pytest.raises(ConfigError, match=f"--devices-per-model {devices} with --devices-per-node {per_node}"):
            slurm.make_layout(2, devices, per_node)

    def test_an_allocation_that_is_too_small_is_refused_with_what_is_needed(self):
        layout = slurm.make_layout(3, 2, 2)
        with pytest.raises(ConfigError, match=r"allocation 7 has 2 node\(s\) \(a b\), and the plan needs 3"):
            slurm.check_allocation(layout, ["a", "b"], "7")


class TestSteps:
    def test_a_model_on_two_nodes_names_both_and_its_ranks_find_each_other_on_the_first(self):
        steps = slurm.make_steps(commands(2), slurm.make_layout(2, 4, 2), ["a", "b", "c", "d"], 30000, "keys")
        first, second = (list(step.command) for step in steps)
        assert value(second, "--nodelist") == "c,d"
        assert (value(second, "--nodes"), value(second, "--ntasks"), value(second, "--ntasks-per-node")) == (
            "2",
            "4",
            "2",
        )
        assert value(first, "--codistill-addresses") == "a+b:30000,c+d:30000"
        assert value(second, "--distributed-init-method") == "tcp://c:30003"
        assert value(second, "--distributed-rank") == "{rank}"
        assert value(second, "--device-id") == "{local_rank}"
        assert value(second, "--codistill-keys") == "keys"
        assert all(step.labels_ranks for step in steps)
        assert {step.failure for step in steps} == {b"srun: error: Node failure on "}

    def test_models_that_share_a_node_have_ports_and_gpus_of_their_own(self):
        steps = slurm.make_steps(commands(2), slurm.make_layout(2, 2, 4), ["a"], 30000, "keys", 3, has_gpus=True)
        first, second = (list(step.command) for step in steps)
        assert value(first, "--codistill-addresses") == "a:30000,a:30002"
        assert value(first, "--distributed-init-method") == "tcp://a:30004"
        assert value(second, "--distributed-init-method") == "tcp://a:30005"
        assert value(second, "--gpus-per-node") == "2"
        assert value(second, "--cpus-per-task") == "3"

    def test_where_slurm_deals_out_no_gpus_models_that_share_a_node_see_their_own(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        shared, alone = slurm.make_layout(2, 4, 8), slurm.make_layout(2, 4, 4)
        steps = slurm.make_steps(commands(2), shared, ["a"], 30000)
        assert [step.environment.get("CUDA_VISIBLE_DEVICES") for step in steps] == ["0,1,2,3", "4,5,6,7"]
        others = (
            slurm.make_steps(commands(2), shared, ["a"], 30000, has_gpus=True),
            slurm.make_steps(commands(2, "--cpu"), shared, ["a"], 30000),
            slurm.make_steps(commands(2), alone, ["a", "b"], 30000),
        )
        assert not any("CUDA_VISIBLE_DEVICES" in step.environment for steps in others for step in steps)

    def test_devices_that_the_job_names_are_those_of_its_models(self, monkeypatch):
        shared = slurm.make_layout(2, 1, 2)
        for named, own in (("4,5,6", ["4", "5"]), ("0,0", ["0", "0"])):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
            steps = slurm.make_steps(commands(2), shared, ["a"], 30000)
            assert [step.environment["CUDA_VISIBLE_DEVICES"] for step in steps] == own
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        with pytest.raises(ConfigError, match=r"--devices-per-node is 2, and CUDA_VISIBLE_DEVICES names 1 \(3\)"):
            slurm.make_steps(commands(2), shared, ["a"], 30000)

    def test_steps_have_the_environment_of_the_launcher_whatever_the_job_was_given(self):
        """With --export=NONE srun hands on nothing of it, and a loop of one's own would train alone."""
        for step in slurm.make_steps([["python", "loop.py"]] * 2, slurm.make_layout(2, 1, 1), ["a", "b"], 30000):
            assert "--export=ALL" in step.command

    def test_models_that_share_a_node_share_the_memory_of_the_job(self):
        """The first step would take all that the job asked for, and the second wait for its end."""
        shared, whole = slurm.make_layout(2, 2, 4), slurm.make_layout(2, 4, 2)
        steps = slurm.make_steps(commands(2), shared, ["a"], 30000, "keys", memory_mb=400)
        assert [value(list(step.command), "--mem") for step in steps] == ["200M", "200M"]
        steps = slurm.make_steps(commands(2), whole, ["a", "b", "c", "d"], 30000, "keys", memory_mb=400)
        assert not any("--mem" in step.command for step in steps)

    def test_a_program_of_ones_own_finds_its_rank_in_the_variables_of_torchrun(self):
        (step,) = slurm.make_steps([["python", "loop.py"]], slurm.make_layout(1, 4, 2), ["a", "b"], 30000)
        for word in ("RANK={rank}", "LOCAL_RANK={local_rank}", "WORLD_SIZE=4", "LOCAL_WORLD_SIZE=2", "MASTER_ADDR=a"):
            assert word in step.command
        assert step.environment["CODISTILL_NUM_MODELS"] == "1"

    def test_a_step_is_asked_to_end_by_a_signal_that_srun_hands_on(self):
        steps = slurm.make_steps(commands(2), slurm.make_layout(2, 1, 1), ["a", "b"], 30000, "keys")
        assert {step.end_signal for step in steps} == {signal.SIGUSR1}

    def test_with_a_relay_there_are_no_addresses_and_the_keys_are_the_users(self):
        more = ("--codistill-relay", "relay:29700", "--codistill-keys", "mine")
        steps = slurm.make_steps(commands(2, *more), slurm.make_layout(2, 1, 1), ["a", "b"], 30000, "keys")
        for step in steps:
            assert "--codistill-addresses" not in step.command
            assert step.command.count("--codistill-keys") == 1

    def test_two_jobs_of_a_node_do_not_meet_on_a_port(self):
        assert slurm.pick_base_port("7", None) != slurm.pick_base_port("8", None)
        assert slurm.pick_base_port("7", 29600) == 29600
        apart = {abs(slurm.pick_base_port("9", None) - slurm.pick_base_port(str(9 + n), None)) for n in range(1, 3000)}
        assert min(apart - {0}) == slurm.PORTS_A_JOB

    def test_keys_are_made_once_and_are_private(self, tmp_path):
        folder = tmp_path / "run" / "keys"
        slurm.prepare_keys(str(folder), 2)
        before = (folder / "model-0.key_secret").read_bytes()
        slurm.prepare_keys(str(folder), 2)
        assert (folder / "model-0.key_secret").read_bytes() == before
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        assert not slurm.check_keys(str(tmp_path / "other"), 2)
        for refuse in (slurm.prepare_keys, slurm.check_keys):
            with pytest.raises(ConfigError, match="keys that are not those of 3 models.* --run-dir, .*cannot read"):
                refuse(str(folder), 3)


class TestTask:
    """One task of a step, as srun starts and signals it: every process of the step gets SIGUSR1."""

    WAITING = """
        import os, signal, sys, time
        def save(number, frame):
            time.sleep(0.2)
            print("saved")
            sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        helper = os.fork()  # a loader worker: it dies of SIGUSR1 unless that is ignored
        if helper:
            print(*sys.argv[1:], flush=True)
        for _ in range(600 if helper else 10):  # a signal just before one long sleep would be seen after it
            time.sleep(0.1)
        os.write(1, b"helped\\n")
        os._exit(0)
    """

    @pytest.fixture
    def task(self):
        """Function from a script to a task of it that has written its first line, and that line."""
        started = []

        def start(script):
            words = [sys.executable, "-I", "-S", slurm_task.__file__, sys.executable, "-c", textwrap.dedent(script)]
            words += ["--rank", "{rank}", "{local_rank}", "a b", "{model}"]
            settings = {**os.environ, "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
            started.append(
                subprocess.Popen(words, env=settings, stdout=subprocess.PIPE, text=True, start_new_session=True)
            )
            return started[-1], started[-1].stdout.readline()

        yield start
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def test_it_fills_in_what_slurm_tells_it_alone(self, task):
        process, line = task("import sys; print(*sys.argv[1:], sep='|', flush=True); sys.exit(3)")
        assert line == "--rank|5|1|a b|{model}\n"
        assert process.wait(30) == 3

    def test_it_lets_the_rank_save_and_ends_well_when_the_launcher_asks(self, task):
        process, _ = task(self.WAITING)
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.communicate(timeout=30)[0] == "saved\nhelped\n"
        assert process.returncode == 0

    def test_it_stays_for_those_that_still_save_when_slurm_asks(self, task):
        process, _ = task(self.WAITING)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saved\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)

    def test_a_program_that_is_not_there_is_named(self):
        words = [sys.executable, slurm_task.__file__, "/nowhere/train"]
        ended = subprocess.run(
            words, env={**os.environ, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, capture_output=True, text=True
        )
        assert (ended.returncode, "/nowhere/train cannot be started" in ended.stderr) == (127, True)


class TestBatchScript:
    def test_it_asks_for_what_the_plan_needs_and_what_the_user_says_comes_last(self):
        layout = slurm.make_layout(2, 8, 4)
        script = batch_script(
            layout, "/run", "--partition gpu --time 48:00:00 --gpus-per-node=a100:4", 30.0, True, ["x", "a b"]
        )
        lines = script.splitlines()
        assert lines[0] == "#!/usr/bin/env bash"
        assert {"#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4"} <= set(lines)
        assert "#SBATCH --signal=B:TERM@60" in lines
        assert lines[-5:] == [
            "#SBATCH --partition gpu", "#SBATCH --time 48:00:00", "#SBATCH --gpus-per-node=a100:4", "", "exec x 'a b'"
        ]  # fmt: skip

    def test_it_asks_for_the_cores_of_each_device_and_those_of_the_user_win(self):
        layout = slurm.make_layout(2, 4, 4)
        lines = batch_script(layout, "/run", "--cpus-per-task=2", 30.0, False, ["x"], 8).splitlines()
        assert [line for line in lines if "cpus" in line] == ["#SBATCH --cpus-per-task=8", "#SBATCH --cpus-per-task=2"]
        assert "cpus" not in batch_script(layout, "/run", "", 30.0, False, ["x"])

    @pytest.mark.parametrize(
        "given", ["--nodes=3", "-N 3", "--ntasks-per-node 2", "--output=x", "--partition gpu --array=1-3"]
    )
    def test_what_the_launcher_sets_is_refused(self, given):
        with pytest.raises(ConfigError, match="is set by codistill-launch"):
            batch_script(slurm.make_layout(2, 1, None), "/run", given, 30.0, True, ["x"])

    @pytest.mark.parametrize("given", ["--clusters=b", "-M b"])
    def test_another_cluster_is_refused(self, given):
        with pytest.raises(ConfigError, match="another cluster, where it cannot be followed"):
            batch_script(slurm.make_layout(2, 1, None), "/run", given, 30.0, True, ["x"])

    def test_quotes_that_do_not_close_are_named(self):
        with pytest.raises(ConfigError, match="No closing quotation"):
            batch_script(slurm.make_layout(2, 1, None), "/run", "--comment 'x", 30.0, True, ["x"])


class TestSubmission:
    """With an sbatch that takes everything, as where SLURM does not enforce the limits of partitions."""

    @pytest.fixture
    def tested(self, tmp_path, monkeypatch):
        """Function from what ``--test-only`` says, and whether it is well, to what becomes of a submission."""

        def submission(said, is_well):
            sbatch = tmp_path / "sbatch"
            only = f"echo '{said}' >&2; exit {0 if is_well else 1}"
            sbatch.write_text(f'#!/bin/sh\nif [ "$1" = --test-only ]; then {only}; fi\necho "7;cluster"\n')
            sbatch.chmod(0o755)
            return submit("#!/bin/sh\n", str(tmp_path / "run"))

        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return submission

    @pytest.mark.parametrize(
        ("said", "is_well"),
        [("sbatch: Job 8 to start at 2030-01-01", True), ("allocation failure: Requested nodes are busy", False)],
    )
    def test_a_job_that_has_to_wait_is_submitted(self, tested, said, is_well):
        assert tested(said, is_well) == "7"

    def test_a_job_that_could_never_start_is_refused(self, tested):
        with pytest.raises(ConfigError, match="has room: allocation failure: Requested node configuration"):
            tested("allocation failure: Requested node configuration is not available", False)


class TestCommandLine:
    ARGUMENTS = ("--num-models", "2", "--dry-run", "--plan-classes", "10", "--plan-rows", "1", "--plan-parameters", "1")

    def test_a_dry_run_shows_the_script_which_starts_the_same_launch(self, capsys, monkeypatch):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        options = ("--on", "slurm", "--slurm", "--partition gpu", "--wait", "--model-args", "1", "--lr 1")
        options += ("--link", "20mbit", "--plan-step-s", "1")
        command = ("--", sys.executable, "-c", "pass", "--seed", "{model}")
        assert cli.main([*self.ARGUMENTS, *options, *command]) == 0
        shown = capsys.readouterr().out
        assert "#SBATCH --partition gpu" in shown
        (line,) = [line for line in shown.splitlines() if line.startswith("exec ")]
        assert "--on slurm --model-args 1 '--lr 1' --plan-step-s 1 -- " in line
        assert f"--run-dir={os.getcwd()} " in line  # wherever the job begins
        assert not {"--slurm", "--wait", "--dry-run"} & set(line.split())
        assert "'{model}'" in line

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--wait"], "--wait is given with --on local; it is an option of --on slurm"),
            (["--on", "ray", "--slurm", "--time 1"], "--slurm is given with --on ray"),
            (["--on", "slurm", "--share-devices"], "--share-devices is given with --on slurm"),
            (["--on", "slurm", "--cpus-per-device", "0"], "--cpus-per-device is 0"),
            (["--on", "slurm", "--devices-per-node", "0"], "--devices-per-node is 0"),
            (["--on", "slurm", "--grace-s", "inf"], "--grace-s is inf"),
        ],
    )
    def test_options_of_another_executor_are_refused(self, capsys, options, message):
        with pytest.raises(SystemExit):
            cli.main([*self.ARGUMENTS, *options, "--", sys.executable, "-c", "pass"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "gpus", "devices_per_node"),
    [("1", "8", 4), ("1", "2", 2), ("1", "1", 1), ("1", "", 1), ("2", "8", 2), ("", "8", 4)],
)
def test_one_task_on_a_node_of_several_gpus_is_no_number_of_devices(monkeypatch, capsys, tasks, gpus, devices_per_node):
    """As one asks for where a task starts the others by itself."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_NTASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": gpus}
    for name, given in job.items():
        monkeypatch.setenv(name, given)
    monkeypatch.setattr(slurm, "allocation", lambda environment: ["a"])
    words = "--on slurm --dry-run --num-models 2 --devices-per-model 4 --plan-classes 10 --plan-rows 8".split()
    with pytest.raises(SystemExit):
        cli.main([*words, "--plan-parameters", "100", "--", "python", "x.py", "--cpu", "--seed", "{model}"])
    said = capsys.readouterr().err
    assert f"has 1 node(s) (a), and the plan needs {8 // devices_per_node}: " in said
    assert f"--devices-per-node is {devices_per_node}" in said


def test_a_folder_with_a_blank_is_one_word_for_sbatch():
    script = batch_script(slurm.make_layout(2, 1, None), "/my runs", "", 30.0, False, ["x"])
    (line,) = [line for line in script.splitlines() if "--output" in line]
    assert shlex.split(line) == ["#SBATCH", "--output=/my runs/slurm-%j.log"]


def test_the_cores_of_the_job_are_those_of_its_steps(monkeypatch, tmp_path, capsys):
    """Before 23.11 srun does not take them over, and every rank would have one."""
    allocation = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_NTASKS_PER_NODE": "4"}
    for name, given in {**allocation, "SLURM_CPUS_PER_TASK": "10"}.items():
        monkeypatch.setenv(name, given)
    monkeypatch.setattr(slurm, "allocation", lambda environment: ["a"])
    launch = ["--on", "slurm", "--num-models", "2", "--devices-per-model", "2", "--dry-run", "--run-dir", str(tmp_path)]
    plan = ["--plan-classes", "10", "--plan-rows", "8", "--plan-parameters", "100"]
    program = ["--", "python", "x.py", "--cpu", "--seed", "{model}"]
    assert cli.main([*launch, *plan, *program]) == 0
    assert capsys.readouterr().out.count("--cpus-per-task 10") == 2
    assert cli.main([*launch, "--cpus-per-device", "3", *plan, *program]) == 0
    assert capsys.readouterr().out.count("--cpus-per-task 3") == 2
