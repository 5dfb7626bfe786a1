"""Owns the way from the files that the evaluation campaigns publish to raw text, a sentence a line, in three splits.

Knows the formats (tagged IWSLT text, XML and SGML with ``<seg>``, plain and gzipped text) and what belongs to which
split. It drops pairs, never lines: the two sides of a split always have as many lines.
"""

import argparse
import gzip
import html
import itertools
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Pair = tuple[str, str]
SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>", re.DOTALL)
# Lines of IWSLT's training files that are about a talk, not of it; titles and descriptions are translated text.
ABOUT = re.compile(r"<(url|talkid|keywords|speaker|reviewer|translator|doc|/doc)\b")
MARKUP = re.compile(r"</?(title|description)>")
WORD = re.compile(r"\w+|[^\w\s]")

WMT16_TRAIN = ("europarl-v7.de-en", "commoncrawl.de-en", "news-commentary-v11.de-en")
IWSLT14_TEST = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
IWSLT14_VALID_EVERY = 23  # of the training pairs; fairseq's example takes the same


def find(folders: Sequence[Path], *names: str) -> Path:
    """The file of one of these names, plain or ``.gz``, anywhere below the folders; the first name that is there wins.

    Raises:
        ValueError: there is none.
    """
    for name in names:
        for path in (path for folder in folders for path in sorted([*folder.rglob(name), *folder.rglob(name + ".gz")])):
            if path.is_file():
                return path
    searched = " and ".join(map(str, folders))
    raise ValueError(f"{searched} holds none of {', '.join(names)} (plain or .gz, in any folder below)")


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a text file, plain or gzipped; only a newline ends a line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:  # without a mark of byte order
        try:
            for line in file:
                yield " ".join(line.split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 ({error.reason}); convert it, as with: iconv -t UTF-8") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is cut short, damaged or no gzip file ({error}); fetch it anew") from error


def segments_of(path: Path) -> Iterator[str]:
    """Contents of the ``<seg>`` elements of an SGML or XML file, entities resolved; a plain file's lines."""
    if not path.name.removesuffix(".gz").endswith((".sgm", ".xml")):
        yield from lines_of(path)
        return
    for segment in SEGMENT.findall("\n".join(lines_of(path))):
        yield " ".join(html.unescape(segment).split())


def pairs_of(source: Path, target: Path, read=lines_of) -> Iterator[Pair]:
    """Sentence pairs of two files.

    Raises:
        ValueError: one has more sentences than the other.
    """
    for number, (left, right) in enumerate(itertools.zip_longest(read(source), read(target)), start=1):
        if left is None or right is None:
            raise ValueError(f"{source} and {target} differ in length: one ends before line {number}")
        yield left, right


def clean(pairs: Iterable[Pair], max_words: int, max_ratio: float = 1.5) -> Iterator[Pair]:
    """Pairs of which both sides have 1 to ``max_words`` words and neither ``max_ratio`` times as many as the other.

    Marks of punctuation count as words, as they do after tokenisation.
    """
    for pair in pairs:
        shorter, longer = sorted(len(WORD.findall(side)) for side in pair)
        if shorter >= 1 and longer <= max_words and longer <= max_ratio * shorter:
            yield pair


def iwslt14(folders: Sequence[Path], source: str, target: str) -> dict[str, Iterable[Pair]]:
    """IWSLT'14 German-English: every 23rd training pair validates; both dev sets and three years are the test."""

    def tagged() -> Iterator[Pair]:
        files = [find(folders, f"train.tags.de-en.{language}") for language in (source, target)]
        for pair in pairs_of(*files):
            if not any(ABOUT.search(side) for side in pair):
                yield MARKUP.sub("", pair[0]).strip(), MARKUP.sub("", pair[1]).strip()

    cleaned = list(clean(tagged(), max_words=175))
    is_valid = [number % IWSLT14_VALID_EVERY == 0 for number in range(1, len(cleaned) + 1)]
    test = [
        pairs_of(*(find(folders, f"IWSLT14.{name}.de-en.{language}.xml") for language in (source, target)), segments_of)
        for name in IWSLT14_TEST
    ]
    return {
        "train": [pair for pair, kept in zip(cleaned, is_valid, strict=True) if not kept],
        "valid": itertools.compress(cleaned, is_valid),
        "test": itertools.chain.from_iterable(test),
    }


def wmt16(folders: Sequence[Path], source: str, target: str) -> dict[str, Iterable[Pair]]:
    """WMT'16 English-German: three corpora for training, newstest2013 for validation, newstest2014 for the test."""
    corpora = [
        pairs_of(*(find(folders, f"{name}.{language}") for language in (source, target))) for name in WMT16_TRAIN
    ]

    def news(year: int) -> Iterator[Pair]:
        sides = [("src", source), ("ref", target)]
        files = [
            find(
                folders,
                f"newstest{year}-deen-{kind}.{language}.sgm",
                f"newstest{year}-{kind}.{language}.sgm",
                f"newstest{year}.{language}",
            )
            for kind, language in sides
        ]
        return pairs_of(*files, segments_of)

    return {"train": clean(itertools.chain(*corpora), max_words=250), "valid": news(2013), "test": news(2014)}


CORPORA = {"iwslt14": iwslt14, "wmt16": wmt16}


def write(splits: dict[str, Iterable[Pair]], out: Path, source: str, target: str) -> dict[str, int]:
    """Write ``OUT/{train,valid,test}.{source,target}``; returns the pairs of each split.

    Raises:
        ValueError: a split is empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, pairs in splits.items():
        names = [out / f"{split}.{language}" for language in (source, target)]
        count = 0
        with (
            open(names[0], "w", encoding="utf-8", newline="\n") as left,
            open(names[1], "w", encoding="utf-8", newline="\n") as right,
        ):
            for count, pair in enumerate(pairs, start=1):  # noqa: B007 - how many there were
                left.write(pair[0] + "\n")
                right.write(pair[1] + "\n")
        if not count:
            raise ValueError(f"no sentence pairs for {split}; are the files whole?")
        counts[split] = count
    return counts


def main() -> None:
    """Command line: ``python recipes/tools/corpus.py wmt16 --from DIR --out DIR --languages en de``."""
    parser = argparse.ArgumentParser(description="Raw text of a campaign's corpus, from the files it publishes.")
    parser.add_argument("corpus", choices=sorted(CORPORA))
    parser.add_argument(
        "--from", dest="folders", type=Path, action="append", required=True, help="where the files are, unpacked"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for {train,valid,test}.{source,target}")
    parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
    args = parser.parse_args()
    try:
        counts = write(CORPORA[args.corpus](args.folders, *args.languages), args.out, *args.languages)
    except (OSError, ValueError) as error:
        sys.exit(f"corpus.py: {error}")
    for split, count in counts.items():
        print(f"{split}: {count} pairs")


if __name__ == "__main__":
    main()
