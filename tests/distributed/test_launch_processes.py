"""The launcher with real processes: labels, exit codes, and that nothing is left running.

The children are small scripts that say when they are ready and then wait for the test, or for their end: no test
depends on how fast anything is.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from launching import GRANDCHILD, finish, is_running, lines_until, of_model, pids

from fairseq_codistill.launch.child import describe_exit
from fairseq_codistill.launch.plan import Job
from fairseq_codistill.launch.supervisor import Supervisor
from fairseq_codistill.workers import SAME_REQUEST_S


def test_every_line_is_whole_and_carries_its_model(launch):
    code, lines = finish(
        launch(
            """
            for number in range(300):
                (sys.stderr if number % 3 else sys.stdout).write(f"{number} " + "x" * 200 + f" {model}\\n")
            sys.stdout.write("no newline at the end")
            """
        )
    )
    assert code == 0
    for model in (0, 1):
        expected = [f"{number} {'x' * 200} {model}" for number in range(300)] + ["no newline at the end"]
        assert list(of_model(lines, f"model {model}")) == expected
    assert all(line.startswith(("[model 0] ", "[model 1] ", "[launch] ")) for line in lines)


def test_ranks_are_started_with_their_place_and_labelled(launch):
    code, lines = finish(
        launch('print(model, rank, os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"])', "--devices-per-model", "2")
    )
    assert code == 0
    said = {
        label: next(of_model(lines, label)).split() for label in (f"model {m} rank {r}" for m in (0, 1) for r in (0, 1))
    }
    assert [words[:3] for words in said.values()] == [
        ["0", "0", "2"],
        ["0", "1", "2"],
        ["1", "0", "2"],
        ["1", "1", "2"],
    ]
    ports = [words[3] for words in said.values()]
    assert ports[0] == ports[1] != ports[2] == ports[3]


def test_children_keep_the_environment_and_see_only_their_devices(tmp_path):
    script = 'import os; print(os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"])'
    finished = subprocess.run(
        [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "2", "--devices-per-model", "1", "--"]
        + [sys.executable, "-c", script, "--seed", "{model}"],
        env={**os.environ, "OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "5,3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(finished.stdout.splitlines()) == ["[model 0] 7 5", "[model 1] 7 3"]


def test_children_inherit_no_place_in_another_world(launch, monkeypatch):
    """Of a container that sets what torchrun does, or a launcher that it started."""
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, given in {**torchrun, "KEPT": "y"}.items():
        monkeypatch.setenv(name, given)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    code, lines = finish(launch(f"print(*(os.environ.get(name) for name in {(*torchrun, 'KEPT')}))"))
    assert code == 0
    assert list(of_model(lines, "model 0")) == ["None None None None y"]


def test_an_argument_that_is_no_text_goes_to_the_program_and_into_the_log_as_it_is(tmp_path):
    script = "import os, sys; print(os.fsencode(sys.argv[1]))"
    command = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "1", "--log-dir", "logs", "--"]
    finished = subprocess.run([*command, sys.executable, "-c", script, b"caf\xe9"], cwd=tmp_path, capture_output=True)
    assert finished.returncode == 0, finished.stderr
    assert rb"b'caf\xe9'" in finished.stdout
    assert b"caf\xe9" in (tmp_path / "logs/model-0.log").read_bytes().splitlines()[0]


def test_a_failed_model_is_named_and_the_other_goes_on(launch, tmp_path):
    launcher = launch(
        """
        if model == 1:
            sys.exit(3)
        wait_for("go on")
        print("went on")
        """
    )
    lines_until(launcher, "[launch] model 1: exit code 3; the other models go on without it")
    (tmp_path / "go on").touch()
    code, lines = finish(launcher)
    assert code == 1
    assert "[model 0] went on" in lines
    assert lines[-1] == "[launch] model 1 failed: exit code 3"


def test_a_failed_rank_ends_its_siblings_and_no_other_model(launch, tmp_path):
    launcher = launch(
        """
        print("pid", os.getpid())
        if (model, rank) == (0, 1):
            wait_for("sibling is up")
            sys.exit(4)
        if model == 0:
            open("sibling is up", "w").close()
            wait_for_the_end()
        wait_for("go on")
        print("went on")
        """,
        "--devices-per-model",
        "2",
    )
    lines = lines_until(launcher, "[launch] model 0: rank 1 exit code 4")
    (tmp_path / "go on").touch()
    code, rest = finish(launcher)
    assert code == 1
    assert {"[model 1 rank 0] went on", "[model 1 rank 1] went on"} <= set(rest)
    assert rest[-1] == "[launch] model 0 failed: rank 1 exit code 4"
    assert not any(is_running(pid) for pid in pids(lines + rest))


def test_fail_fast_ends_the_other_models_and_blames_only_the_first(launch):
    launcher = launch(
        """
        if model == 1:
            wait_for("other is up")
            os.kill(os.getpid(), signal.SIGKILL)
        open("other is up", "w").close()
        wait_for_the_end()
        """,
        "--fail-fast",
    )
    code, lines = finish(launcher)
    assert code == 1
    assert [line for line in lines if "failed" in line] == ["[launch] model 1 failed: killed by SIGKILL"]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_children_and_grandchildren(launch, tmp_path, number, expected):
    launcher = launch(
        f"""
        print("grandchild pid", {GRANDCHILD}.pid)

        def leave(*_):
            open(f"checkpoint {{model}}", "w").close()
            sys.exit(0)

        signal.signal(signal.SIGTERM, leave)
        print("child pid", os.getpid())
        wait_for_the_end()
        """,
        "--grace-s",
        "120",
    )
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    assert len(pids(lines)) == 4
    assert all(is_running(pid) for pid in pids(lines))
    launcher.send_signal(number)
    code, rest = finish(launcher)
    assert code == expected
    assert not any(is_running(pid) for pid in pids(lines))
    assert (tmp_path / "checkpoint 0").exists()
    assert (tmp_path / "checkpoint 1").exists()
    assert not any("failed" in line for line in rest)


IGNORES_SIGTERM = f"""
    print("grandchild pid", {GRANDCHILD}.pid)
    signal.signal(signal.SIGTERM, lambda *_: print("no"))
    print("child pid", os.getpid())
    wait_for_the_end()
"""


def test_children_that_ignore_the_signal_are_killed_after_the_grace(launch):
    launcher = launch(IGNORES_SIGTERM, "--grace-s", "0.3")
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    launcher.send_signal(signal.SIGTERM)
    code, _ = finish(launcher)
    assert code == 143
    assert not any(is_running(pid) for pid in pids(lines))


def test_a_second_signal_does_not_wait_for_the_grace(launch):
    launcher = launch(IGNORES_SIGTERM, "--grace-s", "100000")
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    for _ in range(2):  # as a terminal that goes away sends SIGHUP
        launcher.send_signal(signal.SIGINT)
    lines_until(launcher, "[model 0] no", "[model 1] no")
    time.sleep(SAME_REQUEST_S)
    assert all(is_running(pid) for pid in pids(lines))
    launcher.send_signal(signal.SIGINT)
    code, _ = finish(launcher)
    assert code == 130
    assert not any(is_running(pid) for pid in pids(lines))


def test_two_signals_at_the_same_moment_are_both_seen(launch):
    launcher = launch(IGNORES_SIGTERM, "--grace-s", "100000")
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    os.kill(launcher.pid, signal.SIGTERM)
    os.kill(launcher.pid, signal.SIGINT)
    code, _ = finish(launcher)
    assert code in (143, 130)
    assert not any(is_running(pid) for pid in pids(lines))


@pytest.mark.parametrize("ending", ["sys.exit(0)", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_what_a_child_leaves_behind_is_ended(launch, ending):
    launcher = launch(
        f"""
        stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); signal.pause()"
        grandchild = subprocess.Popen([sys.executable, "-uc", stubborn], stdout=subprocess.PIPE)
        grandchild.stdout.readline()
        print("pid", grandchild.pid)
        {ending}
        """,
        "--grace-s",
        "0.3",
        num_models=1,
    )
    code, lines = finish(launcher)
    assert code == (0 if ending == "sys.exit(0)" else 1)
    assert len(pids(lines)) == 1
    assert not any(is_running(pid) for pid in pids(lines))


def test_dry_run_starts_nothing(launch, tmp_path):
    plan = ["--plan-rows", "1", "--plan-classes", "1", "--plan-parameters", "1"]
    code, lines = finish(launch('open("started", "w").close()', "--dry-run", *plan))
    assert code == 0
    assert sum("child.py" in line for line in lines) == 2
    assert not (tmp_path / "started").exists()


def test_a_reader_that_goes_away_does_not_stop_the_training(launch, tmp_path):
    launcher = launch(
        """
        print("up")
        wait_for("closed")
        for number in range(100000 // 80):
            print("x" * 80)
        open(f"trained {model}", "w").close()
        """
    )
    lines_until(launcher, "[model 0] up", "[model 1] up")
    assert launcher.stdout is not None
    launcher.stdout.close()
    (tmp_path / "closed").touch()
    assert launcher.wait() == 0
    assert (tmp_path / "trained 0").exists()
    assert (tmp_path / "trained 1").exists()


def test_a_program_that_cannot_be_started_ends_those_that_were(tmp_path, capfdbinary):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x00")
    broken.chmod(0o755)
    waiting = (sys.executable, "-c", "import signal; signal.pause()")
    before = signal.getsignal(signal.SIGTERM)
    assert Supervisor([Job(0, None, waiting), Job(1, None, (str(broken),))]).run() == 1
    assert b"[launch] model 1 failed: cannot be started" in capfdbinary.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hang_up_that_is_ignored_ends_nothing():
    """As under nohup."""
    hang_up = f"import os, signal; os.kill({os.getpid()}, signal.SIGHUP)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert Supervisor([Job(0, None, (sys.executable, "-c", hang_up))]).run() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_model_that_cannot_be_started_again_ends_no_other(tmp_path, capfdbinary):
    once = tmp_path / "once"
    once.write_text('#!/bin/sh\nrm "$0"\nexit 3\n')
    once.chmod(0o755)
    other = f"import time; time.sleep(2); open({str(tmp_path / 'trained')!r}, 'w')"
    jobs = [Job(0, None, (str(once),)), Job(1, None, (sys.executable, "-c", other))]
    assert Supervisor(jobs, max_restarts=2).run() == 1
    said = capfdbinary.readouterr().err
    assert b"it is started again (0 restarts left)" in said
    assert b"[launch] model 0 failed: cannot be started" in said
    assert (tmp_path / "trained").exists()


def test_fail_fast_ends_a_model_that_was_to_be_started_again_too(launch, tmp_path):
    launcher = launch(
        """
        tries = f"tries{model}.{rank}"
        open(tries, "a").write("x")
        if model == 0 and rank == 0:
            wait_for("again")
            open("failing", "w").close()
            sys.exit(3)
        if model == 0:
            signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), sys.exit(0)))
            wait_for_the_end()
        if rank == 0 and open(tries).read() == "xx":
            open("again", "w").close()
            wait_for("failing")
            time.sleep(1)
        if rank == 0:
            sys.exit(4)
        wait_for_the_end()
        """,
        "--devices-per-model", "2", "--max-restarts", "1", "--fail-fast",
    )  # fmt: skip
    code, lines = finish(launcher)
    assert code == 1
    assert any("model 0: rank 0 exit code 3; it is started again" in line for line in lines)
    assert any("the other models are ended (--fail-fast)" in line for line in lines)
    assert (tmp_path / "tries0.0").read_text() == "x"


@pytest.mark.parametrize(("says", "code"), [("lost: a node", 1), ("not lost: a node", 0)])
def test_a_program_that_says_that_it_failed_has_failed_whatever_its_exit_code(says, code, capfdbinary):
    assert Supervisor([Job(0, None, (sys.executable, "-c", f"print('{says}')"), failure=b"lost: ")]).run() == code
    assert (b"[launch] model 0 failed: exit code 1" in capfdbinary.readouterr().err) == bool(code)


def test_exit_codes_are_described():
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-250) == "killed by signal 250"
