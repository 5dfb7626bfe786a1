"""One model of a run without fairseq: exchanges at every position, skips ahead when told, and prints what happened.

Its predictions are its model number at every logit, so that a log line tells which peers were really heard. Positions
are kept in a file, from which a restarted process goes on. One JSON object a line on standard output.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

from fairseq_codistill.config import CodistillationConfig
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.introductions import Identity
from fairseq_codistill.coordinator.keys import DataOrder, fingerprint

BATCHES_PER_EPOCH = 25


def say(**values) -> None:
    print(json.dumps({"time": time.time(), **values}), flush=True)


def note(file: Path, elapsed: int) -> None:
    """Written beside and renamed: a kill at any time leaves a whole number."""
    beside = file.with_name(file.name + ".tmp")
    beside.write_text(str(elapsed))
    os.replace(beside, file)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=int)
    parser.add_argument("addresses", help="or n=2, with --relay")
    parser.add_argument("--relay", default="")
    parser.add_argument("--updates", type=int, default=200, help="data positions of the run")
    parser.add_argument("--step-s", type=float, default=0.02)
    parser.add_argument("--timeout", type=float, default=1.0)
    parser.add_argument("--start-timeout", type=float, default=30.0)
    parser.add_argument("--require-peers", default="start")
    parser.add_argument("--interval", type=int, default=1)
    parser.add_argument("--keys", default="")
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    is_relayed = bool(options.relay)
    coordinator = Coordinator(
        CodistillationConfig(
            codistill_num_models=(
                int(options.addresses.removeprefix("n=")) if is_relayed else len(options.addresses.split(","))
            ),
            codistill_model_index=options.model,
            codistill_addresses="" if is_relayed else options.addresses,
            codistill_relay=options.relay,
            codistill_codec="fp32",
            codistill_interval=options.interval,
            codistill_timeout=options.timeout,
            codistill_start_timeout=options.start_timeout,
            codistill_keys=options.keys,
            codistill_require_peers=options.require_peers,
        )
    )
    order = DataOrder(BATCHES_PER_EPOCH)
    elapsed = int(options.file.read_text()) if options.file and options.file.exists() else 0
    coordinator.meet(Identity({}, {}, f"{options.model} {time.time()}", options.model), order, elapsed)
    skipped = coordinator.num_behind(elapsed, within_reach=False)
    while elapsed < options.updates:
        if skipped:
            say(skipped=skipped, at=elapsed)
            elapsed += skipped
        if elapsed >= options.updates:
            break
        time.sleep(options.step_s)
        key = order.key(elapsed)
        if coordinator.is_due(elapsed):
            batch = fingerprint(torch.tensor([elapsed]), torch.tensor([elapsed]))
            coordinator.post(key, batch, torch.full((4, 3), float(options.model)))
            exchange = coordinator.collect()
            heard = {int(model): float(theirs.mean()) for model, theirs in exchange.predictions.items()}
            say(elapsed=elapsed, heard=sorted(heard), wait_s=round(exchange.wait_s, 3))
            assert all(value == model for model, value in heard.items())
        else:
            coordinator.poll(elapsed)
        skipped = max(0, coordinator.num_behind(elapsed) - 1)
        elapsed += 1
        if options.file:
            note(options.file, elapsed)
    coordinator.close()
    say(meter=coordinator.meter.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
