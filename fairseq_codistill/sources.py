"""Owns the options of what a model learns from beside the batches that all share: teachers that never change, and
what models share whose training data never leave.

Nothing in this file imports fairseq or torch.
"""

import dataclasses
import math

from fairseq_codistill.option import ConfigError, option

CACHED_CODECS = ("topk", "tokens")


@dataclasses.dataclass
class TeacherConfig:
    """Models that never change and predict every batch."""

    codistill_teacher: str = option(
        "",
        "CHECKPOINT[:WEIGHT] of a model that never changes and predicts every batch; the weight of its divergence is "
        "1 unless given. May be given several times, alone (ordinary distillation) or beside live peers",
        repeatable=True,
    )
    codistill_teacher_device: str = option(
        "", "where the teachers compute, such as cpu or cuda:1; default: the model's"
    )
    codistill_teacher_cache: str = option(
        "",
        "folder to keep the teachers' predictions in: those of a sample are computed once and read from then on. One "
        "that belongs to other teachers, data or codecs is refused",
    )
    codistill_teacher_codec: str = option(
        "topk:16", "with --codistill-teacher-cache: what is kept of them, topk:K (mse or kl) or tokens:K (kl only)"
    )

    def check_teachers(self, divergence: str) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        split_teachers(self.codistill_teacher)
        name, colon, size = self.codistill_teacher_codec.partition(":")
        if name not in CACHED_CODECS or not size.isdecimal() or int(size) < 1:
            raise ConfigError(
                f"--codistill-teacher-codec is {self.codistill_teacher_codec!r}; it must be topk:K or tokens:K with a "
                "K of 1 or more: topk:16"
            )
        if self.codistill_teacher_cache and name == "tokens" and divergence != "kl":
            raise ConfigError(
                f"--codistill-teacher-codec is {self.codistill_teacher_codec!r} with --codistill-divergence "
                f"{divergence}, which drawn tokens do not determine; use topk:K, or --codistill-divergence kl"
            )


@dataclasses.dataclass
class OwnDataConfig:
    """Models whose training data differ, and never leave."""

    codistill_own_data: bool = option(
        False,
        "with --codistill-exchange checkpoints: every model has data, order and length of its own; only what the "
        "checkpoints need must be equal. Give it on all models or none",
    )
    codistill_transfer: str = option(
        "",
        "fairseq: a split of the data that all models have. At every T-th update one batch of it is predicted, "
        "exchanged and distilled on, in an order that all share; what they train on is their own, and not compared. "
        "codistill-vision has --transfer-dataset",
    )

    def check_own_data(self, exchange: str) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        if self.codistill_own_data and exchange != "checkpoints":
            raise ConfigError(
                f"--codistill-own-data is set with --codistill-exchange {exchange}: predictions are exchanged of "
                "batches that all models see. Use --codistill-exchange checkpoints, or a transfer set "
                "(--codistill-transfer)"
            )
        if self.codistill_transfer and exchange != "predictions":
            raise ConfigError(
                f"--codistill-transfer is {self.codistill_transfer!r} with --codistill-exchange {exchange}: copies of "
                "the peers predict each model's own batches; leave it out, and give --codistill-own-data"
            )


def split_teachers(text: str) -> list[tuple[str, float]]:
    """What ``--codistill-teacher`` says: file and weight of each teacher.

    Raises:
        ConfigError: a weight that is none, or a weight without a file.

    >>> split_teachers("big.pt,other.pt:0.5")
    [('big.pt', 1.0), ('other.pt', 0.5)]
    """
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        file, colon, number = entry.rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:  # a colon of the path
            file, colon, weight = entry, "", 1.0
        if not (file if colon else entry):
            raise ConfigError(
                f"--codistill-teacher is {text!r}, which names no file before {entry!r}; give FILE:WEIGHT"
            )
        found.append((file if colon else entry, check_weight(weight, f"--codistill-teacher is {entry!r}")))
    return found


def check_weight(weight: float, what: str) -> float:
    """Raises:
    ConfigError: no weight of a divergence.
    """
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"{what}; the weight must be a finite number above 0")
    return weight
