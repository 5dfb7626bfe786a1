"""Where a launch keeps its keys, and what it leaves of those before it."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from fairseq_codistill.launch.runtime import private_directory, run_folder, runtime_directories

HOLDS = """
import os, signal, sys
from fairseq_codistill.launch.runtime import run_folder
with run_folder(os.environ) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def environment(tmp_path):
    return {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}


def start(environment):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    return process, process.stdout.readline().strip()


def finish(process):
    process.communicate()
    return process.returncode


def test_a_folder_is_for_the_user_alone_and_gone_at_the_end(environment, tmp_path):
    with run_folder(environment) as folder:
        assert os.path.dirname(os.path.dirname(folder)) == str(tmp_path)
        for path in (folder, os.path.dirname(folder)):
            assert os.stat(path).st_mode & 0o777 == 0o700
    assert not os.path.exists(folder)


def test_a_folder_of_a_launcher_that_was_killed_is_removed_by_the_next_one_and_others_stay(environment):
    killed, stale = start(environment)
    alive, kept = start(environment)
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    assert os.path.isdir(stale)
    with run_folder(environment):
        assert not os.path.exists(stale)
        assert os.path.isdir(kept)
    assert finish(alive) == 0
    assert not os.path.exists(kept)


def test_a_folder_that_others_may_read_is_closed_and_one_that_is_a_link_is_not_used(tmp_path):
    (tmp_path / "open").mkdir(mode=0o777)
    assert private_directory([str(tmp_path / "open")]) == str(tmp_path / "open")
    assert os.stat(tmp_path / "open").st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    (tmp_path / "file").write_text("")
    good = str(tmp_path / "good")
    assert private_directory([str(tmp_path / "link"), str(tmp_path / "file"), good]) == good
    with pytest.raises(OSError, match="XDG_RUNTIME_DIR"):
        private_directory([str(tmp_path / "file")])


def test_without_a_runtime_directory_keys_lie_in_the_cache_or_under_the_users_number():
    first, second = runtime_directories({})
    assert first.endswith("/.cache/codistill")
    assert second.endswith(f"/codistill-{os.getuid()}")


def test_a_user_whom_nobody_knows_has_no_folder_called_tilde(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # without HOME, and not in the user database
    (only,) = runtime_directories({})
    assert os.path.isabs(only)
    assert runtime_directories({"XDG_CACHE_HOME": str(tmp_path)})[0] == str(tmp_path / "codistill")


def test_a_folder_of_another_host_stays_though_its_lock_can_be_had_here(environment, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # each host grants it, to itself alone
    monkeypatch.setattr(socket, "gethostname", lambda: "node-1")
    with run_folder(environment) as folder:
        monkeypatch.setattr(socket, "gethostname", lambda: "node")
        with run_folder(environment) as second:
            assert os.path.isdir(folder)
            with run_folder(environment):
                assert not os.path.isdir(second)  # but for the name it would have been the same


def test_a_file_system_that_knows_no_locks_is_as_good(tmp_path, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unknown)
    left = tmp_path / f"codistill/run-{socket.gethostname()}-other"
    left.mkdir(parents=True, mode=0o700)
    with run_folder({"XDG_RUNTIME_DIR": str(tmp_path)}) as folder:
        assert os.path.isdir(folder)
        assert left.exists()  # whose it is cannot be told
    assert not os.path.exists(folder)
