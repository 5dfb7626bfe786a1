"""Owns every option of codistillation: name, default, help text and validation, once.

``fairseq`` (the criterion's dataclass) and ``vision`` build their command lines from these classes, so a new option
is one field here. Nothing in this file imports fairseq or torch.
"""

import dataclasses
import math

from fairseq_codistill.choices import CODEC_HELP, DIVERGENCES, check_codec
from fairseq_codistill.option import ConfigError, flag_name
from fairseq_codistill.option import option as _option
from fairseq_codistill.sharing import SharingConfig
from fairseq_codistill.sources import OwnDataConfig, TeacherConfig

__all__ = ["CodistillationConfig", "ConfigError", "LabelSmoothingConfig", "flag_name"]
EXCHANGES = ("predictions", "checkpoints")
REPLICA_MODES = ("auto", "eval", "train")
TRANSPORTS = ("zmq", "gloo")
PARTS = ("auto", "1", "2", "4")
MOST_PARTS = 4
REQUIREMENTS = ("start", "always", "never")


@dataclasses.dataclass
class CodistillationConfig(SharingConfig, TeacherConfig, OwnDataConfig):
    """Options shared by translation and vision. Field names are command-line flags with ``-`` for ``_``.

    >>> config = CodistillationConfig(codistill_num_models=2, codistill_addresses="node0:29600,node1:29600")
    >>> config.validate()
    >>> config.codistill_codec, config.is_codistilled
    ('fp16', True)
    """

    codistill_num_models: int = _option(1, "n, how many models teach each other; 1 trains alone")
    codistill_model_index: int = _option(0, "which of the n models this job trains, from 0")
    codistill_addresses: str = _option(
        "",
        "where the models listen: one HOST:PORT a model, comma separated, the same list for every job; rank r uses "
        "PORT + r. A model that spans hosts lists them with '+': a+b:29600 places the first half of its ranks on a",
    )
    codistill_bind: str = _option(
        "", "interface or address to listen on; default: the host of this model's own entry in --codistill-addresses"
    )
    codistill_relay: str = _option(
        "",
        "HOST:PORT of a codistill-relay, in place of --codistill-addresses: for jobs that can call out and not be "
        "called. Every job opens one connection to it; needs --codistill-keys",
    )
    codistill_keys: str = _option(
        "",
        "folder of keys that codistill-keys made: only jobs with these keys are let in, and all traffic is encrypted. "
        "Needed as soon as an address is not on loopback; 'none' sends in the clear to whoever is on the network",
    )
    codistill_transport: str = _option(
        "zmq",
        "zmq: ZeroMQ, encrypted with keys, takes back a model that was gone; gloo: torch.distributed, in the clear, a "
        "model that is lost stays lost. Predictions on a GPU travel through the CPU with both",
        TRANSPORTS,
    )
    codistill_run_id: str = _option(
        "",
        "name of the run; messages of another run are refused. Default: derived from --codistill-addresses; with a "
        "relay, the keys tell runs apart",
    )
    codistill_data_seed: int = _option(
        1, "seed of the order of the batches, shared by all models (initialisation and dropout use the job's --seed)"
    )
    codistill_weight: float = _option(
        1.0, "alpha, weight of the divergence from the peers; a model with 0 takes no part: set it on all or none"
    )
    codistill_weight_growth: float = _option(1.0, "alpha is multiplied by this at every epoch (the paper's NMT: 1.1)")
    codistill_weight_max: float = _option(
        0.0, "the growth of alpha ends here; 0: never, and a growth of 1.1 passes 100 after 49 epochs"
    )
    codistill_burn_in: int = _option(
        0, "no exchange and no distillation in the first that many updates' worth of data (counted by data position)"
    )
    codistill_divergence: str = _option(
        "mse",
        "mse: mean squared error of the logits; kl: Kullback-Leibler divergence from the peer's softmax; reverse_kl: "
        "from this model's; js: the generalised Jensen-Shannon divergence between the two",
        DIVERGENCES,
    )
    codistill_codec: str = _option("fp16", CODEC_HELP)
    codistill_interval: int = _option(
        1, "T: exchange and distil at every T-th data position, counted from the start of training over all epochs"
    )
    codistill_parts: str = _option(
        "auto",
        "cut every batch in 1, 2 or 4 parts: the gradient of one is computed while the predictions of the next travel, "
        "and nothing but the wait changes (predictions only); auto: as many as make steps shorter, from one on, all "
        "models at the same position, and never more than one with batch normalisation, which would see the parts, or "
        "in a DistributedDataParallel with find_unused_parameters, which would not see all of them",
        PARTS,
    )
    codistill_lookahead: bool = _option(
        False,
        "for lines whose delay is longer than a forward pass: at every T-th update one more forward pass, without "
        "gradient, of the batch that comes next, whose predictions are sent then; the peers' term is of the update "
        "before (predictions only, batches in one part)",
    )
    codistill_exchange: str = _option(
        "predictions",
        "predictions: of every T-th batch; checkpoints: every T-th update parameters and buffers, of which the peers "
        "keep copies that predict every batch (codec fp32, fp16 or bf16; the models need the same architecture)",
        EXCHANGES,
    )
    codistill_replica_mode: str = _option(
        "auto",
        "with checkpoints: whether the copies of the peers predict in eval or in train mode (with dropout, and with "
        "the batch's own statistics); auto: train for a model with batch normalisation, eval for others",
        REPLICA_MODES,
    )
    codistill_replica_wait: bool = _option(
        False,
        "with checkpoints: wait at every exchange for the peers' checkpoints of that position, so that a run can be "
        "repeated exactly; default: train on, and swap a copy in whenever it has come",
    )
    codistill_timeout: float = _option(
        300.0,
        "seconds that a late peer may cost, once; then it is 'away' and nobody waits for it until it is back. "
        "Longer than the longest validation or checkpoint write of a peer",
    )
    codistill_start_timeout: float = _option(
        300.0,
        "seconds to wait for the other models at the start; then training begins without the missing ones, if any was "
        "met (--codistill-require-peers). Keep it below the timeout of the model's own process group (600 s for nccl), "
        "whose other ranks wait meanwhile",
    )
    codistill_require_peers: str = _option(
        "start",
        "start: an error if no other model was met within --codistill-start-timeout; always: also once none has been "
        "heard for --codistill-timeout and none has finished; never: train alone if need be, as after a restart when "
        "the others have ended",
    )
    codistill_max_message_mb: int = _option(2048, "largest message accepted, in MiB; larger ones are refused")
    codistill_max_queue_mb: int = _option(
        1024,
        "memory, in MiB, for what waits to be sent to one peer, for what has come from all, and for what is kept of "
        "one; beyond it messages are dropped, the newest first. A message always fits, and so do the parts of a batch",
    )
    codistill_max_mismatches: int = _option(
        3, "that many misaligned batches in a row from one peer are an error that lists what differs"
    )
    codistill_allow_identical_init: bool = _option(
        False, "start although two models hold the same parameters (fine-tuning all models from one checkpoint)"
    )

    @property
    def is_codistilled(self) -> bool:
        """Whether this job has peers. With alpha 0 it meets them, since theirs must be 0 too, and exchanges nothing."""
        return self.codistill_num_models > 1

    @property
    def is_taught(self) -> bool:
        """Whether this job learns from other models at all: peers, or teachers that never change."""
        return self.is_codistilled or bool(self.codistill_teacher)

    @property
    def why_whole(self) -> str:
        """Why no batch is ever cut, from what all models have in common; empty where some may be."""
        if self.codistill_exchange != "predictions":
            return "checkpoints are exchanged"
        if self.codistill_transfer or self.codistill_own_data:
            return "a transfer set is exchanged"
        if self.codistill_lookahead:
            return "predictions are sent ahead (--codistill-lookahead)"
        if self.codistill_parts != "auto":
            return ""
        if 0 < self.codistill_peers_per_position < self.codistill_num_models - 1:
            return "not all models exchange with each other at a position (--codistill-peers-per-position)"
        return "a budget is kept (--codistill-budget-mbit)" if self.codistill_budget_mbit else ""

    @property
    def most_parts(self) -> int:
        """The largest number of messages that a batch can become."""
        if self.why_whole:
            return 1
        return MOST_PARTS if self.codistill_parts == "auto" else int(self.codistill_parts)

    def validate(self) -> None:
        """Check what can be checked without a peer.

        Raises:
            ConfigError: naming the first setting that cannot work.
        """
        n, i = self.codistill_num_models, self.codistill_model_index
        self._require(n >= 1, "codistill_num_models", "at least 1")
        self._require(0 <= i < n, "codistill_model_index", f"between 0 and {n - 1}: --codistill-num-models is {n}")
        for name in ("weight", "weight_growth", "weight_max", "timeout", "start_timeout"):
            value = getattr(self, "codistill_" + name)
            self._require(math.isfinite(value) and value >= 0, "codistill_" + name, "a finite number, 0 or more")
        self._require(
            not 0 < self.codistill_weight_max < self.codistill_weight,
            "codistill_weight_max",
            f"0 (none), or at least --codistill-weight, {self.codistill_weight}",
        )
        self._require(
            self.codistill_weight_growth > 0, "codistill_weight_growth", "more than 0 (1 keeps alpha constant)"
        )
        self._require(self.codistill_burn_in >= 0, "codistill_burn_in", "0 or more")
        self._require(
            -(2**63) <= self.codistill_data_seed < 2**63,
            "codistill_data_seed",
            "a whole number of 64 bits with its sign",
        )
        self._require(self.codistill_max_message_mb >= 1, "codistill_max_message_mb", "at least 1")
        self._require(self.codistill_max_queue_mb >= 1, "codistill_max_queue_mb", "at least 1")
        self._require(self.codistill_max_mismatches >= 1, "codistill_max_mismatches", "at least 1")
        self._require(
            self.codistill_divergence in DIVERGENCES, "codistill_divergence", "one of " + ", ".join(DIVERGENCES)
        )
        self._require(self.codistill_interval >= 1, "codistill_interval", "at least 1")
        if self.codistill_transport == "nccl":
            raise ConfigError(
                "--codistill-transport is 'nccl'; NCCL pairs sends and receives in their order, so a model that is "
                "late or gone would stop the others. Use gloo or zmq, which take predictions from the GPU too"
            )
        choices = {
            "codistill_parts": PARTS,
            "codistill_transport": TRANSPORTS,
            "codistill_exchange": EXCHANGES,
            "codistill_replica_mode": REPLICA_MODES,
            "codistill_require_peers": REQUIREMENTS,
        }
        for name, values in choices.items():
            self._require(getattr(self, name) in values, name, "one of " + ", ".join(values))
        self._check_lookahead()
        check_codec(self.codistill_codec, self.codistill_divergence, self.codistill_exchange, n)
        self.check_teachers(self.codistill_divergence)
        self.check_sharing(
            n,
            self.codistill_codec,
            self.codistill_divergence,
            self.codistill_exchange,
            bool(self.codistill_teacher_cache),
        )
        self.check_own_data(self.codistill_exchange)
        if self.codistill_relay:
            self._check_relay()
        elif n > 1:
            num_addresses = len([a for a in self.codistill_addresses.split(",") if a.strip()])
            self._require(
                num_addresses == n,
                "codistill_addresses",
                f"{n} HOST:PORT entries, one a model (found {num_addresses}); codistill-launch makes the list for you, "
                "and --codistill-relay takes its place",
            )

    def _check_lookahead(self) -> None:
        for name, values in (("exchange", ("predictions",)), ("transfer", ("",)), ("parts", ("auto", "1"))):
            value = getattr(self, f"codistill_{name}")
            if self.codistill_lookahead and value not in values:
                raise ConfigError(
                    f"--codistill-lookahead with {flag_name(f'codistill_{name}')} {value!r}: only whole batches that "
                    "are trained on are predicted ahead; leave one of the two out"
                )
        if self.codistill_lookahead and self.codistill_codec == "vote":
            raise ConfigError(
                "--codistill-lookahead with --codistill-codec 'vote': what a model sent ahead is not what it finds "
                "once it is trained on, so the models would count other votes; leave one of the two out"
            )

    def _check_relay(self) -> None:
        for name, unset in (("addresses", ""), ("bind", ""), ("transport", "zmq")):
            value = getattr(self, f"codistill_{name}")
            if value != unset:
                raise ConfigError(
                    f"--codistill-relay is {self.codistill_relay!r} and {flag_name(f'codistill_{name}')} {value!r}: "
                    "through a relay nobody listens; leave one of the two out, the same one on all models"
                )
        self._require(
            self.codistill_keys not in ("", "none"),
            "codistill_keys",
            "a folder made by codistill-keys: a relay lets in whoever has a key of its runs, and nobody else",
        )

    def _require(self, holds: bool, field_name: str, wanted: str) -> None:
        if not holds:
            raise ConfigError(f"{flag_name(field_name)} is {getattr(self, field_name)!r}; it must be {wanted}")


@dataclasses.dataclass
class FairseqConfig:
    """Options of codistillation that fairseq's criterion alone takes."""

    codistill_validate_agreement: bool = _option(
        False,
        "exchange predictions for validation batches too, or ask the copies of the peers: validation lines then hold "
        "codistill_agreement and codistill_mse. The same for all models, which should validate at the same updates",
    )


@dataclasses.dataclass
class LabelSmoothingConfig:
    """Label smoothing of the supervised loss, and how it fades (sections 4.2, A.3 and A.5 of the paper)."""

    label_smoothing: float = _option(0.0, "epsilon of label smoothing at the start, 0 means no label smoothing")
    label_smoothing_end: float = _option(0.0, "epsilon after the decay (see --label-smoothing-decay-updates/-epochs)")
    label_smoothing_decay_updates: int = _option(
        0, "decay epsilon linearly to --label-smoothing-end over these updates"
    )
    label_smoothing_decay_epochs: int = _option(0, "decay epsilon linearly to --label-smoothing-end over these epochs")
    label_smoothing_drop_epoch: int = _option(0, "epsilon is 0 from this epoch on (first epoch is 1; 0: never)")

    def validate(self) -> None:
        """Raises:
        ConfigError: naming the first setting that cannot work.
        """
        for name in ("label_smoothing", "label_smoothing_end"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{flag_name(name)} is {value!r}; it must be at least 0 and below 1")
        for name in ("label_smoothing_decay_updates", "label_smoothing_decay_epochs", "label_smoothing_drop_epoch"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{flag_name(name)} is {getattr(self, name)!r}; it must be 0 (off) or more")
        if self.label_smoothing_end and not (self.label_smoothing_decay_updates or self.label_smoothing_decay_epochs):
            raise ConfigError(
                f"--label-smoothing-end is {self.label_smoothing_end!r}, to which nothing decays; give "
                "--label-smoothing-decay-updates or --label-smoothing-decay-epochs, or leave it out"
            )
        if self.label_smoothing_decay_updates and self.label_smoothing_decay_epochs:
            raise ConfigError(
                f"--label-smoothing-decay-updates is {self.label_smoothing_decay_updates} and "
                f"--label-smoothing-decay-epochs is {self.label_smoothing_decay_epochs}; give only one of them"
            )
