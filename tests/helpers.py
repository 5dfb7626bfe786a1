"""What the tests share: a toy corpus, command lines, and running several real processes at once."""

import collections
import dataclasses
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import preloaded

import fairseq_codistill

USER_DIR = str(Path(fairseq_codistill.__file__).parent)
RECORDER = str(Path(__file__).parent / "distributed" / "recording_train.py")
ENGLISH = "zero one two three four five six seven eight nine".split()
GERMAN = "null eins zwei drei vier fuenf sechs sieben acht neun".split()
TINY_MODEL = (
    "--arch transformer_iwslt_de_en --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 "
    "--decoder-embed-dim 32 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32 --encoder-attention-heads 2 "
    "--decoder-attention-heads 2 --share-all-embeddings"
).split()
COMMON = (
    "--cpu --source-lang en --target-lang de --optimizer adam --lr 0.005 --max-tokens 200 --num-workers 0 "
    "--required-batch-size-multiple 1 --no-epoch-checkpoints --no-progress-bar --log-format json --log-interval 1"
).split()


def make_toy_data(
    folder: Path,
    num_train: int = 200,
    seed: int = 0,
    extra_words: Sequence[str] = (),
    shift: int = 0,
    dictionary: Path | None = None,
) -> Path:
    """Write and binarise sentences of digit words; returns fairseq's data folder.

    ``shift`` gives other sentences of the same lengths; ``dictionary`` is the data folder whose symbols to reuse.
    """
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", num_train), ("valid", 20), ("test", 20)):
        english, german = [], []
        for line in range(size):
            digits = [(generator.randrange(10) + shift) % 10 for _ in range(generator.randint(3, 8))]
            extra = [extra_words[line % len(extra_words)]] if extra_words else []
            english.append(" ".join([ENGLISH[d] for d in digits] + extra))
            german.append(" ".join([GERMAN[d] for d in digits] + extra))
        (folder / f"{split}.en").write_text("\n".join(english) + "\n")
        (folder / f"{split}.de").write_text("\n".join(german) + "\n")
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "-s", "en", "-t", "de"]
    if dictionary is None:
        command.append("--joined-dictionary")
    else:
        command += ["--srcdict", str(dictionary / "dict.en.txt"), "--tgtdict", str(dictionary / "dict.de.txt")]
    for split in ("train", "valid", "test"):
        command += [f"--{split}pref", str(folder / split)]
    (result,) = run_together([[*command, "--destdir", str(folder / "bin")]], 120)
    assert result.returncode == 0, result.output
    return folder / "bin"


NUM_PARTS = int(os.environ.get("TEST_PARTS", "1"))
PARTS_OPTION = ["--codistill-parts", str(NUM_PARTS)] if NUM_PARTS > 1 else []  # otherwise the default, auto


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, no warnings from libraries, output as it comes."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", **extra}


def train_command(data: Path, save_dir: Path, *extra: str) -> list[str]:
    """Plain fairseq-train of the tiny model."""
    return [
        sys.executable, "-m", "fairseq_cli.train", str(data), *COMMON, *TINY_MODEL, "--save-dir", str(save_dir), *extra
    ]  # fmt: skip


def codistill_command(data: Path, save_dir: Path, model_index: int, addresses: str, *extra: str) -> list[str]:
    """One model of a codistilled run; ``extra`` wins.

    ``TEST_PARTS=2 pytest tests/distributed`` cuts the batches of these runs where the test says nothing.
    """
    num_models = max(1, len([a for a in addresses.split(",") if a]))
    return train_command(
        data, save_dir, "--user-dir", USER_DIR, "--task", "codistill_translation", "--criterion", "codistillation",
        "--codistill-num-models", str(num_models), "--codistill-model-index", str(model_index),
        "--codistill-addresses", addresses, *PARTS_OPTION, *extra,
    )  # fmt: skip


def recorded_command(command: list[str], losses: Path) -> list[str]:
    """The same fairseq-train, with every training loss of this rank, unrounded, written to ``losses`` (JSON)."""
    assert command[1:3] == ["-m", "fairseq_cli.train"]
    return [sys.executable, RECORDER, str(losses), *command[3:]]


def load_checkpoint(path: Path) -> dict:
    """What fairseq saved, read with ``weights_only`` where that is this torch's default."""
    import torch

    from fairseq_codistill.fairseq_side import compat

    compat.apply()
    return torch.load(path, map_location="cpu")


def gloo_ranks(command: list[str], world_size: int, port: int) -> list[list[str]]:
    """``command`` once a rank, as data-parallel training on the CPU needs it."""
    flags = (
        f"--distributed-no-spawn --distributed-init-method tcp://127.0.0.1:{port} --distributed-world-size "
        f"{world_size} --distributed-backend gloo --ddp-backend legacy_ddp --distributed-rank"
    ).split()
    return [[*command, *flags, str(rank)] for rank in range(world_size)]


def spawning(command: list[str], port: int) -> list[str]:
    """``command`` as one process that spawns two ranks itself, as fairseq does on a host with two GPUs."""
    flags = f"--distributed-world-size 2 --distributed-init-method tcp://127.0.0.1:{port} --distributed-backend gloo"
    script = str(Path(__file__).parent / "distributed" / "spawning_train.py")
    return [sys.executable, script, *command[3:], *flags.split(), "--ddp-backend", "legacy_ddp"]


@dataclasses.dataclass
class Result:
    """How a process ended."""

    returncode: int
    output: str


def start(command: list[str], output: str, env: dict[str, str] | None = None) -> "Popen[bytes] | preloaded.Process":
    """Start a process, both outputs to the end of file ``output``."""
    if preloaded.Process.fits(command):
        return preloaded.Process(command, env or environment(), output)
    with open(output, "ab") as file:
        return Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env or environment())


def run_together(
    commands: Sequence[list[str]], timeout_s: float, env: dict[str, str] | Sequence[dict[str, str]] | None = None
) -> list[Result]:
    """Run all commands at once to their ends; kill all and fail when one takes longer than ``timeout_s``.

    ``env`` is the environment of all of them, or one for each.
    """
    files = [tempfile.NamedTemporaryFile() for _ in commands]  # noqa: SIM115 - read after the processes end
    envs = [env] * len(commands) if env is None or isinstance(env, dict) else env
    processes = [start(*each) for each in zip(commands, [file.name for file in files], envs, strict=True)]
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, TimeoutError):
        tails = "\n-----\n".join(_read(file)[-3000:] for file in files)
        raise AssertionError(f"not done in {timeout_s} s; the ends of the outputs:\n{tails}") from None
    finally:  # also when the test is interrupted: nothing is left running
        for process in processes:
            process.kill()
            process.wait()
    return [Result(process.returncode, _read(file)) for process, file in zip(processes, files, strict=True)]


def _read(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def json_logs(output: str, tag: str) -> list[dict[str, float]]:
    """fairseq's JSON log lines of one kind (``train_inner``, ``train``, ``valid``), values as floats."""
    lines = re.findall(rf"\| {tag} \| (\{{.*\}})", output)
    return [{key: float(value) for key, value in json.loads(line).items() if value is not None} for line in lines]


def _ports_of_worker() -> range:
    """Those of this process, where pytest-xdist has several run tests at once."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    width = 12000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return range(20000 + worker * width, 20000 + (worker + 1) * width)


_given_out: collections.deque[int] = collections.deque(maxlen=400)  # whoever asked for them may not listen there yet


def free_ports(num_ranges: int, size: int = 1) -> list[int]:
    """First ports of ``num_ranges`` ranges of ``size`` ports each that nobody listens on, nor was given lately."""
    found: list[int] = []
    generator, ports = random.Random(), _ports_of_worker()
    while len(found) < num_ranges:
        base = generator.randrange(ports.start, ports.stop - size)
        taken = range(base, base + size + 1)  # and one between two ranges
        if not set(taken) & set(_given_out) and all(_is_free(base + offset) for offset in range(size)):
            found.append(base)
            _given_out.extend(taken)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
