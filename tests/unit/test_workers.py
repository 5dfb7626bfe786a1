"""Loader workers: nobody but their parent ends them, and they end with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader
from fairseq_codistill.workers import ignore_signals, signals_held

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return torch.tensor([index, os.getpid()])

# a parent's own handler is inherited by a fork: it must not run in a worker
me = os.getpid()
def handler(*_):
    # not print: the signal may come while the parent is printing
    os.write(1, b"SIGTERM in the parent\\n" if os.getpid() == me else b"SIGTERM in the worker\\n")
signal.signal(signal.SIGTERM, handler)
loader = DataLoader(Numbers(), batch_size=1, num_workers=2, worker_init_fn=ignore_signals, persistent_workers=True)
with signals_held():
    batches = iter(loader)
first = [next(batches)[0] for _ in range(2)]
print("workers", *sorted(int(row[1]) for row in first), flush=True)
for line in sys.stdin:
    if line.strip() == "more":
        rows = [next(batches)[0].tolist() for _ in range(20)]
        print("loaded", *sorted({pid for _, pid in rows}), flush=True)
    else:
        break
print("end", flush=True)
"""


@pytest.fixture
def parent():
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def workers_of(process):
    return [int(word) for word in process.stdout.readline().split()[1:]]


def say(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} still run"
        time.sleep(0.02)


def test_workers_load_on_after_signals_to_all_of_a_group(parent):
    workers = workers_of(parent)
    assert len(workers) == 2
    for _ in range(3):
        os.killpg(parent.pid, signal.SIGTERM)
        assert parent.stdout.readline() == "SIGTERM in the parent\n"
        for pid in workers:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        say(parent, "more")
        assert workers_of(parent) == workers
    say(parent, "enough")
    assert parent.wait(60) == 0
    wait_until_gone(workers)


def test_workers_end_with_a_parent_that_is_killed(parent):
    workers = workers_of(parent)
    parent.kill()
    parent.wait()
    wait_until_gone(workers)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_parent_may_end_its_workers_by_a_signal(method, tmp_path):
    """As multiprocessing does at the end of a process that did not close its loader, and then waits for them."""
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing, signal, sys
from fairseq_codistill.workers import ignore_signals

def work(ready):
    ignore_signals()
    ready.set()
    while True:
        signal.pause()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ready = context.Event()
    process = context.Process(target=work, args=(ready,), daemon=True)
    process.start()
    ready.wait()
""")
    assert subprocess.run([sys.executable, str(script), method], timeout=60, check=False).returncode == 0
