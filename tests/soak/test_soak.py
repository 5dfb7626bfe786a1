"""Half an hour of random faults: three models on hosts of their own, each killed, stopped, cut off or restarted again
and again. Not part of the suite; run it with::

    SOAK_OUT=soak python -m pytest -m soak tests/soak

``SOAK_MINUTES`` (30), ``SOAK_FAULTS`` (``kill,stop,cut,restart``; empty: none, for comparison), ``SOAK_GAP_S``
(``20,60``: seconds between two faults, from and to), ``SOAK_SEED`` and ``SOAK_PARTS`` (1) change it, and beside
other work ``SOAK_STALLED_S`` (100: so long without a line is a hang) and ``SOAK_BLEU`` (60: at least). With
``SOAK_RELAY=1`` the models meet at a relay on a host of its own, and ``relay`` is a fault too: it is killed and
started again. ``SOAK_OUT`` keeps the logs and ``report.json``. Root is needed for the hosts, which are network
namespaces.
"""

import ast
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import USER_DIR, environment
from relaying import Relay, key_set

from fairseq_codistill.coordinator.mailbox import CAPACITY
from fairseq_codistill.fairseq_side import compat

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]

NUM_MODELS = 3
PORT = 29600
TIMEOUT_S = 10
PARTS = os.environ.get("SOAK_PARTS", "1")
REPOSITORY = Path(__file__).parents[2]
SETTINGS = (
    "--cpu --source-lang de --target-lang en --arch transformer_iwslt_de_en --share-all-embeddings --encoder-layers 2 "
    "--decoder-layers 2 --encoder-embed-dim 64 --decoder-embed-dim 64 --encoder-ffn-embed-dim 128 "
    "--decoder-ffn-embed-dim 128 --encoder-attention-heads 4 --decoder-attention-heads 4 --dropout 0.1 "
    "--optimizer adam --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 300 --max-tokens 1024 --num-workers 0 "
    "--required-batch-size-multiple 1 --no-progress-bar --log-format json --log-interval 20 --no-epoch-checkpoints "
    "--save-interval-updates 100 --keep-interval-updates 1 --task codistill_translation --criterion codistillation "
    f"--codistill-divergence kl --codistill-timeout {TIMEOUT_S} --codistill-start-timeout 60 "
    "--codistill-require-peers never"
).split()


def run(*command):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True, env=environment()
    )


def make_data(folder):
    """Binarised data of the embedded corpus, the size of the demo's."""
    run(sys.executable, "-m", "fairseq_codistill.demo.corpus", "--out", folder / "raw", "--num-train", 3000)
    bpe = REPOSITORY / "recipes/tools/bpe.py"
    run(sys.executable, bpe, "--raw", folder / "raw", "--out", folder / "bpe", "--languages", "de", "en",
        "--vocab-size", 600)  # fmt: skip
    prefixes = [word for split in ("train", "valid", "test") for word in (f"--{split}pref", folder / "bpe" / split)]
    run(sys.executable, "-m", "fairseq_cli.preprocess", "-s", "de", "-t", "en", "--joined-dictionary", *prefixes,
        "--destdir", folder / "bin")  # fmt: skip
    return folder / "bin"


@pytest.fixture
def hosts():
    """A network namespace a model and one for a relay, all on one switch; yields the prefix of commands there, and what
    cuts the cable of a model."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    switch, *names = [f"soak{os.getpid()}{name}" for name in ("s", *range(NUM_MODELS + 1))]
    try:
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        for model, name in enumerate(names):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{model}", "netns", switch)
            run("ip", "-n", switch, "link", "set", f"p{model}", "master", "br0", "up")
            run("ip", "-n", name, "addr", "add", f"10.78.0.{model + 1}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield (
            [["ip", "netns", "exec", name] for name in names],
            lambda model, state: run("ip", "-n", names[model], "link", "set", "eth0", state),
        )
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


class Model:
    """One model that is started again whenever a fault has ended it."""

    def __init__(self, index, data, out, minutes, prefix, where):
        self.index, self.folder, self.log = index, out / str(index), out / f"{index}.log"
        self.command = [
            *prefix, sys.executable, "-m", "fairseq_cli.train", str(data), "--user-dir", USER_DIR, *SETTINGS,
            "--seed", str(index + 1), "--save-dir", str(self.folder), "--stop-time-hours", str(minutes / 60),
            "--codistill-num-models", str(NUM_MODELS), "--codistill-model-index", str(index),
            "--codistill-parts", PARTS, *where,
        ]  # fmt: skip
        self.num_starts = 0
        self.start()

    def start(self):
        self.num_starts += 1
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
            )

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def stalled_s(self):
        """Seconds since it last wrote a line."""
        return time.time() - self.log.stat().st_mtime


def do_fault(kind, model, generator, set_link, relay):
    """One fault from its beginning to its end; returns what was done."""
    for_s = generator.uniform(2, 25)  # often longer than the timeout of the others
    if kind == "relay":
        relay.kill()
        time.sleep(for_s)
        relay.start()
    elif kind == "cut":
        set_link(model.index, "down")
        time.sleep(for_s)
        set_link(model.index, "up")
    elif kind == "stop":
        model.signal(signal.SIGSTOP)
        time.sleep(for_s)
        model.signal(signal.SIGCONT)
    else:
        model.signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        model.process.wait()
        time.sleep(for_s)
        model.start()
    return {"kind": kind, "model": model.index, "for_s": round(for_s, 1)}


def bleu(data, model, out):
    """sacreBLEU of the test split, beam 5, without --user-dir where torch allows it."""
    text = run(
        sys.executable, "-m", "fairseq_cli.generate", data, "--cpu", "--user-dir", USER_DIR, "--task", "translation",
        "-s", "de", "-t", "en", "--path", model.folder / "checkpoint_best.pt", "--beam", 5, "--remove-bpe",
        "sentencepiece", "--scoring", "sacrebleu", "--max-tokens", 2000,
    ).stdout  # fmt: skip
    (out / f"generate.{model.index}.txt").write_text(text)
    return float(re.findall(r"BLEU\S* = ([\d.]+)", text)[-1])


def closings(log):
    """(traffic, by peer) of every process of a model that ended by itself."""
    found = re.findall(r"codistillation: closed \(.*?\); traffic: (\{.*?\}); by peer: (\{.*\})", log)
    return [(ast.literal_eval(traffic), ast.literal_eval(by_peer)) for traffic, by_peer in found]


def test_half_an_hour_of_random_faults(tmp_path, hosts):
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    kinds = [kind for kind in os.environ.get("SOAK_FAULTS", "kill,stop,cut,restart").split(",") if kind]
    stalled_s = float(os.environ.get("SOAK_STALLED_S", 4 * TIMEOUT_S + 60))
    gap_s = [float(number) for number in os.environ.get("SOAK_GAP_S", "20,60").split(",")]
    generator = random.Random(int(os.environ.get("SOAK_SEED", "1")))
    out = Path(os.environ.get("SOAK_OUT", tmp_path)).absolute()
    out.mkdir(parents=True, exist_ok=True)
    data = make_data(out / "data")
    prefixes, set_link = hosts
    where = ["--codistill-addresses", ",".join(f"10.78.0.{model + 1}:{PORT}" for model in range(NUM_MODELS))]
    where += ["--codistill-keys", "none"]
    relay = None
    if os.environ.get("SOAK_RELAY"):
        keys, host = key_set(out / "keys", NUM_MODELS), f"10.78.0.{NUM_MODELS + 1}"
        relay = Relay(PORT, [keys], out / "relay.log", prefix=prefixes[NUM_MODELS], bind=host)
        relay.start()
        where = ["--codistill-relay", relay.address, "--codistill-keys", str(keys)]
    assert relay is not None or "relay" not in kinds, "SOAK_FAULTS has relay, and SOAK_RELAY is not set"
    models = [Model(index, data, out, minutes, prefixes[index], where) for index in range(NUM_MODELS)]
    started, faults = time.time(), []
    try:
        while time.time() - started < 60 * minutes * 0.9:
            time.sleep(generator.uniform(*gap_s) if kinds else 20)
            for model in models:
                assert model.process.poll() is None, f"model {model.index} ended; see {model.log}"
                assert model.stalled_s() < stalled_s, f"model {model.index} hangs; see {model.log}"
            if kinds:
                at = time.time() - started
                fault = do_fault(generator.choice(kinds), generator.choice(models), generator, set_link, relay)
                faults.append({"at_s": round(at), **fault})
                with (out / "faults.jsonl").open("a") as log:
                    log.write(json.dumps(faults[-1]) + "\n")
        for model in models:  # a model that lost time to faults makes up for it
            assert model.process.wait(timeout=60 * (minutes + 5)) == 0, f"see {model.log}"
    finally:
        for model in models:
            with contextlib.suppress(ProcessLookupError):
                model.signal(signal.SIGKILL)
            model.process.wait()
        if relay is not None:
            relay.kill()
    report = {
        "minutes": round((time.time() - started) / 60, 1),
        "faults": {kind: sum(fault["kind"] == kind for fault in faults) for kind in kinds},
        "starts": [model.num_starts for model in models],
        "bleu": [bleu(data, model, out) for model in models],
    }
    logs = [model.log.read_text() for model in models]
    report["skipped_updates"] = [sum(map(int, re.findall(r"skipped (\d+) updates' worth", log))) for log in logs]
    report["updates"] = [int(re.findall(r'"train_num_updates": "(\d+)"', log)[-1]) for log in logs]
    report["away"] = [len(re.findall(r"is away \(was present\)", log)) for log in logs]
    report["back"] = [len(re.findall(r"is present \(was away\)", log)) for log in logs]
    report["traffic_of_the_last_process"] = [closings(log)[-1][0] for log in logs]
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    check_messages([closings(log) for log in logs])
    compat.apply()
    for model in models:
        for checkpoint in model.folder.glob("*.pt"):
            assert torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    assert min(report["bleu"]) > float(os.environ.get("SOAK_BLEU", "60"))
    assert "misaligned" not in "".join(logs)


def check_messages(ends_of_models):
    """Every message is accounted for: what came is used, stale or refused; what was sent came or is lost."""
    for ends in ends_of_models:
        for traffic, _ in ends:
            used = sum(traffic[f"{what}_messages"] for what in ("delivered", "stale", "rejected", "control"))
            assert 0 <= traffic["received_messages"] - used <= CAPACITY * int(PARTS) * (NUM_MODELS - 1)
    last = [ends[-1][1] for ends in ends_of_models]
    for sender in range(NUM_MODELS):
        for receiver in range(NUM_MODELS):
            if sender != receiver and last[receiver][sender]["highest"]:
                came = last[receiver][sender]
                assert came["received"] + came["lost"] == came["highest"] - came["first"] + 1
                # of the sender's last process, or of one before it whose successor the receiver did not live to meet
                assert came["highest"] <= max(end[receiver]["sent"] for _, end in ends_of_models[sender])
