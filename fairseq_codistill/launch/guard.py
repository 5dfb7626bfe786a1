"""Owns one job of a launch: runs its command, and ends all of it when the launcher is gone, however that ended.

The launcher starts it as a script, as the leader of a session of its own. It ignores every signal that asks to end, so
that of a group it is the last. What it is to do comes as lines on its standard input: ``end`` asks the command (the
leader of the job) and nothing else of the group. When that pipe closes, the launcher is gone, by ``kill -9`` perhaps:
then it asks by itself, and kills the group once the grace is over. It knows nothing of models, and imports neither this
package nor anything beyond the standard library: it starts in milliseconds, once a rank.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

POLL_S = 0.05  # how often the command, and the rest of its group, are looked at
PR_SET_PDEATHSIG = 1
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end_with_parent(end_signal: int) -> Callable[[], None] | None:
    """What the command does before it is executed: should even this process be killed, it is asked to end.

    Args:
        end_signal: that asks it.

    Returns:
        None where the system has no such thing; the C library is loaded here, since a fork must not.
    """
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):
        return None

    def before_exec() -> None:
        for number in IGNORED:  # an ignored signal stays so over an exec
            # The end of a login session sends SIGHUP to all of its processes, to the launcher among them, which asks.
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, end_signal)

    return before_exec


def group_runs(group: int, apart_from: int = 0) -> bool | None:
    """Whether a process of a group still runs. One that has ended and was not asked about by its parent does not.

    Args:
        group: its number.
        apart_from: a process that does not count.

    Returns:
        None where the system does not list its processes.
    """
    if not os.path.isdir("/proc/self"):
        return None
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == apart_from:
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as stat:
            # pid (name) state parent group ...; the name may hold spaces and brackets
            state, _, process_group = stat.read().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state not in "ZX":
                return True
    return False


class Guard:
    """Runs one command.

    Args:
        status: descriptor for the one line that says how the command ended.
        output: read end of the pipe that the command writes to, read only once the launcher is gone, lest the command
            fail or block at a line that nobody reads while it saves.
        log: descriptor of the model's log, for these last lines; -1 for none.
        label: what they begin with.
        grace_s: seconds between the request to end and the kill, once the launcher is gone.
        end_signal: the number of the signal that asks the command to end.
    """

    def __init__(self, status: int, output: int, log: int, label: str, grace_s: float, end_signal: int):
        self._status, self._output, self._log, self._label = status, output, log, label.encode()
        self._grace_s, self._end_signal = grace_s, end_signal
        self._orders = 0  # standard input; -1 once it is closed
        self._kill_at: float | None = None
        self._rest = b""

    def run(self, command: Sequence[str]) -> int:
        """Until the command and all that it left in the group have ended.

        Returns:
            its exit code, negative for a signal.
        """
        process = self._start(command)
        if process is None:
            return 127
        asked_group, me = False, os.getpid()
        while True:
            code = process.poll()
            if code is not None:
                self._tell(f"ended {code}")
                if not group_runs(me, apart_from=me):  # nor where nobody can tell
                    self._drain()
                    return code
                if self._kill_at is not None and not asked_group:  # the launcher, which does this, is gone
                    asked_group = True
                    os.killpg(me, signal.SIGTERM)
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                os.killpg(me, signal.SIGKILL)
            self._wait(process)

    def _start(self, command: Sequence[str]) -> "subprocess.Popen[bytes] | None":
        try:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent(self._end_signal))
        except (OSError, subprocess.SubprocessError) as error:
            self._tell(f"error {error}")
            return None

    def _tell(self, text: str) -> None:
        """Only the first line counts. Nobody may be there any more to read it."""
        if self._status >= 0:
            with contextlib.suppress(OSError):
                os.write(self._status, text.replace("\n", " ").encode() + b"\n")
            os.close(self._status)
            self._status = -1

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        """For an order, for output that nobody else reads, or for a moment."""
        descriptors = [self._orders] if self._orders >= 0 else [self._output]
        ready, _, _ = select.select(descriptors, [], [], POLL_S)
        if self._orders < 0:
            if ready and not self._read():
                time.sleep(POLL_S)
        elif ready:
            order = os.read(self._orders, 4096)
            if not order:
                self._orders = -1
                self._kill_at = time.monotonic() + self._grace_s
                os.set_blocking(self._output, False)
            if process.poll() is None:
                process.send_signal(self._end_signal)

    def _read(self) -> bool:
        """Take what the command wrote into the log; returns whether there was something."""
        try:
            text = os.read(self._output, 65536)
        except OSError:
            return False
        lines = (self._rest + text).split(b"\n")
        self._rest = lines.pop()
        self._keep(lines)
        return bool(text)

    def _drain(self) -> None:
        while self._orders < 0 and self._read():
            pass
        if self._rest:
            self._keep([self._rest])

    def _keep(self, lines: Sequence[bytes]) -> None:
        if self._log >= 0 and lines:
            with contextlib.suppress(OSError):
                os.write(self._log, b"".join(self._label + line + b"\n" for line in lines))


def main(argv: Sequence[str]) -> int:
    """``guard.py STATUS OUTPUT LOG LABEL GRACE SIGNAL COMMAND...``; ends as the command did."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    status, output, log, label, grace_s, end_signal, *command = argv
    code = Guard(int(status), int(output), int(log), label, float(grace_s), int(end_signal)).run(command)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
