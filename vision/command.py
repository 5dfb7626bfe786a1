"""Owns the start of the console script ``codistill-vision``: help, version and wrong options without waiting for torch.

Whatever takes training is :mod:`vision.train`, which ``python -m`` starts without this file.
"""

import sys
from collections.abc import Sequence

from fairseq_codistill.config import ConfigError

from .options import parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``codistill-vision``.

    Returns:
        what :func:`vision.train.main` does; 2 for a setting that cannot work.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        parse_options(arguments)  # --help and --version end here
    except ConfigError as error:
        print(f"codistill-vision: error: {error}", file=sys.stderr)
        return 2
    from .train import main as train  # loads torch and timm, which takes seconds

    return train(arguments)
