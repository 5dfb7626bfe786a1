"""Owns text in and subwords out for the recipes: learns one joint sentencepiece BPE and encodes every split with it.

Reads ``RAW/{train,valid,test}.{source,target}``, writes ``OUT/spm.model``, ``OUT/spm.vocab`` and the encoded files of
the same names. It must never change the raw text: scores are computed against it.
"""

import argparse
import re
import sys
from pathlib import Path

import sentencepiece

SPLITS = ("train", "valid", "test")
# What sentencepiece says of a text that holds fewer symbols, and of one that has more characters than that.
TOO_MANY = re.compile(r"value <= (\d+)")
TOO_FEW = re.compile(r"required_chars\. \d+ vs (\d+)")


def learn(raw: Path, out: Path, languages: list[str], vocab_size: int, at_most: bool = False) -> None:
    """Learn one BPE on both sides of the training split.

    Args:
        at_most: where the text does not hold so many symbols take what it holds; where it has more characters than that
            (Chinese, Japanese), all of them and ``vocab_size`` others.

    Raises:
        ValueError: the text is too small for ``vocab_size``, or has more characters.
    """
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(raw / f"train.{language}") for language in languages],
            model_prefix=str(out / "spm"),
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = TOO_MANY.search(str(error))
        if at_most and most is not None and int(most.group(1)) < vocab_size:
            learn(raw, out, languages, int(most.group(1)))
            return
        if few := TOO_FEW.search(str(error)):
            characters = int(few.group(1))
            if at_most:
                print(f"{characters} different characters in the text: {characters + vocab_size} symbols")
                learn(raw, out, languages, characters + vocab_size, at_most)
                return
            raise ValueError(
                f"--vocab-size is {vocab_size}; the text has {characters} different characters: give more than that"
            ) from error
        raise ValueError(
            f"--vocab-size is {vocab_size}; sentencepiece cannot learn that many symbols: {error}"
        ) from error


def encode(raw: Path, out: Path, languages: list[str]) -> None:
    """Encode every split; a line stays a line."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "spm.model"))
    for split in SPLITS:
        for language in languages:
            name = f"{split}.{language}"
            # newline="\n": other line separators of Unicode inside a sentence must not split it.
            with (
                open(raw / name, encoding="utf-8", newline="\n") as source,
                open(out / name, "w", encoding="utf-8", newline="\n") as target,
            ):
                target.writelines(
                    " ".join(processor.encode(line.rstrip("\r\n"), out_type=str)) + "\n" for line in source
                )


def main() -> None:
    """Command line: ``python recipes/tools/bpe.py --raw DIR --out DIR --languages de en --vocab-size 1000``."""
    parser = argparse.ArgumentParser(description="Learn a joint sentencepiece BPE and encode every split.")
    parser.add_argument("--raw", type=Path, required=True, help="folder of {train,valid,test}.{source,target}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the encoded files")
    parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
    parser.add_argument("--vocab-size", type=int, required=True, help="joint symbols")
    parser.add_argument("--at-most", action="store_true", help="as many as the text bears: fewer, or more")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        learn(args.raw, args.out, args.languages, args.vocab_size, args.at_most)
        encode(args.raw, args.out, args.languages)
    except (OSError, ValueError) as error:
        sys.exit(f"bpe.py: {error}")


if __name__ == "__main__":
    main()
