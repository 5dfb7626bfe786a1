"""Owns the options of how much of the exchange each model takes part in, and of how the peers' terms are weighed.

Nothing in this file imports fairseq or torch.
"""

import dataclasses
import math

from fairseq_codistill.choices import DENSE_CODECS, split_codec
from fairseq_codistill.option import ConfigError, flag_name, option

PEER_WEIGHTS = ("uniform", "validation")


@dataclasses.dataclass
class SharingConfig:
    """How much travels, and what is made of it."""

    codistill_peers_per_position: int = option(
        0,
        "p: at each position every rank exchanges with p of the n - 1 others, drawn from the data seed, so that "
        "traffic and waiting do not grow with n (predictions only; n x p must be even); 0: with all",
    )
    codistill_budget_mbit: float = option(
        0.0,
        "with the codec counts:K: at most about that many Mbit an update and device; draws a row (up to K) and the "
        "positions of exchange follow from it; 0: no budget",
    )
    codistill_divergence_beta: float = option(
        0.5,
        "beta of --codistill-divergence js, above 0 and below 1: towards 0 it is like kl, towards 1 like reverse_kl",
    )
    codistill_temperature: float = option(
        1.0, "divides the logits of both sides before the softmax of kl, reverse_kl and js, times its square"
    )
    codistill_peer_weights: str = option(
        "uniform",
        "uniform: all peers count alike; validation: one whose validation loss is x nats above this model's counts "
        "exp(-x), so that a weak model does not pull a strong one down",
        PEER_WEIGHTS,
    )

    def check_sharing(
        self, num_models: int, codec: str, divergence: str, exchange: str, has_teacher_cache: bool
    ) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        self._check_peers(num_models, codec, exchange)
        name, _ = split_codec(codec)
        budget = self.codistill_budget_mbit
        if not (math.isfinite(budget) and budget >= 0):
            raise ConfigError(f"--codistill-budget-mbit is {budget!r}; it must be a finite number, 0 (none) or more")
        if budget and (name != "counts" or exchange != "predictions"):
            raise ConfigError(
                f"--codistill-budget-mbit is {budget:g} with --codistill-codec {codec} and --codistill-exchange "
                f"{exchange}: only the codec counts:K sends as much as there is room for; use it, with the largest K "
                "that is worth sending: counts:16"
            )
        self._check_divergence(divergence, has_teacher_cache)
        if self.codistill_peer_weights not in PEER_WEIGHTS:
            raise ConfigError(
                f"--codistill-peer-weights is {self.codistill_peer_weights!r}; it must be one of "
                f"{', '.join(PEER_WEIGHTS)}"
            )
        if self.codistill_peer_weights != "uniform" and name == "vote" and exchange == "predictions":
            raise ConfigError(
                f"--codistill-peer-weights is {self.codistill_peer_weights!r} with --codistill-codec vote: each model "
                "has one vote; use uniform, or the codec label"
            )

    def _check_peers(self, num_models: int, codec: str, exchange: str) -> None:
        p, flag = self.codistill_peers_per_position, "--codistill-peers-per-position"
        if p == 0 or num_models == 1:
            if p < 0:
                raise ConfigError(f"{flag} is {p}; it must be 0 (all) or more")
            return
        if not 0 < p < num_models:
            raise ConfigError(f"{flag} is {p}; it must be between 0 (all) and {num_models - 1}, the number of peers")
        if exchange != "predictions":
            raise ConfigError(f"{flag} is {p} with --codistill-exchange {exchange}; copies are kept of all: leave it 0")
        if p * num_models % 2:
            raise ConfigError(
                f"{flag} is {p} and --codistill-num-models is {num_models}: somebody would be left over at every "
                f"position, since n x p is odd; use {p + 1}, or an even number of models"
            )
        if p == 1 and split_codec(codec)[0] == "vote":
            raise ConfigError(f"{flag} is 1 with --codistill-codec vote: two models have no majority; use 2 or more")

    def _check_divergence(self, divergence: str, has_teacher_cache: bool) -> None:
        for field, name in (("codistill_divergence_beta", "js"), ("codistill_temperature", "")):
            value = getattr(self, field)
            most = 1.0 if name else math.inf
            if not (math.isfinite(value) and 0 < value < most):
                wanted = "above 0 and below 1" if name else "a finite number above 0"
                raise ConfigError(f"{flag_name(field)} is {value!r}; it must be {wanted}")
        if self.codistill_temperature != 1 and divergence == "mse":
            raise ConfigError(
                f"--codistill-temperature is {self.codistill_temperature:g} with --codistill-divergence mse, which "
                "compares the logits as they are; use 1, or --codistill-divergence kl"
            )
        if self.codistill_temperature != 1 and has_teacher_cache:
            raise ConfigError(
                f"--codistill-temperature is {self.codistill_temperature:g} with --codistill-teacher-cache, which "
                "keeps what teachers predict at temperature 1; use 1, or no cache"
            )

    def takes_temperature(self, codec: str) -> bool:
        """Whether the sender divides by the temperature, since what travels is not whole logits."""
        return self.codistill_temperature != 1 and split_codec(codec)[0] not in DENSE_CODECS
