"""Who is slowed down by a slow link: all_reduce and its relatives against codistillation, one device a host, two hosts.

As root, with iproute2, it makes two network namespaces and limits the link between them, both directions, to each of
--rates; without, both hosts are loopback and nothing is limited. Every method is started once, and the rate changes
while it trains. Told for each method and rate:

    speed      updates a second, over those of the same two processes that train alone, side by side: the limit, as
               measured next before and next after the method. With --repeats, the mean over rounds of all methods, and
               the standard error of that mean: a machine that is shared is 10 % faster or slower from start to start.
               ~ marks one whose updates took longer than --limit-seconds: bytes sent over bytes of an update.
    bits       sent by a device for an update: counted by the program (codistillation) or by the formula (the others),
               and by the interface, with and without the headers of Ethernet and TCP/IP.

    python benchmarks/slow_links.py --workload vision --out results/slow_links/vision
    python benchmarks/slow_links.py --workload translation --out results/slow_links/translation

DiLoCo needs torchft in the same environment, and is left out with a line where that is missing. Without --delay-ms
links have no propagation delay, which favours methods that go back and forth; with it, every packet of every method is
that much later at the other end (delay_proxy.py): two cities' 5 ms, two coasts' 40 or two continents' 100.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from link_methods import METHODS, NUM_DEVICES, Method, Translation, Vision, all_reduce_bits, why_missing
from link_report import draw, table
from link_runs import Cell, Run, RunFailed
from links import Loopback, make_link
from machine import about

from fairseq_codistill.coordinator.transports.curve_keys import make_keys
from fairseq_codistill.launch.resources import pick_ports

RATES = "unlimited,1000,100,20,1"
TINY = {
    "vision": (Vision(model="wrn10_1", image_size=8, classes=10, batch_size=4), "none,ddp,fp16"),
    "translation": (Translation(dim=16, layers=1, vocabulary=50, max_tokens=64, sentences=2000), "none,tokens"),
}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workload", choices=("vision", "translation", "both"), default="vision")
    parser.add_argument("--model", default="resnet18", help="name of a timm model, for vision")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=512, help="in a batch, for translation")
    parser.add_argument("--steps", type=int, default=20, help="updates timed for each method and rate, more or less")
    parser.add_argument(
        "--warm-up", type=int, default=2, help="updates after each change of the rate that do not count"
    )
    parser.add_argument(
        "--first-warm-up",
        type=int,
        default=40,
        help="updates after a start that do not count",
    )
    parser.add_argument("--rates", default=RATES, help="Mbit/s, from fast to slow")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of the link, one way")
    parser.add_argument("--methods", default="", help="comma separated names, default: all of the workload's")
    parser.add_argument(
        "--limits", type=int, default=4, help="how often the limit is measured, among the methods of a round"
    )
    parser.add_argument("--repeats", type=int, default=1, help="rounds: each starts every method anew")
    parser.add_argument("--limit-seconds", type=float, default=15.0, help="for the timed updates of a method and rate")
    parser.add_argument("--start-seconds", type=float, default=240.0, help="for those updates to come")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, although this machine could make them")
    parser.add_argument("--out", type=Path, help="folder of figures.json, table.md and figure.png")
    parser.add_argument("--tiny", action="store_true", help="a few updates of small models, to see that it works")
    return parser.parse_args()


def measure_method(
    workload: Vision | Translation,
    method: Method,
    link: Loopback,
    rates: list[float | None],
    folder: Path,
    options: argparse.Namespace,
) -> list[Cell]:
    """All rates, from fast to slow, in one run.

    Raises:
        RunFailed: a process ended, or an update neither came nor could be told from bytes.
    """
    folder.mkdir()
    if link.is_limited and method.family == "codistill":
        make_keys(str(folder / "keys"), NUM_DEVICES)
    link.set_rate(None)
    block = pick_ports(NUM_DEVICES, 1)
    ports = [block.listen(index) for index in range(NUM_DEVICES)]
    jobs = [workload.job(method, index, link.hosts, ports, folder) for index in range(NUM_DEVICES)]
    cells: list[Cell] = []
    with Run(jobs, link, folder) as run:
        run.start(options.first_warm_up, options.start_seconds)
        update_mbit = None
        if method.family in ("all_reduce", "diloco"):
            update_mbit = all_reduce_bits(method, run.num_parameters, workload.shapes()) / 1e6
        for rate in rates:
            limit_s = options.limit_seconds * method.patience
            cell = run.measure(method, rate, options.warm_up, options.steps, limit_s, update_mbit)
            cells.append(cell)
            if method.family == "codistill" and update_mbit is None:
                update_mbit = cell.counted_mbit or None
            print(
                f"  {shown(rate):>9}: {cell.updates_per_s:8.3f} updates/s by {cell.updates:.3g} {cell.by}", flush=True
            )
    return cells


def shown(rate: float | None) -> str:
    """As --rates has it."""
    return "unlimited" if rate is None else f"{rate:g}"


def spread(names: list[str], num_limits: int) -> list[str]:
    """``none`` at the start, at the end, and evenly among the methods, so that a drift of the machine shows."""
    others = [name for name in names if name != "none"]
    places = {round(i * len(others) / max(num_limits - 1, 1)) for i in range(num_limits)}
    order = []
    for number in range(len(others) + 1):
        order += ["none"] if number in places else []
        order += others[number : number + 1]
    return order


def row_of(key: str, method: Method, starts: list[dict], limits: list[float]) -> dict:
    """What all starts of a method say together: a cell a rate, of the first start, with the speeds of all of them."""
    for start in starts:
        # The limits measured next before and next after it: a machine that is shared drifts.
        before = start.pop("limits_before")
        start["limit_updates_per_s"] = statistics.fmean(limits[max(before - 1, 0) : before + 1])
        for cell in start["cells"]:
            cell["ratio"] = cell["updates_per_s"] / start["limit_updates_per_s"]
    cells = []
    for same_rate in zip(*(start["cells"] for start in starts if start["cells"]), strict=True):
        ratios = [cell["ratio"] for cell in same_rate]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
        cells.append({**same_rate[0], "ratio": statistics.fmean(ratios), "ratio_error": error})
    return {"method": key, "name": method.name, "cells": cells, "starts": starts}


def measure_workload(name: str, link: Loopback, options: argparse.Namespace, folder: Path) -> dict:
    """Every method of a workload at every rate."""
    workload: Vision | Translation = Translation(max_tokens=options.max_tokens)
    if name == "vision":
        workload = Vision(options.model, options.image_size, options.classes)
    chosen = options.methods
    if options.tiny:
        workload, chosen = TINY[name][0], chosen or TINY[name][1]
    rates = [None if text == "unlimited" else float(text) for text in options.rates.split(",")]
    if not link.is_limited:
        rates = [None]
    methods = METHODS[name]
    wanted = [method for method in chosen.split(",") if method] or list(methods)
    if unknown := set(wanted) - set(methods):
        raise SystemExit(f"--methods: {name} has no {', '.join(sorted(unknown))}; it has {', '.join(methods)}")
    folder.mkdir()
    workload.prepare(folder)
    for key in [key for key in wanted if why_missing(methods[key])]:
        print(f"{name}: {methods[key].name}: left out, {why_missing(methods[key])}")
        wanted.remove(key)
    limits: list[float] = []
    starts: dict[str, list[dict]] = {key: [] for key in wanted if key != "none"}
    for number, key in enumerate(spread(wanted, options.limits) * options.repeats):
        method = methods[key]
        print(f"{name}: {method.name}", flush=True)
        try:
            # The limit sends nothing, so one rate says it all.
            cells = measure_method(
                workload, method, link, [None] if key == "none" else rates, folder / f"{number}-{key}", options
            )
        except RunFailed as error:
            print(f"{name}: {method.name}: failed: {error}", file=sys.stderr)
            starts[key].append({"failed": str(error), "cells": [], "limits_before": len(limits)})
            continue
        if key == "none":
            limits.append(cells[0].updates_per_s)
        else:
            found = [dataclasses.asdict(cell) for cell in cells]
            starts[key].append({"cells": found, "limits_before": len(limits)})
    if not limits:
        raise SystemExit("the limit could not be measured")
    rows = [row_of(key, methods[key], starts[key], limits) for key in starts]
    return {
        "workload": name,
        "settings": dataclasses.asdict(workload),
        "rates_mbit_s": rates,
        "delay_ms": link.delay_ms,
        "limits_updates_per_s": limits,
        "rows": rows,
    }


def main() -> None:
    """Measure, print tables, write JSON, tables and figures."""
    options = parse_options()
    if options.tiny:
        options.steps, options.warm_up, options.first_warm_up, options.limits = 3, 1, 2, 1
        options.rates = "unlimited,20" if options.rates == RATES else options.rates
    # Either signal goes the way out of Ctrl-C, also in the background of a shell, where SIGINT is ignored: processes
    # and namespaces are removed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    names = ["vision", "translation"] if options.workload == "both" else [options.workload]
    found = []
    with (
        Loopback("--loopback") if options.loopback else make_link(options.delay_ms) as link,
        tempfile.TemporaryDirectory() as scratch,
    ):
        if options.delay_ms and not link.delay_ms:
            raise SystemExit(f"--delay-ms is {options.delay_ms:g}, and no link can be delayed here: {link.why}")
        if not link.is_limited:
            print(f"loopback only, no rate is limited and no interface counted: {link.why}")
        facts = about(
            hosts="namespaces" if link.is_limited else "loopback",
            why_not=link.why,
            namespaces=link.names,
            delay_ms=link.delay_ms,
            steps=options.steps,
        )
        for name in names:
            found.append(measure_workload(name, link, options, Path(scratch) / name))
            print("\n" + table(found[-1]) + "\n", flush=True)
    if options.out:
        os.makedirs(options.out, exist_ok=True)
        facts["load at the end"] = round(os.getloadavg()[0], 2)
        (options.out / "figures.json").write_text(json.dumps({"about": facts, "workloads": found}, indent=1) + "\n")
        (options.out / "table.md").write_text("\n\n".join(table(result) for result in found) + "\n")
        draw(found, options.out / "figure.png")


if __name__ == "__main__":
    main()
