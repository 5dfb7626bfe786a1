"""Owns nothing but an old name: ``python -m fairseq_codistill.average``, of scripts that were written for 0.1.0.

What it does is in :mod:`fairseq_codistill.fairseq_side.average`. It can go with 0.3.0.
"""

import sys

from fairseq_codistill.fairseq_side.average import main

if __name__ == "__main__":
    print("fairseq_codistill.average has moved; call python -m fairseq_codistill.fairseq_side.average", file=sys.stderr)
    main()
