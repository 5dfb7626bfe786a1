"""Owns the choices of ``recipes/own_corpus``: size of model and vocabulary, codec and interval, each with its reason.

Sizes go by the amount of text, the codec by the link. It trains nothing; the seconds of an update are handed to it.
"""

import argparse
import dataclasses
import math
import re
import shlex
import sys
from pathlib import Path

from fairseq_codistill.coordinator.codecs.choice import make_codec
from fairseq_codistill.coordinator.meter import prediction_bits

# Settings of recipes that were run: small is multi30k_en_de's, medium is iwslt14_de_en's, both in their settings.sh;
# tiny is small with half the width, large the base model of Vaswani et al. 2017.
SMALL = "--arch transformer_iwslt_de_en --encoder-layers 2 --decoder-layers 2"
QUICK = "--dropout 0.1 --lr 5e-3 --warmup-updates 500 --max-tokens 4096"
NARROW = "--encoder-embed-dim {0} --encoder-ffn-embed-dim {1} --decoder-embed-dim {0} --decoder-ffn-embed-dim {1}"
HEADS = "--encoder-attention-heads 4 --decoder-attention-heads 4"


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of the table.

    Attributes:
        max_characters: of training text, both sides, up to which it is chosen.
        vocab_size: joint symbols.
        max_epoch: passes of each model over the text.
        settings: of fairseq.
        told: what it is, in words.
    """

    max_characters: float
    vocab_size: int
    max_epoch: int
    settings: str
    told: str


SIZES = {
    "tiny": Size(
        1e6, 1000, 40, f"{SMALL} {NARROW.format(64, 128)} {HEADS} {QUICK} --warmup-updates 200 --max-tokens 2048",
        "2 + 2 layers of 64",
    ),
    "small": Size(1e7, 3000, 30, f"{SMALL} {NARROW.format(128, 256)} {HEADS} {QUICK}", "2 + 2 layers of 128"),
    "medium": Size(
        2e8, 10_000, 40,
        "--arch transformer_iwslt_de_en --dropout 0.3 --weight-decay 0.0001 --clip-norm 0 --lr 5e-4 "
        "--warmup-updates 4000 --max-tokens 4096",
        "6 + 6 layers of 512",
    ),
    "large": Size(
        math.inf, 32_000, 15,
        "--arch transformer_wmt_en_de --dropout 0.1 --clip-norm 0 --lr 7e-4 --warmup-updates 4000 --max-tokens 4096 "
        "--update-freq 8",
        "6 + 6 layers of 512, wider between",
    ),
}  # fmt: skip
MOST_ON_CPU = "small"
DENSE_SYMBOLS = 4000  # up to so many, whole logits cost little where no link is in the way
SHARE = 0.2  # of an update's time that sending may take
INTERVALS = (1, 2, 5, 10, 20, 50)
LINK = re.compile(r"^(\d+(?:\.\d+)?)\s*(k|m|g)bit(?:/s)?$", re.IGNORECASE)
UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}


def bits_per_s(link: str) -> float | None:
    """``20mbit`` -> 20e6; None for ``local``, models on one machine.

    Raises:
        ValueError: it says nothing of that kind.
    """
    if link == "local":
        return None
    match = LINK.match(link)
    if match is None or not float(match.group(1)):
        raise ValueError(f"--link is '{link}'; it must be local, or a speed such as 20mbit, 500kbit or 1gbit")
    return float(match.group(1)) * UNITS[match.group(2).lower()]


def num_characters(raw: Path, languages: list[str]) -> tuple[int, int]:
    """Pairs and characters, both sides, of the training text."""
    texts = [(raw / f"train.{language}").read_text(encoding="utf-8") for language in languages]
    return texts[0].count("\n"), sum(map(len, texts))


def choose_size(characters: int, has_gpu: bool) -> tuple[str, str]:
    """Name of a size, and why."""
    name = next(name for name, size in SIZES.items() if characters <= size.max_characters)
    reason = f"{characters:,} characters of text"
    names = list(SIZES)
    if not has_gpu and names.index(name) > names.index(MOST_ON_CPU):
        return MOST_ON_CPU, f"{reason} would bear {name}, which takes days without a GPU; --size {name} takes it anyway"
    limit = SIZES[name].max_characters
    return name, reason + ("" if math.isinf(limit) else f", at most {limit:,.0f}")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What travels: codec, interval, and why."""

    codec: str
    interval: int
    reason: str


def choose_exchange(link: str, symbols: int, rows: int, num_models: int, step_s: float | None) -> Exchange:
    """The first of dense logits, sampled tokens, and sampled tokens less often, that the link bears.

    Args:
        link: ``local`` or a speed.
        symbols: of the vocabulary.
        rows: target tokens of an update on one device, at most.
        num_models: n.
        step_s: seconds of an update without communication; needed for a speed.

    Raises:
        ValueError: ``link`` cannot be read.
    """
    speed = bits_per_s(link)
    if speed is None:
        if symbols <= DENSE_SYMBOLS:
            return Exchange("fp16", 1, f"all models are on this machine, and {symbols:,} logits a token are few")
        return Exchange("tokens:16", 1, f"{symbols:,} logits a token are many; 16 sampled tokens stand for them")
    assert step_s is not None
    told = ""
    for codec, interval in [("fp16", 1), *(("tokens:16", interval) for interval in INTERVALS)]:
        bits_per_value = 8 * make_codec(codec).num_bytes(rows, symbols) / (rows * symbols)
        bits = prediction_bits(num_models, rows, symbols, interval, bits_per_value)
        share = bits / speed / step_s
        told = f"{bits / 1e6:,.3g} Mbit an update take {bits / speed:.3g} s at {link}, "
        told += f"{share:.0%} of an update of {step_s:.2g} s"
        if share <= SHARE:
            return Exchange(codec, interval, f"{told}; at most {SHARE:.0%} is meant")
    return Exchange(codec, interval, f"{told}: more than {SHARE:.0%}, and nothing smaller is known; updates will wait")


def last_of(settings: str, flag: str) -> int:
    """The value of a flag, the last where it stands twice."""
    words = settings.split()
    return int(words[len(words) - 1 - words[::-1].index(flag) + 1])


def main() -> None:
    """Command line; prints the reasons, and writes what ``train.sh`` reads."""
    parser = argparse.ArgumentParser(description="Choices for a corpus of one's own.")
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="file of shell variables to write")
    parser.add_argument("--languages", nargs=2, required=True)
    parser.add_argument("--size", choices=("auto", *SIZES), default="auto")
    parser.add_argument("--vocab-size", type=int, help="symbols that the vocabulary has; default: by the size")
    parser.add_argument("--codec", default="auto", help="auto: by the link")
    parser.add_argument("--link", default="local")
    parser.add_argument("--models", type=int, default=2)
    parser.add_argument("--step-s", type=float, help="measured seconds of an update")
    parser.add_argument("--gpu", action="store_true", help="a GPU is here")
    args = parser.parse_args()
    try:
        bits_per_s(args.link)
        pairs, characters = num_characters(args.raw, args.languages)
        if args.size == "auto":
            name, why = choose_size(characters, args.gpu)
        else:
            name, why = args.size, "as told by --size"
        size = SIZES[name]
        symbols = args.vocab_size or size.vocab_size
        rows = last_of(size.settings, "--max-tokens")
        if "--update-freq" in size.settings:
            rows *= last_of(size.settings, "--update-freq")
        lines = {"SIZE": name, "VOCAB_SIZE": str(symbols), "MAX_EPOCH": str(size.max_epoch)}
        told = [
            f"text: {pairs:,} pairs, {characters:,} characters of both sides",
            f"model: {name} ({size.told}): {why}",
            f"vocabulary: at most {symbols:,} joint symbols" + ("" if args.vocab_size else f", as goes with {name}"),
            f"length: {size.max_epoch} epochs of each model",
        ]
        if bits_per_s(args.link) is None or args.step_s is not None:
            exchange = choose_exchange(args.link, symbols, rows, args.models, args.step_s)
            if args.codec != "auto":
                exchange = Exchange(args.codec, 1, "as told by --codec")
            divergence = "mse" if args.codec.startswith("columns") else "kl"
            lines |= {"CODEC": exchange.codec, "INTERVAL": str(exchange.interval), "DIVERGENCE": divergence}
            often = "every update" if exchange.interval == 1 else f"every {exchange.interval}th update"
            told.append(f"exchange: {exchange.codec}, {divergence}, at {often}: {exchange.reason}")
        text = "".join(f"CHOSEN_{key}={shlex.quote(value)}\n" for key, value in lines.items())
        text += f"CHOSEN_SETTINGS=({shlex.join(shlex.split(size.settings))})\n"
        args.out.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"choose.py: {error}")
    print(*told, sep="\n")


if __name__ == "__main__":
    main()
