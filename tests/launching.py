"""What tests of the launcher share: a launch of a small script, its lines, and who of it still runs."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

PRELUDE = """
import os, signal, subprocess, sys, time
model = int(os.environ["CODISTILL_MODEL_INDEX"])
rank = int(os.environ.get("RANK", 0))

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)

def wait_for_the_end():
    while True:  # not signal.pause(): a signal just before it would only be handled after the next one
        time.sleep(0.05)

"""
GRANDCHILD = "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])"


def hear_signals() -> None:
    """In a new process: what the tests were started under, such as ``nohup``, has no say in what it hears."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def launch(tmp_path):
    """Starts ``codistill-launch`` on a script; whatever a failed test leaves running is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str, *options: str, num_models: int = 2, more: Sequence[str] = ()) -> subprocess.Popen[str]:
        script = tmp_path / "child.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        command = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", str(num_models), *options]
        launcher = subprocess.Popen(
            [*command, "--", str(script), "--seed", "{model}", "--cpu", *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            preexec_fn=hear_signals,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            launcher.send_signal(signal.SIGINT)
            launcher.wait()
        assert launcher.stdout is not None
        launcher.stdout.close()


def lines_until(launcher: "subprocess.Popen[str]", *wanted: str) -> list[str]:
    """Read lines until each of the wanted texts has been in one."""
    missing = set(wanted)
    lines = []
    assert launcher.stdout is not None
    for line in launcher.stdout:
        lines.append(line.rstrip("\n"))
        missing -= {text for text in missing if text in line}
        if not missing:
            return lines
    raise AssertionError(f"the launcher ended without {sorted(missing)}; it wrote:\n" + "\n".join(lines))


def finish(launcher: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    """Exit code and the remaining lines."""
    rest, _ = launcher.communicate()
    return launcher.returncode, rest.splitlines()


def pids(lines: list[str]) -> list[int]:
    return [int(line.rpartition("pid ")[2]) for line in lines if "pid " in line]


def is_running(pid: int) -> bool:
    """Not so for a process that has ended and that its parent has not asked about yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(numbers: Iterable[int]) -> None:
    """Fails when one of these processes still runs after a minute."""
    deadline = time.monotonic() + 60
    while left := [number for number in numbers if is_running(number)]:
        assert time.monotonic() < deadline, f"processes {left} still run"
        time.sleep(0.02)


def of_model(lines: list[str], label: str) -> Iterator[str]:
    return (line.removeprefix(f"[{label}] ") for line in lines if line.startswith(f"[{label}] "))
