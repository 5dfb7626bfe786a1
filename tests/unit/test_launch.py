"""What the launcher plans: placeholders, commands, ports, devices, refusals, keys."""

import socket
import subprocess
import sys

import pytest

from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch import cli, plan, resources
from fairseq_codistill.launch.plan import Job, fill_placeholders, last_value, make_jobs, model_commands
from fairseq_codistill.launch.resources import Ports, pick_ports, split_devices, visible_devices

FAIRSEQ = [sys.executable, "-m", "fairseq_cli.train", "data", "--seed", "{model+1}", "--save-dir", "out/{model}"]
OTHER = [sys.executable, "-m", "vision.train", "--seed", "{model}"]


def test_placeholders_are_filled_and_other_braces_stay():
    assert fill_placeholders("run-{model}-{model+1}-{model+10}-of-{num_models}", 2, 4) == "run-2-3-12-of-4"
    for argument in (
        "{}",
        "{modelling}",
        "{'model': 1}",
        '{"model": {"model": 2}}',
        "{model: 3}",
        "{model:resnet}",
        "{model:3d}",
        "{rank}",
    ):
        assert fill_placeholders(argument, 2, 4) == argument


@pytest.mark.parametrize(
    "argument", ["{model*2}", "{model-1}", "{num_models+1}", "{model+}", "{model:02d}", "{model:d}", "{model:>3}"]
)
def test_something_close_to_a_placeholder_is_refused(argument):
    with pytest.raises(ConfigError, match="is no placeholder"):
        fill_placeholders(argument, 0, 2)


def test_the_last_value_of_a_flag_counts():
    command = ["x", "--seed", "1", "--seed=2", "--seeds", "3", "--other", "--seed"]
    assert last_value(command, "--seed") == "2"
    assert last_value(command, "--save-dir") is None


@pytest.mark.parametrize("words", [["--codistill_relay", "host:1"], ["--codistill_relay=host:1"]])
def test_flags_of_ours_may_be_spelt_as_hugging_face_spells_its_own(words):
    assert last_value(["run.py", *words], "--codistill-relay") == "host:1"
    assert plan.has_flag(["run.py", *words], "--codistill-relay")
    assert last_value(["run.py", "--save_dir", "x"], "--save-dir") is None


def test_a_device_that_only_some_models_have_is_refused():
    with pytest.raises(ConfigError, match="--cpu is given for some models only"):
        model_commands(FAIRSEQ, 2, {0: ["--cpu"]})


def test_model_args_come_last_and_have_placeholders():
    commands = model_commands([*FAIRSEQ, "--arch", "a"], 2, {1: ["--arch", "b{model}"]})
    assert commands[0][3:] == ["data", "--seed", "1", "--save-dir", "out/0", "--arch", "a"]
    assert commands[1][3:] == ["data", "--seed", "2", "--save-dir", "out/1", "--arch", "a", "--arch", "b1"]


def test_model_args_may_be_a_single_flag_on_the_command_line():
    own, command = cli.split_command(
        ["--num-models", "2", "--model-args", "1", "--fp16", "--model-args", "1", "--lr '1 2'", "--", "prog", "--", "x"]
    )
    assert command == ["prog", "--", "x"]
    assert cli.parse_model_args(cli.make_parser().parse_args(own).model_args) == {1: ["--fp16", "--lr", "1 2"]}


@pytest.mark.parametrize("pair", [["one", "--fp16"], ["1", "--lr 'open"]])
def test_model_args_that_cannot_be_read_are_refused(pair):
    with pytest.raises(ConfigError, match="--model-args"):
        cli.parse_model_args([pair])


def test_model_args_of_a_model_that_does_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"--model-args 2: there are 2 models, from 0 to 1"):
        model_commands(FAIRSEQ, 2, {2: ["--fp16"]})


def without(command, flag):
    position = command.index(flag)
    return command[:position] + command[position + 2 :]


@pytest.mark.parametrize("seed", [["--seed", "1"], ["--seed=1"], []])
def test_equal_seeds_are_refused_and_the_fix_is_named(seed):
    with pytest.raises(ConfigError, match=r"--seed is 1 for models 0 and 1.*--seed \{model\+1\}"):
        model_commands([*without(FAIRSEQ, "--seed"), *seed], 2)


def test_a_program_of_ones_own_may_seed_itself(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("")
    assert len(model_commands([str(script)], 2)) == 2
    with pytest.raises(ConfigError, match="--seed is 1 for models 0 and 1"):
        model_commands([str(script), "--seed", "1"], 2)
    with pytest.raises(ConfigError, match="--seed is its default for models 0 and 1"):
        model_commands(without(OTHER, "--seed"), 2)


def test_a_seed_equal_to_the_default_of_another_model_is_refused():
    command = without(FAIRSEQ, "--seed")
    with pytest.raises(ConfigError, match="--seed is 1 for models 0 and 1"):
        model_commands(command, 2, {1: ["--seed", "1"]})
    assert len(model_commands(command, 2, {1: ["--seed", "2"]})) == 2


@pytest.mark.parametrize("folder", [["--save-dir", "out"], []])
def test_equal_checkpoint_folders_are_refused(folder):
    with pytest.raises(ConfigError, match=r"--save-dir is '\w+' for models 0 and 1.*checkpoints/\{model\}"):
        model_commands([*without(FAIRSEQ, "--save-dir"), *folder], 2)


def test_folders_that_differ_only_in_spelling_are_equal():
    with pytest.raises(ConfigError, match="--save-dir is 'out/0'"):
        model_commands(FAIRSEQ, 2, {1: ["--save-dir", "./out/0/"]})


def test_folders_that_are_one_by_another_way_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (tmp_path / "out/0", "link/out/0"):
        with pytest.raises(ConfigError, match="they would overwrite each other's checkpoints"):
            model_commands(FAIRSEQ, 2, {1: ["--save-dir", str(other)]})


def test_models_that_save_nothing_may_share_a_folder():
    assert len(model_commands([*without(FAIRSEQ, "--save-dir"), "--no-save"], 2)) == 2


def test_one_model_needs_no_placeholder():
    assert model_commands([sys.executable, "-m", "fairseq_cli.train", "data"], 1)[0][-1] == "data"


@pytest.mark.parametrize("flag", plan.SET_BY_LAUNCHER)
@pytest.mark.parametrize("separator", [" ", "="])
def test_flags_that_the_launcher_sets_are_refused_in_the_command(flag, separator):
    with pytest.raises(ConfigError, match=flag + " is in the command"):
        model_commands([*FAIRSEQ, *f"{flag}{separator}2".split()], 2)


def test_the_world_of_a_fairseq_job_is_the_launchers_but_another_program_may_have_such_a_flag():
    extra = ["--distributed-world-size", "2"]
    with pytest.raises(ConfigError, match="--devices-per-model"):
        model_commands([*FAIRSEQ, *extra], 2)
    assert model_commands([*OTHER, *extra], 2)[0][-2:] == extra


def test_nothing_to_start_is_refused():
    with pytest.raises(ConfigError, match="put it after --"):
        model_commands([], 2)
    with pytest.raises(ConfigError, match="--num-models is 0"):
        model_commands(FAIRSEQ, 0)


def test_a_script_is_run_by_this_python(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("")
    assert model_commands([str(script), "--seed", "{model}"], 1) == [[sys.executable, str(script), "--seed", "0"]]
    with pytest.raises(ConfigError, match="no such script"):
        model_commands([str(tmp_path / "missing.py")], 1)


def test_the_vision_script_is_found_as_a_module_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_commands(["vision/train.py"], 1) == [[sys.executable, "-m", "fairseq_codistill.vision.train"]]


def test_a_program_beside_this_python_is_found_without_path(tmp_path, monkeypatch):
    for name in ("python", "fairseq-train"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert model_commands(["fairseq-train", "data"], 1) == [[str(tmp_path / "fairseq-train"), "data"]]
    with pytest.raises(ConfigError, match="no such program on PATH or beside"):
        model_commands(["fairseq-trian", "data"], 1)


# --- ports ---


def test_ports_of_all_ranks_and_rendezvous_never_overlap():
    ports = Ports(base=30000, num_models=3, devices_per_model=4)
    used = [ports.listen(model) + rank for model in range(3) for rank in range(4)]
    used += [ports.rendezvous(model) for model in range(3)]
    assert len(set(used)) == len(used) == Ports.num_needed(3, 4)
    assert (min(used), max(used)) == (30000, 30000 + len(used) - 1)
    assert ports.addresses == "127.0.0.1:30000,127.0.0.1:30004,127.0.0.1:30008"


def test_a_taken_port_inside_the_given_block_is_named():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {taken} is taken"):
            pick_ports(2, 1, base_port=taken)


def test_picked_ports_avoid_taken_ones(monkeypatch):
    taken = set(resources.AUTOMATIC_PORTS) - set(range(25000, 25006))
    monkeypatch.setattr(resources, "is_free", lambda port: port not in taken)
    bases = iter([24997, 25001, 25000])
    monkeypatch.setattr(resources.random, "randrange", lambda *_: next(bases))
    assert pick_ports(2, 2).base == 25000


def test_no_free_block_at_all_is_an_error(monkeypatch):
    monkeypatch.setattr(resources, "is_free", lambda port: False)
    with pytest.raises(ConfigError, match="--base-port"):
        pick_ports(2, 1)


@pytest.mark.parametrize("base", [0, -5, 65533])
def test_a_base_port_out_of_range_is_refused(base):
    with pytest.raises(ConfigError, match=f"--base-port is {base}"):
        pick_ports(2, 1, base_port=base)


# --- devices ---


def forbidden():
    raise AssertionError("devices were counted although the answer was known")


def test_cpu_in_the_command_means_no_devices():
    assert visible_devices(["prog", "--cpu"], {"CUDA_VISIBLE_DEVICES": "0,1"}, forbidden) is None


def test_visible_devices_are_read_as_cuda_reads_them():
    assert visible_devices(["prog"], {"CUDA_VISIBLE_DEVICES": "3, GPU-aa,1"}, forbidden) == ["3", "GPU-aa", "1"]
    assert visible_devices(["prog"], {"CUDA_VISIBLE_DEVICES": "2,-1,1"}, forbidden) == ["2"]
    assert visible_devices(["prog"], {"CUDA_VISIBLE_DEVICES": ""}, forbidden) is None


def test_devices_are_counted_where_nothing_is_said():
    assert visible_devices(["prog"], {}, lambda: 2) == ["0", "1"]
    assert visible_devices(["prog"], {}, lambda: 0) is None


def test_devices_are_split_in_contiguous_groups():
    assert split_devices(["4", "5", "6", "7", "8"], 2, 2) == ["4,5", "6,7"]


def test_too_few_devices_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"needs 4 devices, and 3 are visible \(0,1,2\)"):
        split_devices(["0", "1", "2"], 2, 2)


def test_models_share_devices_when_asked():
    assert split_devices(["0"], 2, 1, share=True) == ["0", "0"]
    assert split_devices(["0", "1", "2"], 3, 2, share=True) == ["0,1", "2,0", "1,2"]
    with pytest.raises(ConfigError, match="1 are visible"):
        split_devices(["0"], 2, 2, share=True)


# --- jobs ---


def test_fairseq_on_gpus_is_one_job_a_model_with_its_devices():
    jobs = make_jobs(model_commands(FAIRSEQ, 2), Ports(30000, 2, 2), ["0", "1", "2", "3"])
    assert [(job.label, job.environment) for job in jobs] == [
        ("model 0", {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ("model 1", {"CUDA_VISIBLE_DEVICES": "2,3"}),
    ]
    assert list(jobs[1].command[8:]) == [
        *("--codistill-num-models", "2", "--codistill-model-index", "1"),
        *("--codistill-addresses", "127.0.0.1:30000,127.0.0.1:30002"),
        *("--distributed-world-size", "2", "--distributed-init-method", "tcp://127.0.0.1:30005"),
    ]


def test_fairseq_on_the_cpu_is_one_job_a_rank_with_one_rendezvous_a_model():
    jobs = make_jobs(model_commands([*FAIRSEQ, "--cpu"], 2), Ports(30000, 2, 2), None)
    assert [job.label for job in jobs] == ["model 0 rank 0", "model 0 rank 1", "model 1 rank 0", "model 1 rank 1"]
    assert [last_value(job.command, "--distributed-rank") for job in jobs] == ["0", "1", "0", "1"]
    assert [last_value(job.command, "--distributed-init-method") for job in jobs] == [
        *("tcp://127.0.0.1:30004", "tcp://127.0.0.1:30004", "tcp://127.0.0.1:30005", "tcp://127.0.0.1:30005")
    ]
    for job in jobs:
        assert job.command.count("--cpu") == 1
        assert "--distributed-no-spawn" in job.command
        assert last_value(job.command, "--distributed-world-size") == "2"
        assert last_value(job.command, "--distributed-backend") == "gloo"
        assert last_value(job.command, "--ddp-backend") == "legacy_ddp"
        assert last_value(job.command, "--codistill-addresses") == "127.0.0.1:30000,127.0.0.1:30002"


def test_cpu_is_added_where_there_is_no_device_and_a_chosen_backend_is_kept():
    (job, _) = make_jobs(model_commands([*FAIRSEQ, "--ddp-backend", "no_c10d"], 1), Ports(30000, 1, 2), None)
    assert "--cpu" in job.command
    assert last_value(job.command, "--ddp-backend") == "no_c10d"


def test_another_program_gets_its_rank_in_the_environment_and_no_fairseq_flags(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    jobs = make_jobs(model_commands(OTHER, 2), Ports(30000, 2, 2), ["0", "1", "2", "3"])
    assert [
        (job.environment["RANK"], job.environment["LOCAL_RANK"], job.environment["MASTER_PORT"]) for job in jobs
    ] == [*(("0", "0", "30004"), ("1", "1", "30004"), ("0", "0", "30005"), ("1", "1", "30005"))]
    assert [job.environment["CUDA_VISIBLE_DEVICES"] for job in jobs] == ["0,1", "0,1", "2,3", "2,3"]
    assert all(job.environment["WORLD_SIZE"] == "2" for job in jobs)
    assert not any(argument.startswith("--distributed") for job in jobs for argument in job.command)
    (single,) = make_jobs(model_commands(OTHER, 1), Ports(30000, 1, 1), None)
    assert (single.label, single.environment) == ("model 0", {})


def test_a_job_is_shown_as_a_line_for_the_shell():
    assert Job(0, None, ("prog", "--lr", "1 2"), {"B": "x y", "A": "0,1"}).shell() == "A=0,1 B='x y' prog --lr '1 2'"


# --- command line ---


def test_importing_the_launcher_imports_neither_torch_nor_fairseq():
    code = (
        "import sys, fairseq_codistill.launch.cli\n"
        "sys.exit(', '.join({'torch', 'fairseq', 'zmq', 'numpy'} & set(sys.modules)) or 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr.strip()) == (0, "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-models", "2"], "there is no command"),
        (["--num-models", "2", "--", *FAIRSEQ, "--seed", "3"], "--seed is 3 for models 0 and 1"),
        (["--num-models", "2", "--devices-per-model", "0", "--", *FAIRSEQ], "--devices-per-model is 0"),
        (["--num-models", "2", "--grace-s", "-1", "--", *FAIRSEQ], "--grace-s is -1"),
        (["--num-models", "2", "python", "train.py"], "python train.py; the command to launch comes after --"),
        (["--num-models", "2", "--dry-run", "--", *FAIRSEQ, "--cpu", "--codistill-codec", "gif"], "codec is 'gif'"),
    ],
)
def test_a_wrong_setting_ends_with_code_2_and_its_name(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_keys_of_the_run_are_named_to_every_model_unless_it_names_its_own():
    commands = model_commands(FAIRSEQ, 2)
    commands[1] += ["--codistill-keys", "mine"]
    jobs = plan.make_jobs(commands, resources.Ports(7000, 2, 1), None, keys="of-the-run")
    assert [last_value(job.command, "--codistill-keys") for job in jobs] == ["of-the-run", "mine"]
    alone = plan.make_jobs(commands[:1], resources.Ports(7000, 1, 1), None, keys="of-the-run")
    assert last_value(alone[0].command, "--codistill-keys") is None


def test_a_transport_or_keys_of_the_environment_are_those_of_a_program_without_our_options(monkeypatch):
    program = [["python", "my_training.py"]] * 2
    for name, given in (("TRANSPORT", "gloo"), ("KEYS", "none")):
        with monkeypatch.context() as patched:
            patched.setenv(f"CODISTILL_{name}", given)
            for job in plan.make_jobs(program, resources.Ports(7000, 2, 1), None, keys="of-the-run"):
                assert "CODISTILL_KEYS" not in job.environment
            # fairseq has options, and looks nowhere else
            job, _ = plan.make_jobs(model_commands(FAIRSEQ, 2), resources.Ports(7000, 2, 1), None, keys="of-the-run")
            assert last_value(job.command, "--codistill-keys") == "of-the-run"


def test_in_a_job_of_slurm_a_model_of_one_device_is_said_to_be_one(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    (job,) = plan.make_jobs(model_commands(OTHER, 1), resources.Ports(7000, 1, 1), None)
    assert job.environment == {"WORLD_SIZE": "1"}
    assert plan.rank_command(OTHER, "0", "0", 1, "host", "1")[1] == {"WORLD_SIZE": "1"}


def test_a_program_without_our_options_finds_its_place_in_the_environment(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    commands = [["python", "my_training.py"]] * 2
    first, second = plan.make_jobs(commands, resources.Ports(7000, 2, 1), None, keys="of-the-run")
    assert first.command == ("python", "my_training.py")
    assert second.environment == {
        "CODISTILL_NUM_MODELS": "2",
        "CODISTILL_MODEL_INDEX": "1",
        "CODISTILL_ADDRESSES": "127.0.0.1:7000,127.0.0.1:7001",
        "CODISTILL_KEYS": "of-the-run",
    }
