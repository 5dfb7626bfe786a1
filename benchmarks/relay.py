"""What a relay costs: delay and bits of an exchange through it, against direct links, by models, size and rate.

As root, with iproute2: every model is on a host of its own (a network namespace), and so is the relay; all hang on one
switch, and each sends at --rates. The models do nothing but exchange: post predictions of a size, collect those of all
others, at every position. Told for each:

    ms        from one exchange to the next, median over positions of model 0: the delay, there and for the slowest peer
    sent      bytes that one model sends for an exchange, as the program counts, and as its interface does (with what
              goes back and forth: acknowledgements, headers of TCP/IP and Ethernet)

    python benchmarks/relay.py --out results/relay/figures.json
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from machine import about

PORT = 29600
WAYS = ("direct", "relay")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def switched(count: int) -> Iterator[list[str]]:
    """Names of so many namespaces on one switch; the address of number i is 10.79.2.(i + 1)."""
    switch, *names = [f"br{os.getpid()}{end}" for end in ("s", *range(count))]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", switch)
            ip("-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in (switch, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def address(number: int) -> str:
    return f"10.79.2.{number + 1}"


def limit(name: str, mbit_per_s: float | None) -> None:
    """What a host sends, by a token bucket with a queue of 50 ms."""
    subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", "eth0", "root"], capture_output=True)
    if mbit_per_s is not None:
        queue = max(128_000, int(mbit_per_s * 1e6 / 8 * 0.05))
        bucket = f"tbf rate {mbit_per_s}mbit burst {max(16_000, int(mbit_per_s * 250))} limit {queue}".split()
        subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *bucket], check=True)


def work(options: argparse.Namespace) -> None:
    """One model: exchanges, and prints what it saw."""
    import torch

    from fairseq_codistill.config import CodistillationConfig
    from fairseq_codistill.coordinator.coordinator import Coordinator
    from fairseq_codistill.coordinator.introductions import Identity
    from fairseq_codistill.coordinator.keys import BatchKey

    where: dict[str, Any] = {"codistill_relay": f"{address(options.num_models)}:{PORT}"}
    if options.way == "direct":
        where = {"codistill_addresses": ",".join(f"{address(model)}:{PORT}" for model in range(options.num_models))}
    config = CodistillationConfig(
        codistill_num_models=options.num_models, codistill_model_index=options.worker, codistill_keys=options.keys,
        codistill_start_timeout=60, codistill_timeout=60, **where,
    )  # fmt: skip
    coordinator = Coordinator(config)
    coordinator.meet(Identity({}, {}, str(options.worker), options.worker))
    logits = torch.randn(options.size // 200, 100)  # fp16: 200 bytes a row
    waits, counter = [], Path("/sys/class/net/eth0/statistics/tx_bytes")
    for position in range(options.exchanges + 2):
        if position == 2:  # the first ones find their connections
            before, sent_before, started = int(counter.read_text()), coordinator.meter.sent_bytes, time.monotonic()
        coordinator.post(BatchKey(1, position), bytes(16), logits)
        found = coordinator.collect()
        assert len(found.predictions) == options.num_models - 1, f"{options.way}: a peer was missed"
        if position >= 2:
            waits.append(time.monotonic() - started)
            started = time.monotonic()
    result = {
        "ms": 1000 * sorted(waits)[len(waits) // 2],
        "sent": (coordinator.meter.sent_bytes - sent_before) / options.exchanges,
        "on_interface": (int(counter.read_text()) - before) / options.exchanges,
    }
    coordinator.close()
    print(json.dumps(result))


def measure(names: Sequence[str], way: str, num_models: int, size: int, exchanges: int, keys: str) -> dict[str, float]:
    """Of model 0."""
    command = [
        sys.executable, __file__, "--way", way, "--num-models", str(num_models), "--size", str(size),
        "--exchanges", str(exchanges), "--keys", keys, "--worker",
    ]  # fmt: skip
    workers = [
        subprocess.Popen(["ip", "netns", "exec", names[model], *command, str(model)], stdout=subprocess.PIPE, text=True)
        for model in range(num_models)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    found: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return found


def line(row: dict[str, Any]) -> str:
    """A row as it is told."""
    what = f"n={row['models']} {row['mbit_per_s']:>9} Mbit/s {row['bytes']:>7} bytes {row['way']:<6}"
    sent = f"sent {row['sent']:>9.0f}, on the interface {row['on_interface']:>9.0f}"
    return f"{what} {row['ms']:>8.2f} ms, {sent}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="relay.json")
    parser.add_argument("--models", default="2,4")
    parser.add_argument("--sizes", default="1000,100000", help="bytes of a message")
    parser.add_argument("--rates", default="unlimited,20", help="Mbit/s of each host")
    parser.add_argument("--exchanges", type=int, default=20)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--num-models", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--keys", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    from fairseq_codistill.coordinator.transports.curve_keys import make_keys

    rows = []
    for num_models in map(int, options.models.split(",")):
        with switched(num_models + 1) as names, tempfile.TemporaryDirectory() as folder:
            keys = os.path.join(folder, "keys")
            make_keys(keys, num_models)
            relay = subprocess.Popen(
                ["ip", "netns", "exec", names[num_models], sys.executable, "-m", "fairseq_codistill.relay.command",
                 "--port", str(PORT), "--keys", keys], stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                for rate in options.rates.split(","):
                    for name in names:
                        limit(name, None if rate == "unlimited" else float(rate))
                    for size in map(int, options.sizes.split(",")):
                        for way in WAYS:
                            found = measure(names, way, num_models, size, options.exchanges, keys)
                            rows.append({"models": num_models, "mbit_per_s": rate, "bytes": size, "way": way, **found})
                            print(line(rows[-1]), flush=True)
            finally:
                relay.terminate()
                relay.wait()
    Path(options.out).write_text(json.dumps({"machine": about(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
