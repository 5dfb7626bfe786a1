"""What one exchange costs a training step, apart from waiting for a slower peer.

Two processes on loopback, T = 1. Model 1 posts a position, then says so over a pipe; only when its message lies in
model 0's socket does model 0 post and collect under the clock. Printed: median and 90th percentile of

    encode   logits -> bytes
    post     encode + hand over to ZeroMQ
    collect  take in, check and decode a message that is already there

    python benchmarks/exchange.py --out results.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time

import torch
import zmq

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator import BatchKey, Coordinator
from fairseq_codistill.coordinator.codecs import make_codec
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.wire import EMPTY_FINGERPRINT

SIZES = {"ResNet50, batch 32": (32, 1000), "translation, 3,500 tokens": (3500, 6000)}
TINY_SIZES = {"tiny": (4, 10)}
PARTS = ("encode", "post", "collect", "post + collect")


def coordinator_for(model: int, ports: list[int], codec: str) -> Coordinator:
    """A coordinator of one of two models on loopback, already acquainted with the other."""
    addresses = ",".join(f"127.0.0.1:{port}" for port in ports)
    coordinator = Coordinator(
        CodistillationConfig(
            codistill_num_models=2, codistill_model_index=model, codistill_addresses=addresses, codistill_codec=codec
        )
    )
    coordinator.meet(Identity(settings={}, remarks={}, parameters_digest=str(model), seed=model))
    return coordinator


def peer(pipe, ports: list[int], codec: str, shape: tuple[int, int], repeats: int) -> None:
    """Model 1: at a word from model 0, post one position."""
    torch.set_num_threads(1)
    coordinator = coordinator_for(1, ports, codec)
    predictions = torch.randn(shape)
    for position in range(repeats):
        coordinator.post(BatchKey(1, position), EMPTY_FINGERPRINT, predictions)
        pipe.send(position)
        pipe.recv()
        coordinator.collect()
    coordinator.close()


def measure(codec: str, shape: tuple[int, int], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every repeat (the first of each, which warms up, left out), by part."""
    ports = _free_ports(2)
    context = multiprocessing.get_context("spawn")
    pipe, other_end = context.Pipe()
    process = context.Process(target=peer, args=(other_end, ports, codec, shape, repeats + 1))
    process.start()
    coordinator = coordinator_for(0, ports, codec)
    predictions = torch.randn(shape)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    for position in range(repeats + 1):
        pipe.recv()  # the peer has posted ...
        coordinator._mailbox._transport._pull.poll(60_000, zmq.POLLIN)  # type: ignore[attr-defined] # ... and it is here
        started = time.perf_counter()
        make_codec(codec).encode(predictions, 0)
        encoded = time.perf_counter()
        coordinator.post(BatchKey(1, position), EMPTY_FINGERPRINT, predictions)
        posted = time.perf_counter()
        exchange = coordinator.collect()
        collected = time.perf_counter()
        assert list(exchange.predictions) == [1], "the peer's message was not there"
        if position:
            times["encode"].append((encoded - started) * 1e3)
            times["post"].append((posted - encoded) * 1e3)
            times["collect"].append((collected - posted) * 1e3)
            times["post + collect"].append((collected - encoded) * 1e3)
        pipe.send("next")
    coordinator.close()
    process.join(60)
    return times


def _free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def _commit() -> str:
    """Of the checkout this file lies in, or "unknown"."""
    command = [
        "git",
        "-C",
        os.path.dirname(os.path.abspath(__file__)),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Measure every size and codec, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="cost of one exchange, without waiting for a slower peer")
    parser.add_argument("--out", help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=50, help="exchanges timed for each row; 50")
    parser.add_argument("--tiny", action="store_true", help="a few small exchanges, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("milliseconds, median and 90th percentile")
    print(f"{'predictions':>28} {'codec':>5} {'MB':>7}" + "".join(f"{part:>19}" for part in PARTS))
    for name, shape in (TINY_SIZES if args.tiny else SIZES).items():
        for codec in ("fp16", "fp32"):
            times = measure(codec, shape, 3 if args.tiny else args.repeats)
            medians = {part: statistics.median(values) for part, values in times.items()}
            ninetieths = {part: sorted(values)[int(0.9 * len(values))] for part, values in times.items()}
            row = {
                "predictions": name,
                "shape": list(shape),
                "codec": codec,
                "bytes": make_codec(codec).num_bytes(*shape),
                "median_ms": medians,
                "percentile_90_ms": ninetieths,
            }
            rows.append(row)
            columns = "".join(f"{medians[part]:10.3f} {ninetieths[part]:8.3f}" for part in PARTS)
            print(f"{name:>28} {codec:>5} {row['bytes'] / 1e6:7.2f}{columns}")
    if args.out:
        about = {"torch": torch.__version__, "zmq": zmq.zmq_version(), "python": platform.python_version()}
        about.update(commit=_commit(), processor=_processor(), cores=os.cpu_count(), load=os.getloadavg()[0])
        about.update(threads=1, repeats=len(times["post"]))
        with open(args.out, "w") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
