"""Owns the options of codistillation in the form that ``HfArgumentParser`` reads, and which of the trainer's own do not
go with them; imports no transformers.

Every field is one of :class:`~fairseq_codistill.config.CodistillationConfig`, which owns default, help and validation.
"""

import dataclasses
from typing import Any, Optional

from torch.utils.data import IterableDataset

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.environment import config_from_environment
from fairseq_codistill.option import JoinedAction

OWN_LOADER = (
    "CodistillTrainer: get_train_dataloader() gives another loader than the trainer's own, whose batches have no "
    "numbers of their samples; leave it as it is, and change train_dataset, data_collator or the arguments instead"
)


def _fields() -> list[tuple[str, Any, Any]]:
    """None stands for what was not given, so that the environment of ``codistill-launch`` can tell it."""
    found = []
    for field in dataclasses.fields(CodistillationConfig):
        choices = field.metadata["choices"]
        words: dict[str, Any] = {
            "help": field.metadata["help"].replace("%", "%%"),
            **({"choices": list(choices)} if choices else {}),
        }
        if field.metadata["repeatable"]:
            words["action"] = JoinedAction
        if type(field.default) is bool:  # a flag, which may be given a value: --codistill-replica-wait false
            words.update(nargs="?", const=True)
        of_kind: Any = Optional[type(field.default)]  # noqa: UP045 - the parser asks for this form of it
        found.append((field.name, of_kind, dataclasses.field(default=None, metadata=words)))
    return found


def _config(self: Any) -> CodistillationConfig:
    """Validated options: what was given, then the environment, then the defaults.

    Raises:
        ConfigError: a value that cannot work.
    """
    given = {name.removeprefix("codistill_"): value for name, value in vars(self).items() if value is not None}
    return config_from_environment(given)


CodistillArguments: Any = dataclasses.make_dataclass(
    "CodistillArguments",
    _fields(),
    namespace={
        "__module__": __name__,
        "__doc__": """``--codistill-num-models``, ``--codistill-codec`` and so on, for ``HfArgumentParser``.

What is not given comes from the environment (``codistill-launch`` sets it), then from the defaults.

>>> CodistillArguments(codistill_codec="tokens:16", codistill_divergence="kl").config().codistill_interval
1
""",
        "config": _config,
    },
)


def refuse_what_cannot_work(trainer: Any, config: CodistillationConfig) -> None:
    """Raises:
    ConfigError: an option of the trainer does not go with codistillation; the message names it.
    """
    args, data = trainer.args, trainer.train_dataset
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    shares_batches = trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1
    strategy = _strategy(args)
    for is_wrong, what in (
        (data is not None and not hasattr(data, "__len__"), "train_dataset has no length; its samples need numbers"),
        (isinstance(data, IterableDataset), "train_dataset is a stream; its samples need numbers, by which it is read"),
        (
            hasattr(data, "settings_to_agree_on") and strategy != "sequential",
            f"train_sampling_strategy is {strategy!r}; train_dataset has an order of its own, so it must be sequential",
        ),
        (
            hasattr(data, "settings_to_agree_on") and args.dataloader_persistent_workers,
            "dataloader_persistent_workers is on; train_dataset has an order of its own, which workers that stay would "
            "never see change",
        ),
        (
            getattr(data, "data_seed", config.codistill_data_seed) != config.codistill_data_seed,
            f"train_dataset has batches of data seed {getattr(data, 'data_seed', None)}, and --codistill-data-seed is "
            f"{config.codistill_data_seed}; give both the same",
        ),
        (
            args.ignore_data_skip,
            "ignore_data_skip is on; a resumed epoch would begin with other batches than those of the other models",
        ),
        (args.n_gpu > 1, "one process drives several GPUs; start one a GPU (codistill-launch --devices-per-model)"),
        (args.auto_find_batch_size, "auto_find_batch_size would give each model other batches; leave it off"),
        (args.use_liger_kernel, "use_liger_kernel computes no logits, which are what is exchanged; leave it off"),
        (shares_batches, "ranks share a batch (tensor, context or sequence parallel); only data parallel works"),
        (args.accelerator_config.dispatch_batches, "dispatch_batches is on; every rank must load its own batches"),
        (not args.dataloader_in_order, "dataloader_in_order is off; batches must come in the order of all models"),
        (
            strategy not in ("random", "sequential"),
            f"train_sampling_strategy is {strategy!r}; it must be random, in the order of --codistill-data-seed, or "
            "sequential",
        ),
        (
            config.codistill_parts not in ("1", "auto"),
            f"--codistill-parts is {config.codistill_parts!r}; the trainer's step is one forward pass, leave it at 1",
        ),
        (
            config.codistill_peer_weights == "validation" and _name_of(args.eval_strategy) == "no",
            "--codistill-peer-weights is 'validation' and eval_strategy is 'no': peers would never weigh differently",
        ),
        (config.codistill_lookahead, "--codistill-lookahead is set; the trainer shows no batch but the one at hand"),
        (
            config.codistill_exchange == "checkpoints" and is_sharded,
            "--codistill-exchange is 'checkpoints', but parameters are sharded; exchange predictions",
        ),
    ):
        if is_wrong:
            raise ConfigError(f"CodistillTrainer: {what}")


def settings_to_agree_on(args: Any, data: Any, num_batches: int) -> dict[str, Any]:
    """What must be equal on all models, by the trainer's names; data with batches of another host have their own."""
    if hasattr(data, "settings_to_agree_on"):
        of_host: dict[str, Any] = data.settings_to_agree_on(num_batches, args.gradient_accumulation_steps)
        return of_host
    return {
        "samples of train_dataset": len(data),
        "batches per epoch": num_batches,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "train_sampling_strategy": _strategy(args),
    }


def _strategy(args: Any) -> str:
    return _name_of(args.train_sampling_strategy)


def _name_of(choice: Any) -> str:
    """Of a member of an enumeration, or of the string that stands for it."""
    return str(getattr(choice, "value", choice))
