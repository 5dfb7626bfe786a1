"""Codistillation for fairseq and timm: n models that teach each other through their predictions.

This package is a fairseq ``--user-dir``: fairseq imports :mod:`fairseq_codistill.tasks` by itself, and that
registers the tasks ``codistill_*`` and the criterion ``codistillation``. Importing the package alone is light and
imports no fairseq, so that the framework-neutral parts (``coordinator``, ``losses``, ``schedules``) serve any
training loop.

Source: "A Closer Look at Codistillation for Distributed Training" (Sodhani et al. 2021).
"""

__version__ = "0.1.0"
