"""Owns scores: detokenised sacreBLEU, with its signature, of what ``fairseq-generate`` wrote against raw references.

It must never see subwords or tokenised references: run ``fairseq-generate`` with ``--remove-bpe sentencepiece``.
"""

import argparse
import json
import sys
from pathlib import Path

from sacrebleu.metrics import BLEU


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


def main() -> None:
    """Command line: prints one line, and writes JSON beside it with ``--json``."""
    parser = argparse.ArgumentParser(description="sacreBLEU of fairseq-generate's output.")
    parser.add_argument("--generated", type=Path, required=True, help="file with the output of fairseq-generate")
    parser.add_argument("--reference", type=Path, required=True, help="raw target side, a sentence a line")
    parser.add_argument("--hypotheses", type=Path, help="write the translations here, a sentence a line")
    parser.add_argument("--json", type=Path, help="write score and signature here")
    parser.add_argument("--label", default="", help="printed in front")
    args = parser.parse_args()
    try:
        references = args.reference.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        hypotheses = read_hypotheses(args.generated, len(references))
    except (OSError, ValueError) as error:
        sys.exit(f"score.py: {error}")
    metric = BLEU()
    score = metric.corpus_score(hypotheses, [references])
    signature = str(metric.get_signature())
    if args.hypotheses:
        args.hypotheses.write_text("".join(line + "\n" for line in hypotheses), encoding="utf-8", newline="\n")
    if args.json:
        record = {"bleu": round(score.score, 2), "signature": signature, "num_sentences": len(references)}
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(f"{args.label}{': ' if args.label else ''}BLEU {score.score:.2f}   {signature}")


if __name__ == "__main__":
    main()
