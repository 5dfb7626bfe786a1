"""fairseq imports the modules of this folder by itself when it is given the package as ``--user-dir``.

A user-dir of one's own brings codistillation in with one line, anywhere in it: ``import fairseq_codistill.tasks``.
"""

from fairseq_codistill.tasks import codistillation

__all__ = ["codistillation"]
