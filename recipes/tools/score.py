"""Owns scores: sacreBLEU and chrF, detokenised, of what ``fairseq-generate`` wrote against raw references.

Each is told with its signature. Beside them, where sacremoses is installed, BLEU of Moses tokens: the figure of older
papers and of fairseq's examples. It must never see subwords or tokenised references: run ``fairseq-generate`` with
``--remove-bpe``.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import moses
from sacrebleu.metrics import BLEU, CHRF

# sacreBLEU's tokenisers of languages that put no spaces between words: 13a, that of all others, would take a sentence
# for a word. By ISO 639-1 and 639-2 and -3, which names of corpora use (zho_Hans, cmn, jpn_Jpan).
TOKENISERS = {
    **dict.fromkeys("zh zho chi cmn".split(), "zh"),
    **dict.fromkeys("ja jpn th tha lo lao km khm my mya bur bo bod tib yue".split(), "char"),
}
LONGEST_WORD = 20  # characters, on the average; of languages with spaces between words it is 4 to 8


def read_hypotheses(generated: Path, num_expected: int) -> list[str]:
    """Detokenised best hypotheses (``D-`` lines) in the order of the corpus.

    Args:
        generated: what ``fairseq-generate`` printed.
        num_expected: sentences of the reference.

    Raises:
        ValueError: a sentence is missing, or there are more than the reference has.
    """
    hypotheses: dict[int, str] = {}
    for line in generated.read_text(encoding="utf-8").split("\n"):
        fields = line.split("\t")
        if len(fields) == 3 and fields[0].startswith("D-"):
            hypotheses.setdefault(int(fields[0][2:]), fields[2])
    if sorted(hypotheses) != list(range(num_expected)):
        raise ValueError(
            f"{generated} holds {len(hypotheses)} sentences where the reference has {num_expected}; was generation "
            "stopped, or run on another data folder?"
        )
    return [hypotheses[i] for i in range(num_expected)]


def tokeniser_of(language: str, references: list[str]) -> str:
    """sacreBLEU's tokeniser of a language without spaces between words; empty for any other.

    >>> tokeniser_of("zho_Hans", []), tokeniser_of("xx", ["\u4e00" * 30]), tokeniser_of("en-GB", ["a word"])
    ('zh', 'char', '')
    """
    known = TOKENISERS.get(re.split("[-_]", language)[0].lower(), "")
    words = sum(len(line.split()) for line in references)
    if not known and sum(map(len, references)) > LONGEST_WORD * words:
        print("score.py: the references have no spaces between words, so BLEU is of characters", file=sys.stderr)
        return "char"
    return known


def tokenised_bleu(hypotheses: list[str], references: list[str], language: str, subwords: str) -> dict[str, float]:
    """BLEU of tokens, in percent, and for German that with compounds split; empty where sacremoses is missing.

    Args:
        hypotheses: as ``fairseq-generate`` wrote them: tokens if ``subwords`` begins with ``moses``.
        references: raw sentences.
        language: of both.
        subwords: how the data were prepared.
    """
    lower_case = subwords == "moses-lower-case"
    try:
        tokenise = moses.make_tokeniser(language, lower_case)
    except ImportError:
        return {}
    ours = hypotheses if subwords.startswith("moses") else [tokenise(line) for line in hypotheses]
    theirs = [tokenise(line) for line in references]
    metric = BLEU(tokenize="none", force=True)
    scores = {"bleu_tokenised": metric.corpus_score(ours, [theirs]).score}
    if language == "de":
        split = [[moses.split_compounds(line) for line in lines] for lines in (ours, theirs)]
        scores["bleu_tokenised_compounds_split"] = metric.corpus_score(split[0], [split[1]]).score
    return {name: round(score, 2) for name, score in scores.items()}


def main() -> None:
    """Command line: prints one line, and writes JSON beside it with ``--json``."""
    parser = argparse.ArgumentParser(description="sacreBLEU of fairseq-generate's output.")
    parser.add_argument("--generated", type=Path, required=True, help="file with the output of fairseq-generate")
    parser.add_argument("--reference", type=Path, required=True, help="raw target side, a sentence a line")
    parser.add_argument("--hypotheses", type=Path, help="write the translations here, a sentence a line")
    parser.add_argument("--json", type=Path, help="write score and signature here")
    parser.add_argument(
        "--language", default="", help="of the target side: how words are told apart, and BLEU of tokens as well"
    )
    parser.add_argument(
        "--subwords",
        choices=("sentencepiece", "moses", "moses-lower-case"),
        default="sentencepiece",
        help="how the data were prepared",
    )
    parser.add_argument("--label", default="", help="printed in front")
    args = parser.parse_args()
    try:
        references = args.reference.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        hypotheses = read_hypotheses(args.generated, len(references))
    except (OSError, ValueError) as error:
        sys.exit(f"score.py: {error}")
    generated, is_lower_case = hypotheses, args.subwords == "moses-lower-case"
    if args.subwords.startswith("moses"):
        try:
            hypotheses = list(map(moses.make_detokeniser(args.language), hypotheses))
        except ImportError:
            sys.exit(f"score.py: {moses.MISSING}")
    of_language = tokeniser_of(args.language, references)
    metric = BLEU(lowercase=is_lower_case, tokenize=of_language or "13a")
    score = metric.corpus_score(hypotheses, [references])
    signature = str(metric.get_signature())
    characters = CHRF(lowercase=is_lower_case)
    chrf = characters.corpus_score(hypotheses, [references])
    chrf_signature = str(characters.get_signature())
    tokenised = {}
    if args.language and not of_language:
        tokenised = tokenised_bleu(generated, references, args.language, args.subwords)
    if args.hypotheses:
        args.hypotheses.write_text("".join(line + "\n" for line in hypotheses), encoding="utf-8", newline="\n")
    if args.json:
        record = {"bleu": round(score.score, 2), "signature": signature, "num_sentences": len(references)}
        record |= {"chrf": round(chrf.score, 2), "chrf_signature": chrf_signature, **tokenised}
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(f"{args.label}{': ' if args.label else ''}BLEU {score.score:.2f}   {signature}")
    print(f"    chrF {chrf.score:.2f}   {chrf_signature}")
    for name, value in tokenised.items():
        print(f"    {name} {value:.2f}")


if __name__ == "__main__":
    main()
