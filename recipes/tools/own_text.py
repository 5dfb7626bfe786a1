"""Owns the way from somebody's own text files to three splits of raw text: which files, which pairs, which split.

Forms: ``{train,valid,test}.{en,fr}``, or one pair of files ``NAME.en`` and ``NAME.fr`` that is split here; plain or
``.gz``. What is held out never appears in training, and the same files always give the same splits.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from corpus import Pair, pairs_of, write

TEST = re.compile(r"test[^A-Za-z]")  # test2016, test_flickr; "testament" is a text like any other
VALID_NAMES = ("valid", "val", "dev", "validation")
MAX_CHARACTERS = 1000  # of a sentence; then its subwords, one a character at most, fit into a model's 1,024 positions
MAX_RATIO = 6.0  # of the characters of two sides; beyond it they hardly say the same
MIN_PAIRS = 200
MAX_HELD_OUT = 2000  # pairs for the test, and as many for validation
HELD_OUT_SHARE = 20  # one of so many, where there are fewer pairs


def file_of(folder: Path, name: str, language: str) -> Path | None:
    """``NAME.LANGUAGE`` in ``folder``, plain or gzipped."""
    for path in (folder / f"{name}.{language}", folder / f"{name}.{language}.gz"):
        if path.is_file():
            return path
    return None


def names_in(folder: Path, source: str, target: str) -> list[str]:
    """Every NAME of which both sides are there."""
    names = {path.name.removesuffix(".gz").removesuffix(f".{source}") for path in folder.glob(f"[!.]*.{source}*")}
    return sorted(name for name in names if file_of(folder, name, source) and file_of(folder, name, target))


def find(folder: Path, source: str, target: str) -> dict[str, str]:
    """Which split the files of which NAME are: ``train`` and, where they are there, ``valid`` and ``test``.

    Raises:
        ValueError: there is nothing for training, or more than one thing could be meant.
    """
    names = names_in(folder, source, target)
    rest = [name for name in names if name != "train" and name not in VALID_NAMES]
    found = {"train": "train"} if "train" in names else {}
    valid = [name for name in VALID_NAMES if name in names]
    if valid:
        found["valid"] = valid[0]
    tests = [name for name in rest if name == "test"] or [name for name in rest if TEST.match(name)]
    if len(tests) > 1:
        raise ValueError(
            f"{folder} holds several tests, {', '.join(tests)}; call the one to use test.{source} and .{target}"
        )
    if tests:
        found["test"] = tests[0]
    if "train" not in found:
        others = [name for name in rest if name not in tests]
        if len(others) != 1:
            there = f"several pairs of files, {', '.join(others)}" if others else "no pair of files"
            raise ValueError(
                f"{folder} holds {there}; it takes one pair NAME.{source} and NAME.{target}, a sentence a line, or "
                f"train.{source}, train.{target} and the like for valid and test; .gz is read, too"
            )
        found["train"] = others[0]
    return found


def read(folder: Path, name: str, source: str, target: str) -> Iterable[Pair]:
    """The pairs of one NAME.

    Raises:
        ValueError: one side has more lines than the other.
    """
    left, right = file_of(folder, name, source), file_of(folder, name, target)
    assert left is not None and right is not None  # noqa: PT018 - ``find`` has seen both
    return pairs_of(left, right)


def is_usable(pair: Pair) -> bool:
    """Whether a pair may train: neither side empty nor too long, neither far longer than the other."""
    shorter, longer = sorted(map(len, pair))
    return shorter > 0 and longer <= min(MAX_CHARACTERS, MAX_RATIO * max(shorter, 10))


def held_out(pairs: list[Pair], count: int) -> list[Pair]:
    """``count`` pairs with different sources, chosen by a hash of the source: the same whatever their order is."""
    first_of = {}
    for pair in pairs:
        first_of.setdefault(pair[0], pair)
    return sorted(first_of.values(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())[:count]


def splits_of(folder: Path, source: str, target: str) -> tuple[dict[str, list[Pair]], list[str]]:
    """Raw text of every split, and in sentences what was done to get it.

    Raises:
        ValueError: too few pairs, or a sentence of a given test that no model could take.
    """
    names = find(folder, source, target)
    everything = list(read(folder, names["train"], source, target))
    train = [pair for pair in everything if is_usable(pair)]
    said = [f"training text: {names['train']}.{{{source},{target}}}, {len(everything):,} pairs"]
    if len(train) < len(everything):
        said.append(
            f"left out: {len(everything) - len(train):,} pairs with an empty side, more than {MAX_CHARACTERS:,} "
            f"characters, or one side {MAX_RATIO:g} times as long as the other"
        )
    if len(train) < MIN_PAIRS:
        raise ValueError(
            f"{folder} holds {len(train)} usable pairs; {MIN_PAIRS} is the least that anything can be learnt from"
        )
    splits: dict[str, list[Pair]] = {}
    for split in ("test", "valid"):
        if split in names:
            splits[split] = list(read(folder, names[split], source, target))
            check_given(splits[split], f"{names[split]}.{{{source},{target}}}")
            said.append(f"{split}: {names[split]}.{{{source},{target}}}, {len(splits[split]):,} pairs")
        else:
            count = min(MAX_HELD_OUT, max(len(train) // HELD_OUT_SHARE, 20))
            splits[split] = held_out(train, count)
            said.append(f"{split}: {len(splits[split]):,} pairs of the training text, chosen by a hash of their source")
        sources = {pair[0] for pair in splits[split]}
        kept = [pair for pair in train if pair[0] not in sources]
        if split in names and len(kept) < len(train):
            said.append(f"left out: {len(train) - len(kept):,} training pairs whose source is in {split}")
        train = kept
    if not train:
        num_sources = len({pair[0] for pair in everything})
        raise ValueError(
            f"{folder} has {num_sources:,} different sources in {len(everything):,} pairs: holding out test and valid, "
            "whose sources may not be in training, leaves none; give files of their own for valid and test"
        )
    said.append(f"train: {len(train):,} pairs")
    return {"train": train, **splits}, said


def check_given(pairs: list[Pair], name: str) -> None:
    """Raises ``ValueError`` for a sentence that no model could take: of a given split no line is left out."""
    for number, pair in enumerate(pairs, start=1):
        if max(map(len, pair)) > MAX_CHARACTERS:
            raise ValueError(f"line {number} of {name} has more than {MAX_CHARACTERS:,} characters; split or remove it")


def main() -> None:
    """Command line: ``python recipes/tools/own_text.py --from DIR --out RAW --languages en fr``."""
    parser = argparse.ArgumentParser(description="Three splits of raw text from text files of one's own.")
    parser.add_argument("--from", dest="folder", type=Path, required=True, help="folder of the text files")
    parser.add_argument("--out", type=Path, required=True, help="folder for {train,valid,test}.{source,target}")
    parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
    args = parser.parse_args()
    try:
        splits, said = splits_of(args.folder, *args.languages)
        write(splits, args.out, *args.languages)
    except (OSError, ValueError) as error:
        sys.exit(f"own_text.py: {error}")
    print(*said, sep="\n")


if __name__ == "__main__":
    main()
