"""Owns the choices of ``recipes/own_corpus``: size of model and vocabulary, codec and interval, each with its reason.

Sizes go by the amount of text; codec, interval and parts by the link, as ``codistill-launch --link`` proposes them. It
trains nothing; the seconds of an update are handed to it.
"""

import argparse
import dataclasses
import math
import shlex
import sys
from pathlib import Path

from fairseq_codistill.launch.dial import Proposal, parse_link, propose
from fairseq_codistill.launch.plan import setting_of
from fairseq_codistill.launch.traffic import num_rows

# Settings of recipes: small is multi30k_en_de's, which was run, medium is iwslt14_de_en's, both in their settings.sh;
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
LOCAL = "local"  # a link that is none


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


def choose_exchange(link: str, symbols: int, rows: int, num_models: int, step_s: float | None) -> Proposal:
    """What travels, how and how often.

    Args:
        link: ``local`` or a speed.
        symbols: of the vocabulary.
        rows: target tokens of an update on one device, at most.
        num_models: n.
        step_s: seconds of an update without communication; needed for a speed.

    Raises:
        ValueError: ``link`` cannot be read.
    """
    kl = {"--codistill-divergence": "kl"}
    if num_models == 1:
        return Proposal(kl, ["one model alone exchanges nothing"])
    if link == LOCAL:
        if symbols <= DENSE_SYMBOLS:
            why = f"fp16: all models are on this machine, and {symbols:,} logits a token are few"
            return Proposal({"--codistill-codec": "fp16"} | kl, [why])
        why = f"tokens:16: {symbols:,} logits a token are many, and 16 that are drawn stand for them"
        return Proposal({"--codistill-codec": "tokens:16"} | kl, [why])
    assert step_s is not None
    proposal = propose(parse_link(link), step_s, rows, symbols, num_models)
    return Proposal(proposal.settings | kl, proposal.why)


def rows_of(settings: list[str]) -> int:
    """Target tokens of an update on one device, at most, as ``codistill-launch --link`` reads them off a command.

    Raises:
        ValueError: they cannot be read.
    """
    rows = num_rows(["fairseq-train", *settings])
    if rows.value is None:
        raise ValueError(rows.source.partition(": give")[0])
    return rows.value


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
    parser.add_argument("typed", nargs="*", help="after --: settings of fairseq that win over those of the size")
    parser.add_argument("--gpu", action="store_true", help="a GPU is here")
    args = parser.parse_args()
    try:
        if args.link != LOCAL:
            parse_link(args.link)
        pairs, characters = num_characters(args.raw, args.languages)
        if args.size == "auto":
            name, why = choose_size(characters, args.gpu)
        else:
            name, why = args.size, "as told by --size"
        size = SIZES[name]
        symbols = args.vocab_size or size.vocab_size
        rows = rows_of([*size.settings.split(), *args.typed])
        length = setting_of(["fairseq-train", *args.typed], "--max-epoch")
        lines = {"SIZE": name, "VOCAB_SIZE": str(symbols), "MAX_EPOCH": str(size.max_epoch)}
        told = [
            f"text: {pairs:,} pairs, {characters:,} characters of both sides",
            f"model: {name} ({size.told}): {why}",
            f"vocabulary: at most {symbols:,} joint symbols" + ("" if args.vocab_size else f", as goes with {name}"),
            f"length: {length or size.max_epoch} epochs of each model" + (", as typed" if length else ""),
        ]
        exchange = None
        if args.codec != "auto":
            divergence = "mse" if args.codec.startswith("columns") else "kl"
            settings = {"--codistill-codec": args.codec, "--codistill-divergence": divergence}
            exchange = Proposal(settings, ["as told by --codec"])
        elif args.link == LOCAL or args.step_s is not None:
            exchange = choose_exchange(args.link, symbols, rows, args.models, args.step_s)
        text = "".join(f"CHOSEN_{key}={shlex.quote(value)}\n" for key, value in lines.items())
        text += f"CHOSEN_SETTINGS=({shlex.join(shlex.split(size.settings))})\n"
        if exchange is not None:
            words = [word for pair in exchange.settings.items() for word in pair]
            text += f"CHOSEN_EXCHANGE=({shlex.join(words)})\n"
            told += [f"exchange: {' '.join(words)}", *(f"  - {why}" for why in exchange.why)]
        args.out.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"choose.py: {error}")
    print(*told, sep="\n")


if __name__ == "__main__":
    main()
