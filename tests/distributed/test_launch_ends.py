"""How a launch ends: the leader is asked before what serves it, and nothing outlives a launcher that was killed."""

import fcntl
import os
import signal
import struct
import termios
import time
from pathlib import Path

import pytest
from launching import GRANDCHILD, finish, is_running, lines_until, pids, wait_until_gone

from fairseq_codistill.launch import guard

SAVES = f"""
    worker = {GRANDCHILD}
    print("worker pid", worker.pid)

    def save(*_):
        for number in range(2000):  # more than a pipe holds
            print("saving", number, "x" * 80)
        with open(f"checkpoint {{model}}", "w") as file:
            file.write("a worker is here" if worker.poll() is None else "no worker")
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, save)
    print("child pid", os.getpid())
    wait_for_the_end()
"""


def test_the_leader_is_asked_while_its_workers_still_run(launch, tmp_path):
    launcher = launch(SAVES, "--grace-s", "120")
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    launcher.send_signal(signal.SIGTERM)
    code, rest = finish(launcher)
    assert code == 128 + signal.SIGTERM
    for model in (0, 1):
        assert (tmp_path / f"checkpoint {model}").read_text() == "a worker is here"
        assert sum(line.startswith(f"[model {model}] saving") for line in rest) == 2000
    assert not any("lost" in line for line in rest)
    assert not any(is_running(pid) for pid in pids(lines))


def test_a_killed_launcher_takes_its_models_with_it_after_they_saved(launch, tmp_path):
    launcher = launch(SAVES, "--grace-s", "120")
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    launcher.kill()
    launcher.wait()
    wait_until_gone(pids(lines))
    for model in (0, 1):
        assert (tmp_path / f"checkpoint {model}").read_text() == "a worker is here"


def test_what_ignores_the_end_of_its_launcher_is_killed_after_the_grace(launch):
    launcher = launch(
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        print("worker pid", worker.pid)
        print("guard pid", os.getppid())
        print("child pid", os.getpid())
        wait_for_the_end()
        """,
        "--grace-s",
        "0.3",
    )
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    assert len(pids(lines)) == 6
    launcher.kill()
    launcher.wait()
    wait_until_gone(pids(lines))


def test_a_job_outlives_neither_its_guard_nor_a_kill_of_its_group(launch):
    launcher = launch(
        f"""
        print("worker pid", {GRANDCHILD}.pid)
        print("child pid", os.getpid())
        print("guard pid", os.getppid())
        wait_for_the_end()
        """
    )
    lines = lines_until(launcher, "[model 0] guard pid", "[model 1] guard pid")
    guards = [int(line.split()[-1]) for line in lines if "guard pid" in line]
    os.kill(guards[0], signal.SIGKILL)
    os.killpg(guards[1], signal.SIGKILL)
    code, rest = finish(launcher)
    assert code == 1
    assert sum("killed by SIGKILL" in line for line in rest) >= 2
    assert not any(is_running(pid) for pid in pids(lines))


def test_a_model_that_the_terminal_asked_before_the_launcher_did_is_not_said_to_have_lost_anything(launch):
    launcher = launch(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # comes from the launcher, a moment later
        signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))
        print("child pid", os.getpid())
        wait_for_the_end()
        """,
        "--grace-s",
        "120",
    )
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    launcher.send_signal(signal.SIGINT)
    lines_until(launcher, "[launch] SIGINT")
    for pid in pids(lines):
        os.kill(pid, signal.SIGINT)
    code, rest = finish(launcher)
    assert code == 128 + signal.SIGINT
    assert not any("may be lost" in line for line in rest)


def test_a_model_that_did_not_get_to_save_is_named(launch):
    launcher = launch(
        """
        if model == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("child pid", os.getpid())
        wait_for_the_end()
        """,
        "--grace-s",
        "0.3",
    )
    lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    launcher.send_signal(signal.SIGTERM)
    code, rest = finish(launcher)
    assert code == 128 + signal.SIGTERM
    lost = [line for line in rest if "lost" in line]
    assert lost == ["[launch] model 1: killed by SIGKILL, so what it did since its last checkpoint may be lost"]


def test_the_end_of_a_login_session_leaves_the_models_time_to_save(launch, tmp_path):
    """systemd sends SIGTERM to all of its processes, and SIGHUP at once."""
    launcher = launch(SAVES, "--grace-s", "120")
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    children = [int(line.split()[-1]) for line in lines if "child pid" in line]
    launcher.send_signal(signal.SIGTERM)
    for pid in (launcher.pid, *children):
        os.kill(pid, signal.SIGHUP)
    code, rest = finish(launcher)
    assert code in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
    assert not any("may be lost" in line for line in rest)
    for model in range(2):
        assert (tmp_path / f"checkpoint {model}").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_of_a_job_leaves_the_leader_to_save(launch, tmp_path, number):
    """As a scheduler sends it: to the launcher, the guards, the models and their workers, in any order."""
    launcher = launch(
        """
        from fairseq_codistill.workers import ignore_signals

        ready, tell = os.pipe()
        if not (worker := os.fork()):
            ignore_signals()
            os.write(tell, b"x")
            while True:
                time.sleep(0.05)
        os.read(ready, 1)  # it has no handler of its leader's yet: a signal before this would end it
        asked = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: asked.append(1))
        print("worker pid", worker)
        print("guard pid", os.getppid())
        print("child pid", os.getpid())
        while not asked:
            time.sleep(0.05)
        open(f"checkpoint {model}", "w").write("a worker is here" if os.waitpid(worker, os.WNOHANG)[0] == 0 else "none")
        sys.exit(0)
        """,
        "--grace-s",
        "120",
    )
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    for pid in [*pids(lines), launcher.pid]:
        os.kill(pid, number)
    code, _ = finish(launcher)
    assert code == 128 + number
    for model in (0, 1):
        assert (tmp_path / f"checkpoint {model}").read_text() == "a worker is here"
    wait_until_gone(pids(lines))


def test_the_guard_starts_without_anything_that_is_installed():
    assert "fairseq_codistill" not in Path(guard.__file__).read_text()


LOGGED = """
    tries = f"tries{model}.{rank}"
    open(tries, "a").write("x")
    print("line of try", len(open(tries).read()))
    if model == 1 and rank == 0 and len(open(tries).read()) < 2:
        sys.exit(7)
"""


def test_what_models_write_is_kept_beside_their_checkpoints_over_restarts(launch, tmp_path):
    code, lines = finish(launch(LOGGED, "--max-restarts", "1", more=["--save-dir", "saved/{model}"]))
    assert code == 0
    first, second = ((tmp_path / "saved" / f"model-{model}.log").read_text().splitlines() for model in (0, 1))
    assert [line for line in first if not line.startswith("[launch]")] == ["line of try 1"]
    assert [line for line in second if not line.startswith("[launch]")] == ["line of try 1", "line of try 2"]
    assert second[0].startswith("[launch] model 1: CODISTILL_ADDRESSES=")
    assert "[launch] model 1: exit code 7; it is started again (0 restarts left)" in second
    assert second[-1] == "[launch] model 1 ended: exit code 0"
    assert "[model 1] line of try 2" in lines


def test_lines_of_several_ranks_say_which_rank_wrote_them(launch, tmp_path):
    launcher = launch("print('from', rank)", "--devices-per-model", "2", "--log-dir", "logs")
    assert finish(launcher)[0] == 0
    for model in (0, 1):
        kept = (tmp_path / "logs" / f"model-{model}.log").read_text().splitlines()
        assert {f"[model {model} rank 0] from 0", f"[model {model} rank 1] from 1"} <= set(kept)


def test_nothing_is_kept_where_nothing_is_saved(launch, tmp_path):
    assert finish(launch("pass"))[0] == 0
    assert finish(launch("pass", "--log-dir", "none", more=["--save-dir", "saved/{model}"]))[0] == 0
    assert not list(tmp_path.rglob("*.log"))


def test_the_last_words_to_a_killed_launcher_are_kept(launch, tmp_path):
    launcher = launch(SAVES, "--grace-s", "120", "--log-dir", "logs")
    lines = lines_until(launcher, "[model 0] child pid", "[model 1] child pid")
    launcher.kill()
    launcher.wait()
    wait_until_gone(pids(lines))
    guards = [int(pid) for pid in guards_of(tmp_path)]
    wait_until_gone(guards)
    for model in (0, 1):
        kept = (tmp_path / "logs" / f"model-{model}.log").read_text().splitlines()
        assert sum(line.startswith("saving ") for line in kept) == 2000


def guards_of(folder):
    """Processes that work in a folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (entry / "cwd").is_symlink():
            try:
                if os.readlink(entry / "cwd") == str(folder):
                    yield entry.name
            except OSError:
                continue


def test_keys_of_a_killed_launcher_are_removed_by_the_next_one(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    launcher = launch("print('keys', os.environ['CODISTILL_KEYS']); wait_for_the_end()")
    lines = lines_until(launcher, "[model 0] keys", "[model 1] keys")
    (keys,) = {Path(line.split()[-1]) for line in lines if "] keys" in line}
    assert (keys / "model-0.key_secret").exists()
    launcher.kill()
    launcher.wait()
    assert keys.exists()
    assert finish(launch("pass"))[0] == 0
    assert not keys.exists()
    assert not list((tmp_path / "runtime").rglob("*.key*"))


def test_models_are_asked_to_end_though_nobody_reads_what_the_launcher_says(launch, tmp_path):
    launcher = launch(
        """
        def save(*_):
            open(f"checkpoint {model}", "w").close()
            sys.exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, save)
        open(f"started {model}", "w").close()
        while True:
            print("x" * 1000, flush=True)  # soon more than a pipe holds
        """,
        "--grace-s",
        "20",
    )
    while not (is_full(launcher.stdout) and all((tmp_path / f"started {model}").exists() for model in (0, 1))):
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 128 + signal.SIGTERM
    assert all((tmp_path / f"checkpoint {model}").exists() for model in (0, 1))


def is_full(pipe):
    """Whether what lies in a pipe is as much as it holds, but for a page."""
    waiting = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]
    return waiting > fcntl.fcntl(pipe, 1032) - 4096  # F_GETPIPE_SZ
