"""Owns one training command as a person sees it: every line goes to a log per model, figures go to the screen in short.

``python recipes/tools/run_logged.py --log-dir OUT -- fairseq-train ...`` writes ``OUT/0/train.log``; lines that
``codistill-launch`` labelled ``[model 1]`` go to ``OUT/1/train.log``, and so does what it says of model 1, such as by
what that was killed. Warnings, errors and the launcher's own lines are always shown, everything with ``VERBOSE=1``. It
must never change a line that it stores, but for the number of a model, which is its folder's, nor outlive its command.
"""

import argparse
import collections
import contextlib
import ctypes
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TextIO

from fairseq_codistill.report.runlog import Record, parse_line

LABEL = re.compile(r"^\[model (\d+)(?: rank (\d+))?\] ")
LAUNCH = re.compile(r"^\[launch\] model (\d+)\b(.*\n?)")
ALWAYS_SHOWN = re.compile(
    r"^\[launch\]|\| vision\.log \||\| (WARNING|ERROR|CRITICAL) \||^(\w+\.)*\w*(Error|Exception): "
)
GOES_ON = re.compile(r"\| going on from |\| Loaded checkpoint .* updates\)")  # vision, fairseq
NUM_LAST_LINES = 40
SHOWN = {  # kind -> (figure, its short name, format)
    "train_inner": (
        ("loss", "loss", ".3f"),
        ("ppl", "ppl", ".2f"),
        ("codistill_mse", "mse", ".3f"),
        ("codistill_mbit", "Mbit/update", ".2f"),
        ("ups", "updates/s", ".1f"),
    ),
    "valid": (("nll_loss", "valid NLL", ".3f"), ("ppl", "valid ppl", ".2f")),
}


def shorten(kind: str, record: Record) -> str | None:
    """A record of figures as one short line; None for a kind that is not shown."""
    if kind not in SHOWN:
        return None
    parts = [f"epoch {record.get('epoch', 0):3.0f}", f"update {record.get('num_updates', 0):6.0f}"]
    parts += [f"{name} {record[key]:{form}}" for key, name, form in SHOWN[kind] if key in record]
    return "  ".join(parts)


class Logs:
    """The log files of a run, opened when their first line comes."""

    def __init__(self, folder: Path, first_model: int = 0):
        self._folder, self._first_model = folder, first_model
        self._files: dict[tuple[int, int], TextIO] = {}
        self._ended: set[tuple[int, int]] = set()  # logs that cannot be written

    def write(self, model: int, rank: int, line: str) -> None:
        if (model, rank) in self._ended:
            return
        try:
            self._write(model, rank, line)
        except OSError as error:  # a full disk: the log ends here, and training does not
            self._ended.add((model, rank))
            print(f"the log of model {self.number(model)} ends here, training goes on: {error}", file=sys.stderr)

    def _write(self, model: int, rank: int, line: str) -> None:
        file = self._files.get((model, rank))
        if file is None:
            path = self._folder / str(self.number(model)) / ("train.log" if rank == 0 else f"train.rank{rank}.log")
            path.parent.mkdir(parents=True, exist_ok=True)
            # Appended: a training that is continued keeps its first part. A line that a full disk cut off ends there.
            is_cut = _is_cut(path)
            file = self._files[model, rank] = path.open("a", encoding="utf-8", buffering=1)
            if is_cut:
                file.write("\n")
        file.write(line)

    def number(self, model: int) -> int:
        """Of a model of the command, among all."""
        return self._first_model + model

    def close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # of a disk that is full, which was told of
                file.close()


def _is_cut(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def follow(stream: TextIO, logs: Logs, verbose: bool) -> tuple[collections.deque[str], bool]:
    """Store and show every line until the stream ends.

    Returns:
        the last lines as they came, to be shown if the command failed; whether it went on from checkpoints, and trained
        nothing.
    """
    goes_on = has_trained = False
    last_lines: collections.deque[str] = collections.deque(maxlen=NUM_LAST_LINES)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a letter that the locale lacks ends no training
    for line in stream:
        last_lines.append(line)
        label = LABEL.match(line)
        model, rank = (int(label.group(1)), int(label.group(2) or 0)) if label else (0, 0)
        text = line[label.end() :] if label else line
        if said := LAUNCH.match(line):
            logs.write(int(said.group(1)), 0, f"[launch] model {logs.number(int(said.group(1)))}{said.group(2)}")
        elif not line.startswith("[launch]"):
            logs.write(model, rank, text)
        parsed = parse_line(text)
        short = shorten(*parsed) if parsed else None
        goes_on = goes_on or GOES_ON.search(text) is not None
        has_trained = has_trained or "| vision.log | train: " in text or (parsed is not None and parsed[0] != "valid")
        if verbose:
            print(line, end="", flush=True)
        elif short:
            print(f"model {logs.number(model)}  {short}", flush=True)
        elif ALWAYS_SHOWN.search(text) or GOES_ON.search(text):
            print(line, end="", flush=True)
    return last_lines, goes_on and not has_trained


def end_with_parent() -> None:
    """SIGTERM when the script that started this dies, however it does: the training saves, and is not left alone."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has it
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def main() -> None:
    """Run the command after ``--`` and exit as it did."""
    parser = argparse.ArgumentParser(description="Run a training command with a log per model.")
    parser.add_argument("--log-dir", type=Path, required=True, help="logs go to LOG_DIR/<model>/train.log")
    parser.add_argument("--first-model", type=int, default=0, help="number of the folder of model 0; 0")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command; put it after --")
    end_with_parent()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    # Ctrl-C reaches the command by itself; SIGTERM reaches only us. Either way its last lines are still read.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    logs = Logs(args.log_dir, args.first_model)
    assert process.stdout is not None
    try:
        last_lines, is_over = follow(process.stdout, logs, os.environ.get("VERBOSE", "0") != "0")
    except BaseException:  # such as a screen that is gone: what nobody sees is not left running
        process.terminate()
        process.stdout.close()
        process.wait()
        raise
    returncode = process.wait()
    logs.close()
    if returncode:
        print("".join(last_lines), file=sys.stderr)
        print(f"training failed; the last lines are above, all of them in {args.log_dir}/*/train.log", file=sys.stderr)
    elif is_over:
        print(
            f"nothing was trained: what is in {args.log_dir} is at its end already; with other settings: another --out"
        )
    sys.exit(returncode if returncode >= 0 else 128 - returncode)


if __name__ == "__main__":
    main()
