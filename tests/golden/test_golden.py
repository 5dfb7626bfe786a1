"""Twenty updates of every way to codistil, in real processes, against what they were when *.json here was written.

A change that should change nothing (moved files, another class) must leave every loss and every parameter what it was,
bit for bit. A change that means to change them rewrites the records, and shows in their diff what it changed::

    pytest tests/golden --rewrite-golden

Bits depend on the machine, so each record names the one that made it: torch, the instructions it uses, the processor.
On that kind of machine everything is compared bit for bit. On another one nothing is skipped: losses and figures must
agree to LOSS_TOLERANCE, the size of each model's parameters to PARAMETERS_TOLERANCE, and a warning says that it was so.
Between torch, oneDNN and MKL with AVX-512 and the same three without vector instructions, all of these runs differ by
at most 3e-4 and 1e-5. To compare bit for bit on another kind of machine, rewrite on the old commit and run on the new.

All runs have dropout, label smoothing that fades, an epoch's end, and a weight other than 1 that grows there, so that
every random number and every factor counts. Only command lines, logs and checkpoints are used, nothing of the package.
"""

import dataclasses
import hashlib
import json
import math
import platform
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from helpers import (
    codistill_command,
    environment,
    free_ports,
    gloo_ranks,
    json_logs,
    load_checkpoint,
    recorded_command,
    run_together,
)
from vision_helpers import codistill_commands, records

FOLDER = Path(__file__).parent
LOSS_TOLERANCE = 1e-3
PARAMETERS_TOLERANCE = 1e-4
NUM_UPDATES = 20
LAST_EXCHANGE = 15  # of every interval here
SECONDS = 250
FIGURES = "codistill_loss codistill_mse codistill_peers".split()
COMMON = (
    f"--codistill-data-seed 7 --codistill-weight 3 --codistill-weight-growth 1.1 --codistill-start-timeout {SECONDS} "
    "--label-smoothing 0.1 --label-smoothing-end 0.02 --label-smoothing-decay-updates 15"
)
TRANSLATION = (
    f"{COMMON} --max-update {NUM_UPDATES} --max-tokens 128 --dropout 0.2 --attention-dropout 0.1 "
    "--activation-dropout 0.1 --optimizer sgd --momentum 0.9 --lr 0.02 --lr-scheduler fixed --clip-norm 1"
)
VISION = (
    f"{COMMON} --max-updates {NUM_UPDATES} --batch-size 96 --drop-rate 0.2 --augmentation cifar --weight-decay 5e-3 "
    "--lr 0.005 --lr-batch-size 0 --lr-schedule cosine --epochs 2 --warmup-epochs 0.5 --warmup-lr 0.001"
)


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to codistil: a name, how many models on how many ranks each, and what it adds to the settings."""

    name: str
    num_models: int
    settings: str
    num_ranks: int = 1


TRANSLATION_FORMS = [
    Form("fp32, three models", 3, "--codistill-codec fp32"),
    Form("fp16, interval 5, sentence average", 2, "--codistill-codec fp16 --codistill-interval 5 --sentence-avg"),
    Form("bf16, kl, burn-in 6", 2, "--codistill-codec bf16 --codistill-divergence kl --codistill-burn-in 6"),
    # Columns are drawn by the name of a batch, and auto has other names.
    Form("columns, update-freq 2", 2, "--codistill-codec columns:6 --update-freq 2 --codistill-parts 1"),
    Form(
        "tokens, kl, interval 5, three models",
        3,
        "--codistill-codec tokens:4 --codistill-divergence kl --codistill-interval 5",
    ),
    Form("topk, kl, over gloo", 2, "--codistill-codec topk:4 --codistill-divergence kl --codistill-transport gloo"),
    Form("topk, two ranks a model", 2, "--codistill-codec topk:4", num_ranks=2),
    Form("int8, update-freq 2, two ranks a model", 2, "--codistill-codec int8 --update-freq 2", num_ranks=2),
    Form(
        "checkpoints, interval 5, three models",
        3,
        "--codistill-exchange checkpoints --codistill-codec fp32 --codistill-interval 5 --codistill-replica-wait",
    ),
    Form(
        "checkpoints in bf16, interval 3, train, update-freq 2, two ranks a model",
        2,
        "--codistill-exchange checkpoints --codistill-codec bf16 --codistill-interval 3 --codistill-replica-wait "
        "--codistill-replica-mode train --update-freq 2",
        num_ranks=2,
    ),
]
VISION_FORMS = [
    Form("fp32, three models", 3, "--codistill-codec fp32"),
    Form("bf16, interval 5", 2, "--codistill-codec bf16 --codistill-interval 5"),
    Form("columns, burn-in 6", 2, "--codistill-codec columns:4 --codistill-burn-in 6"),
    Form("tokens, kl, three models", 3, "--codistill-codec tokens:4 --codistill-divergence kl"),
    Form("topk, kl, over gloo", 2, "--codistill-codec topk:4 --codistill-divergence kl --codistill-transport gloo"),
    Form("int8, two ranks a model", 2, "--codistill-codec int8 --batch-size 48", num_ranks=2),
    Form(
        "checkpoints, interval 5, three models",
        3,
        "--codistill-exchange checkpoints --codistill-codec fp32 --codistill-interval 5 --codistill-replica-wait",
    ),
    Form(
        "checkpoints in bf16, interval 3, eval, two ranks a model",
        2,
        "--codistill-exchange checkpoints --codistill-codec bf16 --codistill-interval 3 --codistill-replica-wait "
        "--codistill-replica-mode eval --codistill-weight 0.5 --batch-size 48",
        num_ranks=2,
    ),
]


def machine() -> str:
    """What the bits of a computation depend on, beside the computation."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = ("vendor_id", "cpu family", "model", "stepping", "model name")
    found = [re.search(rf"^{name}\s*: (.+)$", cpuinfo, re.MULTILINE) for name in names]
    processor = ", ".join(match[0].replace("\t", "") for match in found if match) or platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {platform.machine()}, {processor}"


def figures_of(logs: list[dict], validations: list[dict]) -> dict[str, list[float]]:
    """What one model logged: by name, one value an update or a validation."""
    figures = {name: [log.get(name, 0.0) for log in logs] for name in FIGURES}
    return {**figures, "valid_loss": [log["valid_loss"] for log in validations]}


def model_record(curves: Mapping[str, list[float]], parameters: Mapping[str, torch.Tensor]) -> dict:
    """A model as it is kept: its curves, exact; a digest of all its tensors; and what tells how far another one is."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(parameters.items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    tensors = [tensor.double().view(-1) for tensor in parameters.values() if tensor.is_floating_point()]
    floats = torch.cat(tensors).tolist()  # summed exactly below: torch's sum depends on the number of threads
    return {
        "curves": {name: " ".join(map(repr, map(float, curve))) for name, curve in curves.items()},
        "parameters": {
            "sum": math.fsum(floats),
            "sum of magnitudes": math.fsum(map(abs, floats)),
            "norm": math.sqrt(math.fsum(value * value for value in floats)),
            "digest": digest.hexdigest(),
        },
    }


def ports_of(form: Form) -> tuple[str, list[int]]:
    """Where the models listen, and a port for each where its ranks meet."""
    ports = free_ports(2 * form.num_models, form.num_ranks)
    return ",".join(f"127.0.0.1:{port}" for port in ports[: form.num_models]), ports[form.num_models :]


def train_translation(form: Form, data: Path, folder: Path) -> list[dict]:
    """The models' records after a run of fairseq-train processes."""
    addresses, rendezvous = ports_of(form)
    commands = []
    for model in range(form.num_models):
        command = codistill_command(
            data, folder / str(model), model, addresses, "--seed", str(model + 1), *TRANSLATION.split(),
            *form.settings.split(),
        )  # fmt: skip
        ranks = gloo_ranks(command, form.num_ranks, rendezvous[model]) if form.num_ranks > 1 else [command]
        commands += [recorded_command(each, folder / f"{model}.{rank}.json") for rank, each in enumerate(ranks)]
    results = run_together(commands, SECONDS)
    for result in results:
        assert result.returncode == 0, result.output
    found = []
    for model in range(form.num_models):
        output = results[model * form.num_ranks].output
        curves = {
            f"losses of rank {rank}": json.loads((folder / f"{model}.{rank}.json").read_text())
            for rank in range(form.num_ranks)
        }
        curves.update(figures_of(json_logs(output, "train_inner"), json_logs(output, "valid")))
        checkpoint = load_checkpoint(folder / str(model) / "checkpoint_last.pt")
        found.append(model_record(curves, checkpoint["model"]))
    return found


def train_vision(form: Form, folder: Path) -> list[dict]:
    """The models' records after a run of vision processes."""
    addresses, rendezvous = ports_of(form)
    commands, places = [], []
    models = codistill_commands(folder, addresses, *VISION.split(), *form.settings.split())
    for command, port in zip(models, rendezvous, strict=True):
        for rank in range(form.num_ranks):
            commands.append(command)
            places.append(
                environment(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(form.num_ranks),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )
            )  # fmt: skip
    for result in run_together(commands, SECONDS, places):
        assert result.returncode == 0, result.output
    found = []
    for model in range(form.num_models):
        trained, validated = (records(folder / str(model), kind) for kind in ("train", "valid"))
        curves = {"losses": [record["loss"] for record in trained], **figures_of(trained, validated)}
        checkpoint = torch.load(folder / str(model) / "checkpoint_last.pt", weights_only=True)
        found.append(model_record(curves, checkpoint["model"]))
    return found


def numbers(curves: Mapping[str, str]) -> dict[str, list[float]]:
    """Curves as they are kept -> as they were."""
    return {name: [float(value) for value in curve.split()] for name, curve in curves.items()}


def compare(found: list[dict], golden: dict) -> None:
    """Bit for bit on the kind of machine that wrote ``golden``, else to the tolerances."""
    assert len(found) == len(golden["models"])
    if golden["machine"] == machine():
        for mine, recorded in zip(found, golden["models"], strict=True):
            for name, curve in recorded["curves"].items():
                assert mine["curves"][name] == curve, name
            assert mine == recorded
        return
    warnings.warn(f"not compared bit for bit, but to {LOSS_TOLERANCE}: recorded on {golden['machine']}", stacklevel=2)
    for mine, recorded in zip(found, golden["models"], strict=True):
        curves, expected = numbers(mine["curves"]), numbers(recorded["curves"])
        assert curves.keys() == expected.keys()
        for name, curve in curves.items():
            assert curve == pytest.approx(expected[name], rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE), name
        sizes, known = mine["parameters"], recorded["parameters"]
        for name, unit in (("norm", "norm"), ("sum", "sum of magnitudes"), ("sum of magnitudes", "sum of magnitudes")):
            assert sizes[name] == pytest.approx(known[name], abs=PARAMETERS_TOLERANCE * known[unit]), name


def check(path: Path, form: Form, found: list[dict], request: pytest.FixtureRequest) -> None:
    """Compare with the record, or write it."""
    for record in found:
        peers = numbers(record["curves"])["codistill_peers"]
        assert len(peers) == NUM_UPDATES
        assert peers[LAST_EXCHANGE] == form.num_models - 1
    if not request.config.getoption("--rewrite-golden"):
        compare(found, json.loads(path.read_text())[form.name])
        return
    golden = json.loads(path.read_text()) if path.exists() else {}
    golden[form.name] = {"machine": machine(), "models": found}
    path.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    pytest.skip(f"{path.name} rewritten; read its diff")


def parameters(forms: Sequence[Form], slow: Collection[str]) -> list:
    """Forms as parameters of a test; those of the names ``slow`` are left to ``make test-slow``."""
    assert set(slow) <= {form.name for form in forms}
    return [pytest.param(form, id=form.name, marks=[pytest.mark.slow] * (form.name in slow)) for form in forms]


@pytest.mark.parametrize("form", parameters(TRANSLATION_FORMS, {"topk, two ranks a model", "bf16, kl, burn-in 6"}))
def test_translation_models_learn_what_they_learned_when_it_was_recorded(form, toy_data, tmp_path, request):
    check(FOLDER / "translation.json", form, train_translation(form, toy_data, tmp_path), request)


@pytest.mark.parametrize("form", parameters(VISION_FORMS, {form.name for form in VISION_FORMS if form.num_models > 2}))
def test_vision_models_learn_what_they_learned_when_it_was_recorded(form, tmp_path, request):
    check(FOLDER / "vision.json", form, train_vision(form, tmp_path), request)


@pytest.mark.parametrize(("name", "forms"), [("translation", TRANSLATION_FORMS), ("vision", VISION_FORMS)])
def test_nothing_is_recorded_that_is_not_compared(name, forms):
    assert set(json.loads((FOLDER / f"{name}.json").read_text())) == {form.name for form in forms}
