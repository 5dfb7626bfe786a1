"""How codistillation grows with the number of models n and the devices a model X: bits, memory, time, and its own cost.

All processes are on loopback and share the cores of one machine. They compute as much as the same n · X processes
without codistillation (n models alone, each of X devices), with which they are compared: so the ratio of times shows
what the exchange costs, and not that there are more processes than cores. Where there are, a step also waits for the
peer that the scheduler serves last, as it would not on n machines; ``wait`` holds that.

    Mbit       a device sends for an update, counted, and the paper's formula (n − 1) · b_pred · B / T
    memory     peak resident MB of a process, mean over processes; alone, and codistilled
    ms         an update takes, mean over models; alone, and codistilled
    wait       ms of an update, for the peers
    own cost   ms of processor time that post and collect take of the training thread, for logits of 32 x 1,000 in fp16

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out results/scaling
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from link_methods import Job
from link_runs import POLL_S, RunFailed, Watched
from machine import about

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.meter import prediction_bits
from fairseq_codistill.coordinator.wire import EMPTY_FINGERPRINT, HEADER_BYTES
from fairseq_codistill.launch.plan import make_jobs
from fairseq_codistill.launch.resources import pick_ports

CODEC, BITS_PER_VALUE = "fp16", 16
SHAPE = (32, 1000)
HEADS = (
    "n",
    "X",
    "Mbit",
    "formula",
    "counted / formula",
    "MB alone",
    "MB",
    "ms alone",
    "ms",
    "ratio",
    "wait",
    "own cost",
)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", default="2,4,8", help="n, comma separated")
    parser.add_argument("--devices", default="1,2", help="X, comma separated")
    parser.add_argument("--model", default="wrn16_1", help="of vision")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--interval", type=int, default=1, help="T")
    parser.add_argument("--steps", type=int, default=30, help="updates timed")
    parser.add_argument("--warm-up", type=int, default=5, help="updates before them")
    parser.add_argument("--start-seconds", type=float, default=600.0, help="for a run to come to its end")
    parser.add_argument("--out", type=Path, help="folder of figures.json and table.md")
    parser.add_argument("--tiny", action="store_true", help="n = 3, X = 1 and 2, small, to see that it works")
    return parser.parse_args()


@dataclasses.dataclass
class Measured:
    """What a run of n models of X devices showed.

    Attributes:
        update_ms: mean over the models.
        mbit: sent by a device for an update; mean over the models.
        wait_ms: of an update, for the peers; mean over the models.
        resident_mb: peak of a process, mean over all.
    """

    update_ms: float
    mbit: float
    wait_ms: float
    resident_mb: float


def jobs_of(options: argparse.Namespace, n: int, x: int, is_codistilled: bool, folder: Path) -> list[Job]:
    """A process for every rank of every model, as codistill-launch would start them."""
    settings = (
        f"--model {options.model} --dataset fake --fake-classes {options.classes} --image-size {options.image_size} "
        f"--batch-size {options.batch_size} --num-workers 0 --epochs 100000 --eval-epochs 100000 --log-updates 1 --cpu "
        f"--no-progress-bar --codistill-codec {CODEC} --codistill-interval {options.interval}"
    ).split()
    if not is_codistilled:
        settings += ["--codistill-weight", "0"]
    commands = [
        [
            sys.executable,
            "-m",
            "fairseq_codistill.vision.train",
            *settings,
            "--seed",
            str(model + 1),
            "--save-dir",
            str(folder / f"{model}"),
        ]
        for model in range(n)
    ]
    return [
        Job(list(job.command), dict(job.environment), folder / f"{job.model}" / "log.jsonl", not job.rank)
        for job in make_jobs(commands, pick_ports(n, x), devices=None)
    ]


def measure_run(options: argparse.Namespace, n: int, x: int, is_codistilled: bool, folder: Path) -> Measured:
    """Start all processes, time updates of every model, kill them.

    Raises:
        RunFailed: a process ended, or they took too long.
    """
    folder.mkdir()
    jobs = jobs_of(options, n, x, is_codistilled, folder)
    processes: list[Watched] = []
    try:
        processes += [Watched(job, (), folder / f"output{number}.txt") for number, job in enumerate(jobs)]
        timed = [process for process, job in zip(processes, jobs, strict=True) if job.speaks]
        deadline = time.monotonic() + options.start_seconds
        # All models train at once in the timed part: it begins when the last one is warm.
        while any(len(process.events) <= options.warm_up for process in timed):
            _look(processes, timed, deadline)
        firsts = [len(process.events) - 1 for process in timed]
        while any(
            len(process.events) - 1 - first < options.steps for process, first in zip(timed, firsts, strict=True)
        ):
            _look(processes, timed, deadline)
        windows = [process.events[first:] for process, first in zip(timed, firsts, strict=True)]
        return Measured(
            statistics.fmean(1e3 * (events[-1].time_s - events[0].time_s) / (len(events) - 1) for events in windows),
            statistics.fmean(event.mbit for events in windows for event in events[1:]),
            statistics.fmean(event.wait_ms for events in windows for event in events[1:]),
            statistics.fmean(_peak_resident_mb(process.process.pid) for process in processes),
        )
    finally:
        for process in processes:
            process.kill()


def _look(processes: list[Watched], timed: list[Watched], deadline: float) -> None:
    time.sleep(POLL_S)
    for process in processes:
        process.fail_if_ended()
    for process in timed:
        process.read(None)
    if time.monotonic() > deadline:
        raise RunFailed("too slow; the end of the first output:\n" + processes[0].tail())


def _peak_resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def own_cost_ms(n: int, repeats: int) -> float:
    """Processor time of post and collect on the training thread, median over positions.

    n coordinators in this process: all post, then all collect. Waiting costs no processor time.
    """
    addresses = pick_ports(n, 1).addresses
    coordinators = [
        Coordinator(
            CodistillationConfig(
                codistill_num_models=n, codistill_model_index=i, codistill_addresses=addresses, codistill_codec=CODEC
            )
        )
        for i in range(n)
    ]
    identities = [Identity(settings={}, remarks={}, parameters_digest=str(i), seed=i) for i in range(n)]
    meetings = [
        threading.Thread(target=coordinator.meet, args=(identity,))
        for coordinator, identity in zip(coordinators, identities, strict=True)
    ]
    for meeting in meetings:
        meeting.start()
    for meeting in meetings:
        meeting.join()
    predictions = [torch.randn(SHAPE) for _ in range(n)]
    costs = []
    for position in range(repeats + 1):
        started = time.thread_time()
        coordinators[0].post(BatchKey(1, position), EMPTY_FINGERPRINT, predictions[0])
        posted = time.thread_time()
        for coordinator, logits in zip(coordinators[1:], predictions[1:], strict=True):
            coordinator.post(BatchKey(1, position), EMPTY_FINGERPRINT, logits)
        collecting = time.thread_time()
        exchange = coordinators[0].collect()
        collected = time.thread_time()
        if len(exchange.predictions) != n - 1:
            raise RunFailed(f"{n - 1 - len(exchange.predictions)} messages were not there")
        costs.append((posted - started + collected - collecting) * 1e3)
        for coordinator in coordinators[1:]:
            coordinator.collect()
    for coordinator in coordinators:
        coordinator.close()
    return statistics.median(costs[1:])


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    for row in rows:
        alone, codistilled = row["alone"], row["codistilled"]
        figures = (
            f"{codistilled['mbit']:.4f}", f"{row['formula_mbit']:.4f}", f"{row['counted_over_formula']:.3f}",
            f"{alone['resident_mb']:.0f}", f"{codistilled['resident_mb']:.0f}", f"{alone['update_ms']:.0f}",
            f"{codistilled['update_ms']:.0f}", f"{codistilled['update_ms'] / alone['update_ms']:.2f}",
            f"{codistilled['wait_ms']:.1f}", f"{row['own_cost_ms']:.2f}",
        )  # fmt: skip
        lines.append(f"| {row['n']} | {row['x']} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write JSON."""
    options = parse_options()
    if options.tiny:
        options.models, options.devices, options.model, options.image_size = "3", "1,2", "wrn10_1", 8
        options.batch_size, options.steps, options.warm_up = 4, 3, 1
    torch.set_num_threads(1)
    facts = about(settings={name: value for name, value in vars(options).items() if name != "out"})
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for n in map(int, options.models.split(",")):
            cost = own_cost_ms(n, 5 if options.tiny else 100)
            for x in map(int, options.devices.split(",")):
                alone, codistilled = (
                    measure_run(options, n, x, is_codistilled, Path(scratch) / f"{n}-{x}-{is_codistilled}")
                    for is_codistilled in (False, True)
                )
                formula = prediction_bits(n, options.batch_size, options.classes, options.interval, BITS_PER_VALUE)
                row = {
                    "n": n,
                    "x": x,
                    "formula_mbit": formula / 1e6,
                    "counted_over_formula": codistilled.mbit * 1e6 / formula,
                    "header_mbit": (n - 1) * HEADER_BYTES * 8e-6 / options.interval,
                    "alone": dataclasses.asdict(alone),
                    "codistilled": dataclasses.asdict(codistilled),
                    "own_cost_ms": cost,
                }
                rows.append(row)
                print(f"n = {n}, X = {x}: {codistilled}", flush=True)
    print("\n" + table(rows))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        facts["load at the end"] = round(os.getloadavg()[0], 2)
        (options.out / "figures.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")
        (options.out / "table.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
