"""Owns Moses tokenisation for the recipes: tokenised text with a joint BPE of subword-nmt, as fairseq's own examples.

Reads ``RAW/{train,valid,test}.{source,target}``, writes ``OUT/codes`` and the encoded files of the same names. The work
is sacremoses' and subword-nmt's; without them (``pip install "fairseq-codistill[moses]"``) it says so.
"""

import argparse
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

SPLITS = ("train", "valid", "test")
MISSING = 'sacremoses and subword-nmt are not installed; run: pip install "fairseq-codistill[moses]"'


def make_tokeniser(language: str, lower_case: bool = False) -> Callable[[str], str]:
    """A raw sentence -> its tokens, joined by blanks: punctuation normalised, nothing escaped.

    Raises:
        ImportError: sacremoses is not installed.
    """
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normaliser, tokeniser = MosesPunctNormalizer(language), MosesTokenizer(language)

    def tokenise(sentence: str) -> str:
        tokens = tokeniser.tokenize(normaliser.normalize(sentence), return_str=True, escape=False)
        return tokens.lower() if lower_case else tokens

    return tokenise


def make_detokeniser(language: str) -> Callable[[str], str]:
    """Tokens joined by blanks -> a sentence as people write it.

    Raises:
        ImportError: sacremoses is not installed.
    """
    from sacremoses import MosesDetokenizer

    detokeniser = MosesDetokenizer(language)
    return lambda tokens: detokeniser.detokenize(tokens.split(), unescape=False)


def split_compounds(tokens: str) -> str:
    """Hyphens inside words as tokens of their own, the way German has been scored since Vaswani et al. 2017."""
    return re.sub(r"(\S)-(?=\S)", r"\1 ##AT##-##AT## ", tokens)


def prepare(raw: Path, out: Path, languages: list[str], vocab_size: int, lower_case: bool) -> None:
    """Tokenise every split, learn one BPE on both sides of the training split, encode.

    Raises:
        ImportError: sacremoses or subword-nmt is not installed.
    """
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    tokenised: dict[str, list[str]] = {}
    for language in languages:
        tokenise = make_tokeniser(language, lower_case)
        for split in SPLITS:
            name = f"{split}.{language}"
            with open(raw / name, encoding="utf-8", newline="\n") as source:
                tokenised[name] = [tokenise(line.rstrip("\r\n")) for line in source]
    training = io.StringIO("\n".join(line for language in languages for line in tokenised[f"train.{language}"]) + "\n")
    with open(out / "codes", "w", encoding="utf-8") as codes:
        learn_bpe(training, codes, vocab_size, total_symbols=True)
    with open(out / "codes", encoding="utf-8") as codes:
        encoder = BPE(codes)
    for name, lines in tokenised.items():
        with open(out / name, "w", encoding="utf-8", newline="\n") as target:
            target.writelines(encoder.process_line(line) + "\n" for line in lines)


def main() -> None:
    """Command line: ``python recipes/tools/moses.py --raw DIR --out DIR --languages de en --vocab-size 10000``."""
    parser = argparse.ArgumentParser(description="Tokenise with Moses, learn a joint BPE with subword-nmt, encode.")
    parser.add_argument("--raw", type=Path, required=True, help="folder of {train,valid,test}.{source,target}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the codes and the encoded files")
    parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
    parser.add_argument("--vocab-size", type=int, required=True, help="joint symbols")
    parser.add_argument("--lower-case", action="store_true", help="lower-case everything")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        prepare(args.raw, args.out, args.languages, args.vocab_size, args.lower_case)
    except ImportError:
        sys.exit(f"moses.py: {MISSING}")
    except (OSError, ValueError) as error:
        sys.exit(f"moses.py: {error}")


if __name__ == "__main__":
    main()
