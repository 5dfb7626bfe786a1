"""docs/your_own_loop.md: its loop trains real processes, its fragments run, its errors are those that are raised."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from helpers import environment, free_ports, run_together
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fairseq_codistill import Codistiller, CoordinatedBatches
from fairseq_codistill.testing import simulate
from fairseq_codistill.testing.stage import Stage

TEXT = (Path(__file__).parents[2] / "docs" / "your_own_loop.md").read_text()
WHOLE, *FRAGMENTS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(ON_SIGNAL,) = (fragment for fragment in FRAGMENTS if "import signal" in fragment)  # of a process, not of a thread
FRAGMENTS.remove(ON_SIGNAL)
WITH_WORKERS = "worker_init_fn=ignore_signals"  # as the page says
assert WITH_WORKERS in TEXT
ERRORS = re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE)
SETTINGS = {4: {"exchange": "checkpoints", "codec": "fp32", "interval": 2, "replica_wait": True}, 2: {"update_freq": 4}}


def test_the_loop_of_the_page_trains_two_processes(tmp_path):
    (tmp_path / "train.py").write_text(WHOLE)
    launch = [sys.executable, "-m", "fairseq_codistill.launch.cli", "--num-models", "2", "--", sys.executable]
    commands = [[*launch, str(tmp_path / "train.py")], [sys.executable, str(tmp_path / "train.py")]]
    together, alone = run_together(commands, 240, environment())
    assert (together.returncode, alone.returncode) == (0, 0), together.output + alone.output
    for model in (0, 1):
        assert len(re.findall(rf"^\[model {model}\] .*'codistill_peers': 1\.0", together.output, re.MULTILINE)) == 3
    assert alone.output.count("'codistill_peers': 0.0") == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loop_that_takes_sigterm_as_the_page_says_ends_its_wait_for_a_peer(tmp_path, num_workers):
    step = "            optimizer.zero_grad()\n"
    said = "            if batches.elapsed == 3:\n                print('trains', flush=True)\n"
    text = WHOLE.replace("batches.epoch <= 3", "not asked").replace(step, step + said + "            if asked: break\n")
    text = text.replace("    while not asked", textwrap.indent(ON_SIGNAL, "    ") + "    while not asked")
    text = text.replace("batch_sampler=batches)", f"batch_sampler=batches, {WITH_WORKERS}, num_workers={num_workers})")
    start = "import faulthandler, logging, sys\nfaulthandler.enable()\n"
    start += "from fairseq_codistill.workers import ignore_signals\n"
    start += "logging.basicConfig(level=logging.INFO)\n"
    (tmp_path / "train.py").write_text(f"{start}{text}print('saved', flush=True)\nsys.exit(128 + asked[0])\n")
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    outputs, started = [tmp_path / str(index) for index in range(2)], []
    try:
        for index, output in enumerate(outputs):
            place = {"CODISTILL_MODEL_INDEX": str(index), "CODISTILL_ADDRESSES": addresses}
            command, env = [sys.executable, str(tmp_path / "train.py")], environment(CODISTILL_NUM_MODELS="2", **place)
            with output.open("wb") as file:
                started.append(Popen(command, stdout=file, stderr=file, env=env, start_new_session=True))
        wait_until(lambda: all("trains" in output.read_text() for output in outputs))
        os.killpg(started[1].pid, signal.SIGSTOP)  # for 300 s, the timeout, the other would wait for it
        time.sleep(1)
        os.killpg(started[0].pid, signal.SIGTERM)  # all of the job, as schedulers do
        assert code_of(started[0]) == 128 + signal.SIGTERM, outputs[0].read_text()
        os.killpg(started[1].pid, signal.SIGCONT)
        wait_until(lambda: "goodbye: stopped by SIGTERM" in outputs[1].read_text())
        os.killpg(started[1].pid, signal.SIGTERM)
        assert code_of(started[1]) == 128 + signal.SIGTERM, outputs[1].read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert all("saved" in output.read_text() for output in outputs)


def code_of(process, seconds=60):
    """One that does not end says where it is."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        return process.wait(10)


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds} s"
        time.sleep(0.05)


def play(fragment, model_index, addresses, settings, found):
    """What the page takes for given, then a fragment of it."""
    inputs = torch.randn(90, 20, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(inputs, inputs[:, :5].argmax(1), torch.arange(90))
    batches = CoordinatedBatches(90, 10)
    model = nn.Linear(20, 5)
    names = {
        "torch": torch, "nn": nn, "Codistiller": Codistiller, "device": "cpu", "PAD": 0,
        "batches": batches, "loader": DataLoader(dataset, batch_sampler=batches), "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "language_model": nn.Sequential(nn.Embedding(7, 20), model),
        "tokens": torch.ones(3, 4, dtype=torch.int64), "next_tokens": torch.arange(12).view(3, 4) % 5, "ids": range(3),
    }  # fmt: skip
    place = {"num_models": 2, "model_index": model_index, "addresses": addresses, "timeout": 30.0}
    try:
        with Codistiller(**place, start_timeout=30.0, **settings) as peers:
            peers.meet(model, names["loader"], seed=model_index)
            exec(compile(fragment, "your_own_loop.md", "exec"), names | {"peers": peers})
            found[model_index] = peers.figures()
    except BaseException as error:
        found[model_index] = error


@pytest.mark.parametrize("number", range(len(FRAGMENTS)))
def test_a_fragment_of_the_page_runs_with_two_models(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what it saves is saved here
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    found: dict = {}
    threads = [
        threading.Thread(target=play, args=(FRAGMENTS[number], i, addresses, SETTINGS.get(number, {}), found))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for figures in (found[0], found[1]):
        assert isinstance(figures, dict), figures
        assert figures["codistill_peers"] == (0.0 if "torch.save" in FRAGMENTS[number] else 1.0)
        assert figures["codistill_skipped"] == 0.0


def logits():
    return torch.zeros(4, 3, requires_grad=True)


def alone(model=None):
    peers = Codistiller()
    peers.meet(model or nn.Linear(2, 2))
    return peers


def run(make_model=lambda index: nn.Linear(4, 3), **settings):
    data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    return simulate(
        2, make_model, data, batch_size=4, num_updates=6, **settings,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip


def without_gradient():
    with torch.no_grad():
        alone().loss(logits(), TARGETS, range(4))


def twice():
    peers = alone()
    for _ in range(2):
        peers.loss(logits(), TARGETS, range(4), position=0)


def another_batch_again():
    def play(index, transport):
        place = {"num_models": 2, "model_index": index, "addresses": "memory:0,memory:1"}
        peers = Codistiller(**place, transport=transport)
        torch.manual_seed(index)
        peers.meet(nn.Linear(2, 3))
        yield
        peers.loss(logits(), TARGETS, range(4))
        peers.loss(logits(), TARGETS, range(4, 8), again=True)

    Stage(play, 2).play(2)


def twins():
    def make_model(index):
        torch.manual_seed(1)
        return nn.Linear(4, 3)

    run(make_model)


def other_architectures():
    run(lambda index: nn.Linear(4, 3, bias=index == 0), exchange="checkpoints", codec="fp32")


def other_data():
    """Each model's samples have targets of their own."""
    run_with_other_targets = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))

    class Mine(nn.Linear):
        def forward(self, inputs):
            run_with_other_targets.tensors[1].add_(1).remainder_(3)  # as if the files were not the same
            return super().forward(inputs)

    simulate(
        2, lambda index: Mine(4, 3), run_with_other_targets, batch_size=4, num_updates=6,
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip


def without_forward():
    def play(index, transport):
        place = {"num_models": 2, "model_index": index, "addresses": "memory:0,memory:1"}
        peers = Codistiller(**place, exchange="checkpoints", codec="fp32", transport=transport)
        torch.manual_seed(index)
        peers.meet(nn.Linear(2, 3))
        yield
        peers.loss(logits(), TARGETS, range(4))

    Stage(play, 2).play(2)


def nobody_there():
    addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
    with Codistiller(num_models=2, model_index=0, addresses=addresses, start_timeout=0.3) as peers:
        peers.meet(nn.Linear(2, 2))


TARGETS = torch.tensor([0, 1, 2, 0])
SHUFFLED = DataLoader(TensorDataset(torch.zeros(4)), shuffle=True)
CAUSES = {
    "it must be 2 HOST:PORT entries": lambda: Codistiller(num_models=2),
    "met none of the other models": nobody_there,
    "start from identical parameters": twins,
    "do not fit together; make equal": other_architectures,
    "draws its batches with RandomSampler": lambda: Codistiller().meet(nn.Linear(2, 2), SHUFFLED),
    "batches in a row differ": other_data,
    "call meet(model, batches) before": lambda: Codistiller().loss(logits(), TARGETS, range(4)),
    "is not the one whose predictions were sent": another_batch_again,
    "was asked for before": twice,
    "gradients are off": without_gradient,
    "the classes come last": lambda: alone().loss(logits().flatten(), TARGETS, range(4)),
    "they must be whole numbers": lambda: alone().loss(logits(), TARGETS, torch.rand(4)),
    "whose copies predict every batch": without_forward,
    "is no setting of codistillation": lambda: Codistiller(num_modles=2),
}


@pytest.mark.parametrize("message", ERRORS)
def test_an_error_of_the_page_is_one_that_is_raised(message):
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        CAUSES[message]()


def test_the_page_lists_errors_and_fragments():
    assert set(ERRORS) == set(CAUSES)
    assert len(FRAGMENTS) == 7
