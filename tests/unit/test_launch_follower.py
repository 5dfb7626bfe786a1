"""Who waits for a job on SLURM: signals, exit codes that come late, readers that go away. Programs are stand-ins."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fairseq_codistill.launch import slurm


class TestFollower:
    """In a process group of its own, as a terminal has it, beside a controller that takes its time."""

    FOLLOW = "import sys; from fairseq_codistill.launch.slurm_batch import Follower; sys.exit(Follower('5', '.').run())"

    @pytest.fixture
    def follower(self, tmp_path):
        (tmp_path / "state").write_text("RUNNING")
        programs = {
            "scontrol": "echo asked >> calls; sleep 1; echo JobState=$(cat state)",
            "scancel": 'echo "scancel $@" >> calls; echo CANCELLED > state',
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [sys.executable, "-c", self.FOLLOW]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as process:
            yield process
            process.kill()

    def test_ctrl_c_asks_the_models_to_end_whatever_is_asked_of_the_controller_meanwhile(self, follower, tmp_path):
        calls = tmp_path / "calls"
        deadline = time.monotonic() + 60
        while not calls.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(follower.pid, signal.SIGINT)
        assert follower.wait(60) == 128 + signal.SIGINT
        assert [line for line in calls.read_text().splitlines() if "scancel" in line] == [
            "scancel --batch --signal=TERM 5"
        ]

    @pytest.fixture
    def failed(self, tmp_path):
        """A job that ended badly, whose exit code comes late through the file system."""
        (tmp_path / "scontrol").write_text("#!/bin/sh\necho JobState=FAILED\n")
        (tmp_path / "scontrol").chmod(0o755)
        (tmp_path / "slurm-5.log").write_text("said\n" * 3)
        return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def test_the_exit_code_of_a_launch_that_failed_is_waited_for(self, failed, tmp_path):
        with subprocess.Popen([sys.executable, "-c", self.FOLLOW], cwd=tmp_path, env=failed) as process:
            time.sleep(4)
            slurm.leave_exit_code(str(tmp_path), "5", 143)
            assert process.wait(60) == 143

    def test_a_reader_that_goes_away_costs_no_exit_code(self, failed, tmp_path):
        slurm.leave_exit_code(str(tmp_path), "5", 0)
        read_end, write_end = os.pipe()
        os.close(read_end)
        command = [sys.executable, "-c", self.FOLLOW]
        done = subprocess.run(command, cwd=tmp_path, env=failed, stdout=write_end, stderr=subprocess.PIPE, text=True)
        os.close(write_end)
        assert (done.returncode, done.stderr) == (0, "")
