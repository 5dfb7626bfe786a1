"""What is refused of a command before anything starts: by name, with the value and the fix."""

import subprocess
import sys

import pytest

from fairseq_codistill.command_line import read_options
from fairseq_codistill.config import ConfigError
from fairseq_codistill.launch import cli
from fairseq_codistill.launch.checks import check_jobs
from fairseq_codistill.launch.plan import make_jobs, model_commands
from fairseq_codistill.launch.resources import Ports

FAIRSEQ = [sys.executable, "-m", "fairseq_cli.train", "data", "--seed", "{model+1}", "--save-dir", "out/{model}"]
PLUGIN = ["--user-dir", "plugin", "--task", "codistill_translation", "--criterion", "codistillation"]


def check(*arguments, plugin=PLUGIN, model_args=None):
    commands = model_commands([*FAIRSEQ, *plugin, *arguments], 2, model_args)
    check_jobs(make_jobs(commands, Ports(30000, 2, 1), None, keys="keys"))


def test_options_are_read_with_their_types_and_the_last_one_counts():
    config, smoothing = read_options(
        "data --lr 0.1 --codistill-interval 5 --codistill-weight=0.5 --codistill-replica-wait --codistill-interval=7 "
        "--label-smoothing 0.1 --codistill-codec tokens:16".split()
    )
    assert (config.codistill_interval, config.codistill_weight, config.codistill_replica_wait) == (7, 0.5, True)
    assert (config.codistill_codec, smoothing.label_smoothing) == ("tokens:16", 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--codistill-interval 1.5", "--codistill-interval is '1.5'; it must be a whole number"),
        ("--codistill-weight=a", "--codistill-weight is 'a'; it must be a number"),
        ("--codistill-codek fp16", "--codistill-codek is no option; did you mean --codistill-codec"),
        ("--codistill-timeout --cpu", "--codistill-timeout has no value; it must be a number"),
        ("--codistill-timeout", "--codistill-timeout has no value"),
        ("--codistill-replica-wait=yes", "it takes no value"),
        ("--codistill-codec gif", "--codistill-codec is 'gif'; it must be one of"),
        ("--codistill-codec tokens:4", "use --codistill-divergence kl"),
        ("--codistill-weight -1", "--codistill-weight is -1.0; it must be a finite number"),
        ("--label-smoothing 2", "--label-smoothing is 2.0"),
        ("--criterion cross_entropy --task translation --codistill-interval 0", "--codistill-interval is 0"),
        ("--task translation", "--task is translation: .* use --task codistill_translation"),
    ],
)
def test_an_option_that_cannot_work_is_named_with_its_fix(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check(*arguments.split())


def test_the_model_is_named_whose_own_option_cannot_work():
    with pytest.raises(ConfigError, match=r"model 1: --codistill-weight is 'x'"):
        check(model_args={1: ["--codistill-weight", "x"]})


@pytest.mark.parametrize(
    ("missing", "message"), [(0, "--user-dir is not"), (2, "--task is not"), (4, "--criterion is")]
)
def test_a_command_that_would_not_take_the_options_is_refused(missing, message):
    with pytest.raises(ConfigError, match=message):
        check(plugin=PLUGIN[:missing] + PLUGIN[missing + 2 :])


def test_what_works_and_what_is_not_fairseq_is_let_through():
    check("--codistill-codec", "tokens:4", "--codistill-divergence", "kl")
    commands = model_commands([sys.executable, "-m", "another", "--seed", "{model}", "--codistill-x", "1"], 2)
    check_jobs(make_jobs(commands, Ports(30000, 2, 1), None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codistill-interval", "0"], "--codistill-interval is 0"),
        (["--epoks", "3"], "--epoks"),
        (["--model", "resnet18", "--lr", "x"], "--lr"),
        (["--epoks", "3", "--help"], None),
        (["--version"], None),
    ],
)
def test_a_program_that_says_what_it_will_do_has_its_options_read_before_it_starts(arguments, message):
    program = [sys.executable, "-m", "vision.train", "--save-dir", "out/{model}", "--seed", "{model+1}"]
    jobs = make_jobs(model_commands([*program, *arguments], 2, None), Ports(30000, 2, 1), None, keys="keys")
    if message is None:
        check_jobs(jobs)
        return
    with pytest.raises(ConfigError, match=message):
        check_jobs(jobs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--restore-file base.pt", "--restore-file is 'base.pt' with --max-restarts.*give --finetune-from-model"),
        ("--reset-optimizer", "--reset-optimizer is given with --max-restarts"),
        ("--no-save-optimizer-state", "--no-save-optimizer-state is given with --max-restarts"),
        ("--no-last-checkpoints", "--no-last-checkpoints is given with --max-restarts.*would begin anew"),
        ("--no-save", "--no-save is given with --max-restarts.*would begin anew"),
        ("--restore-file out/{model}/checkpoint_last.pt", None),
        ("--restore-file checkpoint_last.pt --finetune-from-model base.pt", None),
    ],
)
def test_what_would_begin_again_with_every_restart_is_refused(arguments, message):
    def plan(max_restarts):
        options = cli.make_parser().parse_args(["--num-models", "2", "--max-restarts", max_restarts])
        cli.plan_models(options, [*FAIRSEQ, *PLUGIN, *arguments.split()])

    plan("0")
    if message is None:
        plan("1")
        return
    with pytest.raises(ConfigError, match=message):
        plan("1")


@pytest.mark.parametrize("wrapper", [["nice"], ["nice", "-n", "19"], ["env", "X=1"]])
def test_what_runs_inside_of_something_else_checks_itself(wrapper):
    inside = [
        *wrapper,
        "codistill-vision",
        "--save-dir",
        "out/{model}",
        "--seed",
        "{model+1}",
        "--config",
        "/opt/c.yaml",
    ]
    check_jobs(make_jobs(model_commands(inside, 2, None), Ports(30000, 2, 1), None, keys="keys"))


def test_files_of_another_folder_are_not_looked_for():
    command = [
        sys.executable,
        "-m",
        "vision.train",
        "--save-dir",
        "out/{model}",
        "--seed",
        "{model+1}",
        "--config",
        "c.yaml",
    ]
    jobs = make_jobs(model_commands(command, 2, None), Ports(30000, 2, 1), None, keys="keys")
    check_jobs(jobs, starts_here=False)
    with pytest.raises(ConfigError, match="c.yaml"):
        check_jobs(jobs)


def test_a_program_that_cannot_be_asked_is_let_through(monkeypatch):
    def fails(command):
        raise ModuleNotFoundError("of somebody else")

    monkeypatch.setattr("fairseq_codistill.launch.checks.program_plan", fails)
    command = [sys.executable, "-m", "vision.train", "--seed", "{model}"]
    check_jobs(make_jobs(model_commands(command, 2, None), Ports(30000, 2, 1), None, keys="keys"))


@pytest.mark.parametrize("program", [[*FAIRSEQ, *PLUGIN], [sys.executable, "-m", "vision.train", "--seed", "{model}"]])
def test_the_check_needs_neither_torch_nor_fairseq(program):
    code = (
        "import sys, fairseq_codistill.launch.cli as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'fairseq', 'zmq', 'numpy'} & set(sys.modules)))"
    )
    command = [*program, "--codistill-interval", "1.5"]
    finished = subprocess.run(
        [sys.executable, "-c", code, "--num-models", "2", "--", *command], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 2
    assert finished.stdout.strip() == "[]"
    assert "--codistill-interval" in finished.stderr
    assert "'1.5'" in finished.stderr
    assert len(finished.stderr.splitlines()) == 2
