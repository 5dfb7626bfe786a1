"""What a codec costs and how far its divergence is from the dense one: bytes, time to encode and decode, error.

    python benchmarks/codecs.py [--rows 512] [--draws 20] [--out FILE.json] [--tiny]

Predictions are made up: for every row and class a normal number of standard deviation 2, shared by the two models up to
noise of standard deviation 0.5, with one class a row raised by 8, as trained models do. Columns:

    bits     a row, as they travel (without the header of 84 bytes a message)
    encode   logits -> bytes, decode the other way, one thread, milliseconds for all rows, median of the draws
    loss     the divergence, forward and backward, likewise
    bias     mean over the draws of (divergence − dense divergence) / dense divergence
    spread   standard deviation of the same; both over seeds of the data position
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.losses import divergences
from fairseq_codistill.losses.distillation import peer_divergence

CLASSES = (1000, 6000, 32768)
CODECS = (
    "fp32", "fp16", "bf16", "int8", "columns:64", "columns:512",
    "tokens:1", "tokens:4", "tokens:16", "topk:8", "topk:64",
)  # fmt: skip


def made_up_logits(num_rows: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_rows, num_classes) logits of two models that agree about as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    shared = 2 * torch.randn(num_rows, num_classes, generator=generator)
    shared[torch.arange(num_rows), torch.randint(num_classes, (num_rows,), generator=generator)] += 8
    noise = [0.5 * torch.randn(num_rows, num_classes, generator=generator) for _ in range(2)]
    return shared + noise[0], shared + noise[1]


def dense_value(divergence: str, codec: str, mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """What the codec's divergence estimates: for drawn tokens the cross entropy, which is KL plus the entropy."""
    value = divergences.DIVERGENCE_FUNCTIONS[divergence](mine, theirs)
    if codec.startswith("tokens"):
        lprobs = torch.log_softmax(theirs, dim=1)
        value = value - (lprobs.exp() * lprobs).sum()
    return value.item()


def measure(codec: str, divergence: str, num_rows: int, num_classes: int, num_draws: int) -> dict:
    """One line of the table."""
    mine, theirs = made_up_logits(num_rows, num_classes)
    truth = dense_value(divergence, codec, mine, theirs)
    mine.requires_grad_()
    made = make_codec(codec)
    times: dict[str, list[float]] = {"encode": [], "decode": [], "loss": []}
    errors = []
    for seed in range(num_draws):
        started = time.perf_counter()
        payload = made.encode(theirs, seed)
        encoded = time.perf_counter()
        received = made.decode(payload, num_rows, num_classes, seed)
        decoded = time.perf_counter()
        value = peer_divergence(mine, received, divergence)
        torch.autograd.grad(value, mine)
        finished = time.perf_counter()
        errors.append(value.item() / truth - 1)
        for part, seconds in zip(times, (encoded - started, decoded - encoded, finished - decoded), strict=True):
            times[part].append(seconds * 1e3)
    return {
        "classes": num_classes,
        "rows": num_rows,
        "codec": codec,
        "divergence": divergence,
        "bits_per_row": 8 * len(payload) / num_rows,
        "median_ms": {part: statistics.median(values) for part, values in times.items()},
        "bias": statistics.fmean(errors),
        "spread": statistics.pstdev(errors),
    }


def main() -> None:
    """Measure every codec, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="bits, time and error of every codec")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_rows, num_draws = (16, 3) if args.tiny else (args.rows, args.draws)
    lines = []
    print(f"{'classes':>7} {'codec':>12} {'D':>4} {'bits a row':>11} {'encode ms':>10} {'decode ms':>10} {'loss ms':>8}"
          f" {'bias':>9} {'spread':>8}")  # fmt: skip
    for num_classes in (100,) if args.tiny else CLASSES:
        for codec in CODECS:
            for divergence in ("mse", "kl"):
                if (codec.startswith("columns") and divergence == "kl") or (
                    codec.startswith("tokens") and divergence == "mse"
                ):
                    continue
                line = measure(codec, divergence, num_rows, num_classes, num_draws)
                lines.append(line)
                ms = line["median_ms"]
                print(
                    f"{num_classes:>7} {codec:>12} {divergence:>4} {line['bits_per_row']:>11,.0f} "
                    f"{ms['encode']:>10.2f} {ms['decode']:>10.2f} {ms['loss']:>8.2f} "
                    f"{line['bias']:>9.5f} {line['spread']:>8.5f}",
                    flush=True,
                )
    if args.out:
        about = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
        about.update(load=os.getloadavg()[0], threads=1, draws=num_draws)
        with open(args.out, "w") as file:
            json.dump({"about": about, "lines": lines}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
