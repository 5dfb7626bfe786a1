"""Damaged payloads for every codec: none may crash anything, and none may be taken for what was sent.

    python benchmarks/fuzz_codecs.py --payloads 1000000 --out results/faults/codec_fuzz.json

Each is damaged in one of nine ways and offered twice: as it comes from the wire, where header and checksum are looked
at first, and straight to the decoder. From the wire nothing that differs may come through. Straight to a decoder only
``counts``, ``label`` and ``vote`` can tell, which check what they have decoded; the others must refuse or give
something of the right shape. A decoder that takes longer than LONGEST_S is a finding as well.
"""

import argparse
import collections
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.codecs.codec import CodecError
from fairseq_codistill.coordinator.keys import BatchKey
from fairseq_codistill.coordinator.wire import Kind, Message, WireError, parse

CODECS = (
    "fp32", "fp16", "bf16", "int8", "columns:3", "tokens:4", "topk:3", "counts:1", "counts:4", "counts:16", "label",
    "vote",
)  # fmt: skip
CHECKED = frozenset("counts label vote".split())
SHAPES = ((1, 5), (7, 30), (24, 200))
LONGEST_S = 1.0


def damaged(payload: bytes, chance: random.Random) -> bytes:
    """What a line, a disk or a bug could make of a payload."""
    data, way = bytearray(payload), chance.randrange(9)
    place, size = chance.randrange(max(1, len(data))), chance.randrange(1, 17)
    if way == 0 and data:
        data[place] ^= 1 << chance.randrange(8)
    elif way == 1 and data:
        data[place] = chance.randrange(256)
    elif way == 2:
        del data[place:]
    elif way == 3:
        data += chance.randbytes(size)
    elif way == 4:
        data[place : place + size] = bytes(len(data[place : place + size]))
    elif way == 5:
        data[place : place + size] = chance.randbytes(len(data[place : place + size]))
    elif way == 6:
        data = bytearray(chance.randbytes(len(data)))
    elif way == 7:
        data[place:place] = data[place : place + size]
    elif len(data) >= 16:  # two words change places
        first, second = (8 * word for word in chance.sample(range(len(data) // 8), 2))
        data[first : first + 8], data[second : second + 8] = data[second : second + 8], data[first : first + 8]
    return bytes(data)


def values_of(found: Any) -> bytes:
    """All that a decoder gave, to compare."""
    tensors = [found] if isinstance(found, torch.Tensor) else list(vars(found).values())
    return b"".join(part.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for part in tensors if part.numel())


def main() -> None:
    """Offer them all, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, counts = random.Random(options.seed), collections.defaultdict(collections.Counter)
    kinds = []
    for name in CODECS:
        for rows, classes in SHAPES:
            codec = make_codec(name)
            logits = 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows))
            targets = logits.argmax(1)
            payload = bytes(codec.encode(logits, 7, targets))
            header = Message(
                Kind.PREDICTIONS, 1, 0, bytes(8), payload, BatchKey(1, 2), bytes(16), rows, classes, codec.code
            ).header()
            right = values_of(codec.decode(payload, rows, classes, 7, targets))
            kinds.append((name, codec, rows, classes, targets, payload, header, right))
    failures: list[str] = []
    for _ in range(options.payloads):
        name, codec, rows, classes, targets, payload, header, right = chance.choice(kinds)
        broken, count = damaged(payload, chance), counts[name]
        count["offered"] += 1
        count["unchanged by the damage"] += broken == payload
        try:
            parse(header, broken)
            count["passed the wire"] += 1
            if broken != payload:
                failures.append(f"{name}: the wire took {broken.hex()} for {payload.hex()}")
        except WireError:
            count["refused by the wire"] += 1
        started = time.monotonic()
        try:
            found = values_of(codec.decode(broken, rows, classes, 7, targets))
            count["decoded alike" if found == right else "decoded otherwise"] += 1
            if found != right and codec.name in CHECKED:
                failures.append(f"{name}: decoded otherwise, {broken.hex()}")
        except CodecError:
            count["refused by the decoder"] += 1
        except BaseException as error:
            failures.append(f"{name}: {type(error).__name__}: {error}, {broken.hex()}")
            if isinstance(error, KeyboardInterrupt):
                raise
        if time.monotonic() - started > LONGEST_S and time.process_time() > 0:
            count["slow"] += 1
    report = {"payloads": options.payloads, "seed": options.seed, "failures": failures[:50], "counts": counts}
    text = json.dumps({**report, "num_failures": len(failures)}, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
