"""What one exchange costs a training step at T = 1, part by part, for every codec and transport.

Two processes on loopback. At every position both encode, send, and collect what the other sent, at the same time:

    encode   logits -> bytes; from a GPU what the step itself does of it, while the copy is part of waiting
    send     hand over to the transport: what posting takes beside encoding
    wait     until the other's message has come; on loopback this is the transport's own time, and any head start
    decode   take in, check and decode: what collecting takes beside waiting

``CPU`` is the time of all threads of one process, which other work on the machine changes least.

The sum is set against a training step without any exchange, of the paper's model and batch, on the same device and
number of threads: ResNet50 on 32 images, the big transformer on 3,584 target tokens and 32,768 symbols.

``--end-to-end`` leaves no part out: steps of a small transformer without and with an exchange, in turns, in the same
process, in place of the rows by part.

    python benchmarks/exchange.py --out figures.json
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from typing import Any

import torch
from exchange_steps import CLASSES, LENGTH, SENTENCES
from exchange_steps import measure as measure_steps
from machine import about
from torch import nn

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.transports.curve_keys import make_keys
from fairseq_codistill.coordinator.wire import EMPTY_FINGERPRINT

VISION, TRANSLATION = "ResNet50, 32 images", "big transformer, 3,584 tokens"
SIZES = {VISION: (32, 1000), TRANSLATION: (3584, 32768)}
CODECS = {VISION: ("fp32", "fp16"), TRANSLATION: ("fp32", "fp16", "columns:512", "tokens:16")}
NAMES = {"vision": VISION, "translation": TRANSLATION}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TINY = "tiny"
PARTS = ("encode", "send", "wait", "decode")
GOAL = 0.03  # of a step


def divergence_of(codec: str) -> str:
    """One that the codec serves."""
    return "kl" if codec.startswith("tokens") else "mse"


def coordinator_for(model: int, ports: list[int], codec: str, transport: str, keys: str) -> Coordinator:
    """A coordinator of one of two models on loopback, already acquainted with the other."""
    coordinator = Coordinator(
        CodistillationConfig(
            codistill_num_models=2,
            codistill_model_index=model,
            codistill_addresses=",".join(f"127.0.0.1:{port}" for port in ports),
            codistill_codec=codec,
            codistill_divergence=divergence_of(codec),
            codistill_transport=transport,
            codistill_keys=keys,
            codistill_max_message_mb=1024,
        )
    )
    coordinator.meet(Identity(settings={}, remarks={}, parameters_digest=str(model), seed=model))
    return coordinator


def one_side(
    model: int, meeting: Any, results: Any, ports: list[int], codec: str, transport: str, keys: str,
    shape: tuple[int, int], repeats: int, device: str, dtype: str,
) -> None:  # fmt: skip
    """What both processes do; model 0 hands back milliseconds by part."""
    torch.set_num_threads(1)
    coordinator = coordinator_for(model, ports, codec, transport, keys)
    predictions, encoder = torch.randn(shape, device=device).to(DTYPES[dtype]), make_codec(codec)
    times: dict[str, list[float]] = {part: [] for part in (*PARTS, "cpu")}
    for position in range(repeats + 1):
        meeting.wait()
        started = time.perf_counter()
        encoder.encode(predictions, position)
        encoded = time.perf_counter()
        meeting.wait()
        begun, cpu = time.perf_counter(), time.process_time()
        coordinator.post(BatchKey(1, position), EMPTY_FINGERPRINT, predictions)
        posted = time.perf_counter()
        exchange = coordinator.collect()
        collected = time.perf_counter()
        assert list(exchange.predictions) == [1 - model], "the peer's message did not come"
        meeting.wait()  # what still travels is part of the exchange
        if position:  # the first one warms up
            times["cpu"].append((time.process_time() - cpu) * 1e3)
            times["encode"].append((encoded - started) * 1e3)
            times["send"].append(max((posted - begun) - (encoded - started), 0.0) * 1e3)
            times["wait"].append(exchange.wait_s * 1e3)
            times["decode"].append((collected - posted - exchange.wait_s) * 1e3)
    if model == 0:
        results.put(times)
    meeting.wait()
    coordinator.close()


def measure(
    codec: str, transport: str, keys: str, shape: tuple[int, int], repeats: int, device: str, dtype: str
) -> dict[str, list[float]]:
    """Milliseconds of every repeat, by part, and of all threads of one process together (``cpu``)."""
    context = multiprocessing.get_context("spawn")
    meeting, results, ports = context.Barrier(2), context.Queue(), _free_ports(2)
    what = (meeting, results, ports, codec, transport, keys, shape, repeats, device, dtype)
    processes = [context.Process(target=one_side, args=(model, *what)) for model in range(2)]
    for process in processes:
        process.start()
    times: dict[str, list[float]] = results.get(timeout=600)
    for process in processes:
        process.join(60)
    return times


def step_seconds(name: str, device: str, amp: str) -> float:
    """A training step of one model without any exchange: forward, loss, backward; the shortest of three."""
    torch.manual_seed(0)
    if name == VISION:
        import timm

        model: nn.Module = timm.create_model("resnet50").to(device)
        inputs: tuple[torch.Tensor, ...] = (torch.randn(32, 3, 224, 224, device=device),)
        target = torch.randint(1000, (32,), device=device)
    elif name == TRANSLATION:
        model = _BigTransformer().to(device)
        inputs = tuple(torch.randint(32768, (112, 32), device=device) for _ in range(2))
        target = torch.randint(32768, (3584,), device=device)
    else:
        model = nn.Linear(10, 10).to(device)
        inputs, target = (torch.randn(4, 10, device=device),), torch.randint(10, (4,), device=device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        with torch.autocast(device.split(":")[0], DTYPES[amp], enabled=amp != "fp32"):
            logits = model(*inputs).flatten(0, -2)
        nn.functional.cross_entropy(logits.float(), target).backward()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


class _BigTransformer(nn.Module):
    """The arithmetic of fairseq's big transformer: 6 + 6 layers, 1,024 wide, all embeddings shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32768, 1024)
        self.layers = nn.Transformer(1024, 16, 6, 6, 4096, dropout=0.3, batch_first=True)

    def forward(self, source: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """(batch, length) symbols, twice -> (batch, length, 32768) logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(previous.size(1), device=previous.device)
        hidden = self.layers(self.embedding(source), self.embedding(previous), tgt_mask=mask, tgt_is_causal=True)
        return hidden @ self.embedding.weight.T


def end_to_end(args: argparse.Namespace, keys: str) -> list[dict[str, Any]]:
    """Print and return the rows of whole steps."""
    classes, sentences = (64, 2) if args.tiny else (CLASSES, SENTENCES)
    print(f"Small transformer, {sentences * LENGTH} tokens x {classes} symbols: a step in seconds, medians.\n")
    print("| codec | transport | without | with | more | processor, without | with | more |\n|" + " --- |" * 8)
    rows = []
    for codec in args.codecs or ("fp16", "tokens:16"):
        for transport in args.transports:
            folder = keys if args.keys and transport == "zmq" else "none"
            row = measure_steps(
                _free_ports(2), codec=codec, divergence=divergence_of(codec), transport=transport, keys=folder,
                device=args.device, amp=None if args.amp == "fp32" else DTYPES[args.amp],
                repeats=3 if args.tiny else args.repeats, classes=classes, sentences=sentences,
            )  # fmt: skip
            rows.append({**row, "keys": folder != "none"})
            cells = [codec, transport + " with keys" * (folder != "none")]
            for clock in (row["wall"], row["processor"]):
                cells += [f"{clock['without_s']:.3f}", f"{clock['with_s']:.3f}", f"{clock['more']:+.1%}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    return rows


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def main() -> None:
    """Measure every size, codec and transport, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="cost of one exchange, part by part, against a training step")
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=20, help="exchanges timed for each row; 20")
    parser.add_argument("--transports", nargs="+", default=["zmq", "gloo"], choices=["zmq", "gloo"])
    parser.add_argument("--device", default="cpu", help="where the logits are, and where the step is timed")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="of the logits that are exchanged")
    parser.add_argument("--amp", default="fp32", choices=list(DTYPES), help="of the step, under autocast; fp32: none")
    parser.add_argument("--keys", action="store_true", help="ZeroMQ encrypts and asks who connects (CURVE)")
    parser.add_argument("--sizes", nargs="+", choices=list(NAMES), default=list(NAMES), help="of the predictions")
    parser.add_argument("--codecs", nargs="+", help="in place of those of each size")
    parser.add_argument("--no-step", action="store_true", help="do not time a step, which takes a minute a size")
    parser.add_argument("--end-to-end", action="store_true", help="whole steps without and with an exchange")
    parser.add_argument("--tiny", action="store_true", help="a few small exchanges, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, codecs = {NAMES[name]: SIZES[NAMES[name]] for name in args.sizes}, CODECS
    if args.codecs:
        codecs = dict.fromkeys(sizes, tuple(args.codecs))
    if args.tiny:
        sizes, codecs = {TINY: (4, 10)}, {TINY: ("fp32", "fp16")}
    if args.end_to_end:
        sizes = {}
    keys = tempfile.TemporaryDirectory()
    make_keys(os.path.join(keys.name, "keys"), 2)
    rows = []
    if sizes:
        print("Medians in milliseconds; the share is that of the sum in a step without exchange.\n")
        print("| predictions | codec | transport | MB | " + " | ".join(PARTS) + " | sum | CPU | step (s) | share |")
        print("|" + " --- |" * (len(PARTS) + 8))
    for name, shape in sizes.items():
        step = float("nan") if args.no_step else step_seconds(name, args.device, args.amp)
        for codec in codecs[name]:
            for transport in args.transports:
                folder = os.path.join(keys.name, "keys") if args.keys and transport == "zmq" else "none"
                repeats = 3 if args.tiny else args.repeats
                times = measure(codec, transport, folder, shape, repeats, args.device, args.dtype)
                cpu = statistics.median(times.pop("cpu"))
                medians = {part: statistics.median(values) for part, values in times.items()}
                total = statistics.median(map(sum, zip(*times.values(), strict=True)))
                num_bytes = make_codec(codec).num_bytes(*shape)
                row = {"predictions": name, "shape": list(shape), "codec": codec, "transport": transport}
                row.update(keys=folder != "none", cpu_ms=cpu)
                row.update(bytes=num_bytes, median_ms=medians, total_ms=total, step_s=step, share=total / 1e3 / step)
                rows.append(row)
                cells = [name, codec, transport + " with keys" * row["keys"], f"{num_bytes / 1e6:.3f}"]
                cells += [f"{medians[part]:.3f}" for part in PARTS]
                cells += [f"{total:.3f}", f"{cpu:.0f}", f"{step:.3g}", f"{total / 1e3 / step:.4%}"]
                print("| " + " | ".join(cells) + " |", flush=True)
    steps = end_to_end(args, os.path.join(keys.name, "keys")) if args.end_to_end else []
    if args.out:
        settings = about(threads=1, repeats=args.repeats, device=args.device, dtype=args.dtype, amp=args.amp, goal=GOAL)
        with open(args.out, "w") as file:
            json.dump({"about": settings, "rows": rows, "steps": steps}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
