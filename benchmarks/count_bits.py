"""Bits and time of drawn classes, coded in several ways, on the predictions of a small trained translation model.

    python benchmarks/count_bits.py --data DIR --checkpoint FILE [--updates 1700] [--unsmoothed 170] --out FILE.md

DIR holds ``{train,val}.{en,de}.gz`` of Multi30k. Without the checkpoint a model is trained first: ``updates`` of 96
sentences with label smoothing 0.1, then so many without, as where ``--label-smoothing-drop-epoch`` ends it. Measured
are the predictions for 3,584 target pieces of the training set in training mode, as they travel: in the model's
vocabulary of 6,000 pieces, and as if it had 32,768, its pieces spread over their ids and the others at the level of the
least likely tenth of a row. ``variance`` is that of the gradient with respect to the logits, systematic over
independent draws, from the probabilities themselves. ``sharp`` multiplies the logits, for the entropy of larger models.
"""

import argparse
import random
import time
from pathlib import Path

import torch
import zstandard
from torch import Tensor, nn
from translation_task import Pairs, Translator, batch_of, load, validation_bits

from fairseq_codistill.coordinator.codecs.counts import pack, unpack
from fairseq_codistill.coordinator.codecs.draws import draw_systematically
from fairseq_codistill.coordinator.wire import HEADER_BYTES

NUM_PIECES, WIDTH, LAYERS, SENTENCES, ROWS, LARGE = 6000, 128, 1, 96, 3584, 32768
ALL_REDUCE_BITS = 2 * 210e6 * 32  # of the big transformer, fp32, an update


def train(model: nn.Module, pairs: Pairs, updates: int, unsmoothed: int) -> None:
    """Batches of sentences of about one length, Adam, inverse square root of the updates."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    order = sorted(range(len(pairs)), key=lambda index: len(pairs.target[index]))
    batches = [order[start : start + SENTENCES] for start in range(0, len(order), SENTENCES)]
    generator, queue = random.Random(0), []
    for update in range(1, updates + unsmoothed + 1):
        if not queue:
            queue = generator.sample(batches, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(update / 300, (300 / update) ** 0.5)
        inputs, targets = batch_of([pairs[index] for index in queue.pop()])
        smoothing = 0.1 if update <= updates else 0.0
        loss = nn.functional.cross_entropy(model(inputs), targets, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def predictions(model: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(rows, classes) logits and (rows,) targets of whole sentences, at most ROWS."""
    torch.manual_seed(3)
    chosen: list[int] = []
    for index in torch.randperm(len(pairs)).tolist():
        if sum(len(pairs.target[other]) for other in chosen) + len(pairs.target[index]) > ROWS:
            break
        chosen.append(index)
    inputs, targets = batch_of([pairs[index] for index in chosen])
    return model.train()(inputs), targets


def in_large_vocabulary(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same among LARGE classes."""
    place = torch.randperm(LARGE, generator=torch.Generator().manual_seed(1))[: logits.size(1)]
    low = torch.quantile(logits, 0.1, dim=1, keepdim=True)
    wide = low.expand(-1, LARGE).clone()
    wide[:, place] = logits
    return wide, place[targets]


def zstandard_bytes(draws: Tensor) -> int:
    """Of the plain 16-bit ids."""
    return len(zstandard.ZstdCompressor(level=19).compress(draws.numpy().astype("<u2").tobytes()))


def rows_of(name: str, logits: Tensor, targets: Tensor) -> list[str]:
    """Lines of the table."""
    lines, (num_rows, num_classes) = [], logits.shape
    for sharp in (1.0, 1.5):
        lprobs = torch.log_softmax(logits * sharp, dim=1)
        entropy = float(-(lprobs.exp() * lprobs).sum(1).mean()) / 0.6931472
        nll = float(nn.functional.nll_loss(lprobs, targets)) / 0.6931472
        for k in (1, 2, 4, 8, 16):
            draws = draw_systematically(logits * sharp, k, seed=5)
            payload = pack(draws, num_classes, targets)  # once before the clock runs
            times = []
            for action in (
                lambda d=draws: pack(d, num_classes, targets),
                lambda p=payload: unpack(p, num_rows, num_classes, targets, 256),
            ):
                started = time.process_time()
                for _ in range(3):
                    action()
                times.append((time.process_time() - started) / 3 * 1e3)
            expected = k * lprobs.exp()
            left = expected % 1
            variance = float((left * (1 - left)).sum() / (expected * (1 - expected / k)).sum())
            alone = len(pack(draws, num_classes, None))
            bits = 8 * (len(payload) + HEADER_BYTES) / num_rows
            lines.append(
                f"| {name} | {num_classes:,} | {sharp} | {nll:.2f} | {entropy:.2f} | {k} | {variance:.2f} | {16 * k} "
                f"| {8 * zstandard_bytes(draws) / num_rows:.1f} | {8 * alone / num_rows:.1f} | **{bits:.1f}** "
                f"| {ALL_REDUCE_BITS / (bits * 3584):,.0f} | {times[0]:.1f} / {times[1]:.1f} |"
            )
    return lines


def main() -> None:
    """Train what is not there, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, action="append", required=True)
    parser.add_argument("--updates", type=int, default=1700)
    parser.add_argument("--unsmoothed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("checkpoints/count_bits"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs, valid, _ = load(options.data, options.cache, NUM_PIECES)
    lines = [
        "| model | classes | sharp | NLL | entropy | K | variance | plain | zstandard | counts, no targets | counts "
        "| all_reduce / counts | ms to encode / decode |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for file in options.checkpoint:
        torch.manual_seed(1)
        model = Translator(NUM_PIECES, WIDTH, LAYERS, dropout=0.1)
        if file.exists():
            model.load_state_dict(torch.load(file)["m"])
        else:
            train(model, pairs, options.updates, options.unsmoothed)
            torch.save({"m": model.state_dict()}, file)
        print(f"{file.stem}: validation NLL {validation_bits(model, valid):.3f} bits", flush=True)
        logits, targets = predictions(model, pairs)
        lines += rows_of(file.stem, logits, targets)
        lines += rows_of(file.stem, *in_large_vocabulary(logits, targets))
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
