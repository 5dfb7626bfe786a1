"""Keys of a launch whose folder went with a session, or was emptied."""

import os
import shutil

import pytest

from fairseq_codistill.launch import kept_keys
from fairseq_codistill.launch.kept_keys import KeptKeys
from fairseq_codistill.launch.plan import Job
from fairseq_codistill.launch.runtime import run_folder


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Folder and environment of a launch; the keys, and a job that uses them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    environment = {"XDG_RUNTIME_DIR": str(tmp_path / "session"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for folder in environment.values():
        os.mkdir(folder, 0o700)
    with run_folder(environment) as folder:
        keys = os.path.join(folder, "keys")
        os.mkdir(keys, 0o700)
        for name in ("a.key", "a.key_secret"):
            with open(os.path.join(keys, name), "w") as file:
                file.write(name)
        kept = KeptKeys(keys, environment)
        yield environment, kept, Job(0, None, ("train", "--codistill-keys", keys), {"CODISTILL_KEYS": keys})
        kept.close()


def contents(folder):
    return {name: open(os.path.join(folder, name)).read() for name in sorted(os.listdir(folder))}


BOTH = {"a.key": "a.key", "a.key_secret": "a.key_secret"}


def test_what_is_there_stays_as_it_is(launch):
    _, kept, job = launch
    keys = job.environment["CODISTILL_KEYS"]
    with open(os.path.join(keys, "a.key"), "w") as file:
        file.write("newer")
    assert kept.for_job(job) == job
    assert contents(keys) == {**BOTH, "a.key": "newer"}


def test_what_is_gone_is_put_back_for_the_user_alone_and_is_no_dead_launch(launch):
    environment, kept, job = launch
    keys = job.environment["CODISTILL_KEYS"]
    shutil.rmtree(os.path.join(environment["XDG_RUNTIME_DIR"], "codistill"))
    assert kept.for_job(job) == job
    assert contents(keys) == BOTH
    assert {os.stat(os.path.join(keys, name)).st_mode & 0o777 for name in BOTH} == {0o600}
    assert {os.stat(folder).st_mode & 0o777 for folder in (keys, os.path.dirname(keys))} == {0o700}
    with run_folder(environment):  # of another launch, which removes what the dead ones left
        assert contents(keys) == BOTH


def test_where_it_may_not_be_made_again_it_is_elsewhere_and_removed_at_the_end(launch):
    environment, kept, job = launch
    shutil.rmtree(environment["XDG_RUNTIME_DIR"])
    with open(environment["XDG_RUNTIME_DIR"], "w"):
        pass  # no folder can be made there: a session's is the system's to make
    moved = kept.for_job(job)
    keys = moved.environment["CODISTILL_KEYS"]
    assert keys.startswith(environment["XDG_CACHE_HOME"])
    assert moved.command == ("train", "--codistill-keys", keys)
    assert contents(keys) == BOTH
    shutil.rmtree(environment["XDG_CACHE_HOME"])
    again = kept.for_job(moved)  # as it was started last
    assert contents(again.environment["CODISTILL_KEYS"]) == BOTH
    kept.close()
    assert not os.path.exists(keys)


def test_a_job_with_keys_of_its_own_or_none_is_left_alone(launch):
    environment, kept, _ = launch
    shutil.rmtree(os.path.join(environment["XDG_RUNTIME_DIR"], "codistill"))
    for job in (Job(0, None, ("train",), {}), Job(0, None, ("train", "--codistill-keys", "mine"), {})):
        assert kept.for_job(job) is job
    assert not os.listdir(environment["XDG_RUNTIME_DIR"])


def test_keys_that_cannot_be_put_anywhere_end_no_start(launch, monkeypatch, caplog):
    environment, kept, job = launch
    shutil.rmtree(os.path.join(environment["XDG_RUNTIME_DIR"], "codistill"))

    def refuse(*_arguments):
        raise PermissionError("not here")

    monkeypatch.setattr(KeptKeys, "_write", refuse)
    monkeypatch.setattr(kept_keys, "run_folder", refuse)
    assert kept.for_job(job) is job
    assert "cannot be put back: not here" in caplog.text
