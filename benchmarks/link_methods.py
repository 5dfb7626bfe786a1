"""Owns what slow_links.py compares: the methods of each workload, their commands on two hosts, and their bits.

Every method trains the same model on the same batches a device, one device a host. Bits are those that a device sends
for an update. Of all_reduce over n devices that is 2 (n − 1) / n · b_model: with two b_model, half of what the paper's
formula for many devices says.
"""

import dataclasses
import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from links import Host

import fairseq_codistill
from fairseq_codistill.launch.traffic import powersgd_numbers

USER_DIR = str(Path(fairseq_codistill.__file__).parent)
HERE = Path(__file__).parent
PERIOD = 10  # updates between two averages of local SGD and of DiLoCo
POWERSGD_RANK = 2
NUM_DEVICES = 2


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: in the table.
        family: alone, all_reduce, diloco or codistill.
        options: of codistillation, or of the way of averaging.
        period: updates after which the traffic repeats; a measurement takes a multiple of it.
    """

    name: str
    family: str
    options: tuple[str, ...] = ()
    period: int = 1

    @property
    def patience(self) -> float:
        """What the seconds for a measurement are multiplied by, so that a long period fits into them."""
        return max(1.0, self.period / 20)

    @property
    def is_beside(self) -> bool:
        """Whether it sends beside the training, which waits for nothing."""
        return "checkpoints" in self.options


def codistilled(name: str, codec: str, interval: int, *more: str) -> Method:
    """Codistillation with ``codec`` at every ``interval``-th update."""
    options = ("--codistill-codec", codec, "--codistill-interval", str(interval), *more)
    return Method(name, "codistill", options, interval)


def _checkpoints(interval: int) -> Method:
    return codistilled(
        f"codistillation, checkpoints, T = {interval}", "fp32", interval, "--codistill-exchange", "checkpoints"
    )


def _parts(number: int) -> tuple[str, ...]:
    """Every step in so many parts; a table says what one of them brings."""
    return ("--codistill-parts", str(number))


_AHEAD = "--codistill-lookahead"
_KL = ("--codistill-divergence", "kl")
LIMIT = Method("no communication", "alone")
ALL_REDUCE = Method("DDP all_reduce, fp32", "all_reduce")
_DENSE = {
    "fp32": codistilled("codistillation, fp32, T = 1", "fp32", 1, *_parts(1)),
    "fp16": codistilled("codistillation, fp16, T = 1", "fp16", 1, *_parts(1)),
    "fp16_10": codistilled("codistillation, fp16, T = 10", "fp16", 10),
}
METHODS: dict[str, dict[str, Method]] = {
    "vision": {
        "none": LIMIT,
        "ddp": ALL_REDUCE,
        "ddp_fp16": Method("DDP, fp16 hook", "all_reduce", ("--comm-hook", "fp16")),
        "powersgd": Method(
            f"DDP, PowerSGD of rank {POWERSGD_RANK}",
            "all_reduce",
            ("--comm-hook", "powersgd", "--powersgd-rank", str(POWERSGD_RANK), "--hook-start", "2"),
        ),
        "local_sgd": Method(
            f"post-local SGD, period {PERIOD}",
            "all_reduce",
            ("--comm-hook", "post_localsgd", "--localsgd-period", str(PERIOD), "--hook-start", "0"),
            PERIOD,
        ),
        "diloco": Method(f"DiLoCo (torchft), period {PERIOD}", "diloco", (f"{PERIOD}",), PERIOD),
        # As their papers recommend; quantised fragments need an accelerator, see diloco.py.
        "diloco_500": Method("DiLoCo (torchft), period 500", "diloco", ("500",), 500),
        "streaming": Method("Streaming DiLoCo (torchft), 4 fragments, period 100", "diloco", ("100/4",), 100),
        **_DENSE,
        "fp16_ahead": codistilled("codistillation, fp16, T = 1, lookahead", "fp16", 1, _AHEAD),
        "columns": codistilled("codistillation, columns:10, T = 1", "columns:10", 1),
        "checkpoints": _checkpoints(50),
    },
    # fairseq trains on the CPU with legacy_ddp alone, which knows neither hooks nor local SGD.
    "translation": {
        "none": LIMIT,
        "ddp": ALL_REDUCE,
        **_DENSE,
        "columns": codistilled("codistillation, columns:64, T = 1", "columns:64", 1),
        **{
            f"fp16_parts{parts}": codistilled(f"codistillation, fp16, T = 1, {parts} parts", "fp16", 1, *_parts(parts))
            for parts in (2, 4)
        },
        "fp16_ahead": codistilled("codistillation, fp16, T = 1, lookahead", "fp16", 1, _AHEAD),
        "tokens": codistilled("codistillation, tokens:16, T = 1", "tokens:16", 1, *_KL, *_parts(1)),
        **{
            f"tokens_parts{parts}": codistilled(
                f"codistillation, tokens:16, T = 1, {parts} parts", "tokens:16", 1, *_KL, *_parts(parts)
            )
            for parts in (2, 4)
        },
        "tokens_auto": codistilled("codistillation, tokens:16, T = 1, parts auto", "tokens:16", 1, *_KL),
        "tokens_ahead": codistilled("codistillation, tokens:16, T = 1, lookahead", "tokens:16", 1, *_KL, _AHEAD),
        "tokens_10": codistilled("codistillation, tokens:16, T = 10", "tokens:16", 10, *_KL),
        "checkpoints": _checkpoints(50),
    },
}


def why_missing(method: Method) -> str:
    """Why a method cannot be measured here; empty where it can."""
    if method.family == "diloco" and importlib.util.find_spec("torchft") is None:
        return "torchft is not installed (pip install torchft)"
    return ""


@dataclasses.dataclass
class Job:
    """One process.

    Attributes:
        command: to run on its host.
        environment: beside that of this process.
        log: JSON lines of vision, or None: fairseq tells its figures in its output.
        speaks: whether it tells anything: of the ranks of a model the first one does.
    """

    command: list[str]
    environment: dict[str, str]
    log: Path | None
    speaks: bool


@dataclasses.dataclass(frozen=True)
class Vision:
    """A timm model on random images."""

    model: str = "resnet18"
    image_size: int = 32
    classes: int = 100
    batch_size: int = 32

    def prepare(self, folder: Path) -> None:
        """Nothing to write: the images are made by the program."""

    def shapes(self) -> list[tuple[int, ...]]:
        """Of the trained parameters."""
        from fairseq_codistill.vision.models import make_model
        from fairseq_codistill.vision.options import parse_options

        config = parse_options(self._options(Path("unused"), 0))
        return [tuple(p.shape) for p in make_model(config, self.classes).parameters() if p.requires_grad]

    def job(self, method: Method, index: int, hosts: list[Host], ports: list[int], folder: Path) -> Job:
        """What host ``index`` runs."""
        out = folder / str(index)
        command = [sys.executable, "-m", "fairseq_codistill.vision.train", *self._options(out, index)]
        environment = {}
        if method.family == "codistill":
            command += codistill_options(method, index, hosts, ports, folder)
        elif method.family == "all_reduce":
            command += method.options
            environment = {
                "RANK": str(index),
                "WORLD_SIZE": str(NUM_DEVICES),
                "MASTER_ADDR": hosts[0].address,
                "MASTER_PORT": str(ports[0]),
                "GLOO_SOCKET_IFNAME": hosts[index].interface,
            }
        elif method.family == "diloco":
            command[1:3] = [str(HERE / "diloco.py"), f"{hosts[0].address}:{ports[0]}", hosts[index].address, str(index)]
            command.insert(5, *method.options)
            # One start, other batches: what the models learn from each other's shards is averaged.
            command += ["--seed", "1", "--codistill-data-seed", str(index + 1)]
            environment = {"GLOO_SOCKET_IFNAME": hosts[index].interface}
        return Job(command, environment, out / "log.jsonl", method.family != "all_reduce" or index == 0)

    def _options(self, out: Path, index: int) -> list[str]:
        return (
            f"--model {self.model} --dataset fake --fake-classes {self.classes} --image-size {self.image_size} "
            f"--batch-size {self.batch_size} --num-workers 0 --epochs 100000 --eval-epochs 100000 --log-updates 1 "
            f"--cpu --no-progress-bar --seed {index + 1} --save-dir {out}"
        ).split()


@dataclasses.dataclass(frozen=True)
class Translation:
    """A fairseq transformer on sentences of random words, all of one length so that all batches cost the same."""

    dim: int = 256
    layers: int = 3
    vocabulary: int = 6000
    max_tokens: int = 512
    sentences: int = 12000
    words: int = 15

    def prepare(self, folder: Path) -> None:
        """Write sentences and binarise them into ``folder/bin``."""
        generator = random.Random(0)
        words = [f"w{number}" for number in range(self.vocabulary - 4)]  # beside fairseq's own four symbols
        for split, count in (("train", self.sentences), ("valid", 20)):
            for language in ("de", "en"):
                lines = [" ".join(generator.choices(words, k=self.words)) for _ in range(count)]
                (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")
        (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
        command = (
            f"{sys.executable} -m fairseq_cli.preprocess -s de -t en --srcdict {folder}/dict.txt --joined-dictionary"
        )
        command += f" --trainpref {folder}/train --validpref {folder}/valid --destdir {folder}/bin --workers 1"
        subprocess.run(command.split(), check=True, capture_output=True)

    def job(self, method: Method, index: int, hosts: list[Host], ports: list[int], folder: Path) -> Job:
        """What host ``index`` runs."""
        command = [sys.executable, "-m", "fairseq_cli.train", str(folder.parent / "bin"), *self._options(index)]
        if method.family == "codistill":
            command += f"--user-dir {USER_DIR} --task codistill_translation --criterion codistillation".split()
            command += codistill_options(method, index, hosts, ports, folder)
        else:
            command += "--task translation --criterion label_smoothed_cross_entropy".split()
        if method.family == "all_reduce":
            command += (
                f"--distributed-no-spawn --distributed-init-method tcp://{hosts[0].address}:{ports[0]} "
                f"--distributed-world-size {NUM_DEVICES} --distributed-rank {index} --distributed-backend gloo "
                "--ddp-backend legacy_ddp"
            ).split()
        speaks = method.family != "all_reduce" or index == 0
        return Job(command, {"GLOO_SOCKET_IFNAME": hosts[index].interface}, None, speaks)

    def shapes(self) -> list[tuple[int, ...]]:
        """Not needed: there is no PowerSGD here; the number of parameters is read from fairseq's output."""
        return []

    def _options(self, index: int) -> list[str]:
        size = f"embed-dim {self.dim}", f"ffn-embed-dim {4 * self.dim}", f"layers {self.layers}", "attention-heads 4"
        sizes = " ".join(f"--{side}-{setting}" for side in ("encoder", "decoder") for setting in size)
        return (
            f"--arch transformer_iwslt_de_en --share-all-embeddings {sizes} --label-smoothing 0.1 --dropout 0.1 "
            f"--optimizer adam --lr 1e-4 --max-tokens {self.max_tokens} --required-batch-size-multiple 1 --cpu "
            f"--num-workers 0 --log-format json --log-interval 1 --no-progress-bar --no-save --disable-validation "
            f"--max-epoch 100000 --seed {index + 1} --source-lang de --target-lang en"
        ).split()


def codistill_options(method: Method, index: int, hosts: list[Host], ports: list[int], folder: Path) -> list[str]:
    """The options of model ``index`` in a run of two, with the keys in ``folder/keys`` where they are needed."""
    addresses = ",".join(f"{host.address}:{port}" for host, port in zip(hosts, ports, strict=True))
    common = f"--codistill-num-models 2 --codistill-model-index {index} --codistill-addresses {addresses}".split()
    keys = ["--codistill-keys", str(folder / "keys")] if (folder / "keys").is_dir() else []
    return [*common, *keys, *method.options]


def all_reduce_bits(method: Method, num_parameters: int, shapes: Iterable[tuple[int, ...]]) -> float:
    """What one of two devices sends for an update, by the formula: for methods that average gradients or parameters."""
    share = 2 * (NUM_DEVICES - 1) / NUM_DEVICES
    if "powersgd" in method.options:
        return share * 32 * sum(powersgd_numbers(shape, POWERSGD_RANK) for shape in shapes)
    width = 16 if "fp16" in method.options else 32
    return share * num_parameters * width / method.period
