"""Owns translations to read: some sentences of the test, each with its reference and what every model makes of it.

It scores nothing and chooses by position alone, so that nobody picks the good ones.
"""

import argparse
import sys
from pathlib import Path


def lines_of(path: Path) -> list[str]:
    """Lines of a file; only a newline ends one."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def chosen(num_lines: int, count: int) -> list[int]:
    """Positions at equal distances."""
    count = min(count, num_lines)
    return [number * num_lines // count for number in range(count)]


def side_by_side(
    sources: list[str], references: list[str], translations: dict[str, list[str]], count: int
) -> list[str]:
    """A paragraph for each of ``count`` sentences.

    Raises:
        ValueError: the files differ in length.
    """
    lengths = {"source": len(sources), "reference": len(references)}
    lengths |= {name: len(lines) for name, lines in translations.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("different numbers of sentences: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
    width = max(len(name) for name in lengths)
    paragraphs = []
    for number in chosen(len(sources), count):
        rows = [("source", sources[number]), ("reference", references[number])]
        rows += [(name, lines[number]) for name, lines in translations.items()]
        paragraphs.append("\n".join(f"{name:<{width}}  {text}" for name, text in rows))
    return paragraphs


def main() -> None:
    """Command line: ``translations.py --source FILE --reference FILE --out FILE 'model 0=FILE' ...``; prints three."""
    parser = argparse.ArgumentParser(description="Translations to read.")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("translations", nargs="+", metavar="NAME=FILE")
    args = parser.parse_args()
    try:
        named = dict(text.split("=", 1) for text in args.translations)
        translations = {name: lines_of(Path(file)) for name, file in named.items()}
        paragraphs = side_by_side(lines_of(args.source), lines_of(args.reference), translations, args.count)
    except (OSError, ValueError) as error:
        sys.exit(f"translations.py: {error}")
    args.out.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    print("\n\n".join(paragraphs[index] for index in chosen(len(paragraphs), 3)))
    print(f"\n{len(paragraphs)} of them to read: {args.out}")


if __name__ == "__main__":
    main()
