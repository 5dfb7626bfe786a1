"""Owns the promise that a codistilled checkpoint is an ordinary fairseq checkpoint.

What is written names the stock task and the stock criterion, so that plain ``fairseq-generate`` and
``fairseq-train`` read it without this package. The settings of codistillation, and the copies of the peers where
checkpoints are exchanged, lie beside it in ``extra_state``, of which plain fairseq takes no notice.
"""

import dataclasses
import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterionConfig
from fairseq.trainer import Trainer

from fairseq_codistill.fairseq_side.saving import remove_unfinished

PREFIX = "codistill_"
REPLICAS = "codistill_replicas"
SETTINGS = "codistill_settings"


def write_stock_checkpoints() -> None:
    """Rewrite the configuration in every checkpoint that a codistillation task saves. Idempotent.

    fairseq has no hook between building a checkpoint and writing it (``Trainer.state_dict`` copies the whole
    configuration), hence the wrapper. It can go when fairseq asks the task for the configuration it saves.
    """
    if getattr(Trainer.state_dict, "_codistill_wrapped", False):
        return
    original = Trainer.state_dict

    @functools.wraps(original)
    def state_dict(self: Trainer) -> dict:
        state = original(self)
        if hasattr(self.task, "coordinated_iterator") and isinstance(state.get("cfg"), dict):
            state["cfg"] = stock_config(state["cfg"])
            replicas = self.task.replicas_state()
            if replicas is not None:
                state["extra_state"][REPLICAS] = replicas
            state["extra_state"][SETTINGS] = self.task.settings_state()
        return state

    original_load = Trainer.load_checkpoint

    @functools.wraps(original_load)
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> dict | None:
        if hasattr(self.task, "coordinated_iterator") and self.data_parallel_rank == 0:
            remove_unfinished(Path(self.cfg.checkpoint.save_dir))
        extra_state = original_load(self, *args, **kwargs)
        if extra_state is not None and hasattr(self.task, "coordinated_iterator"):
            replicas, settings = extra_state.pop(REPLICAS, None), extra_state.pop(SETTINGS, None)
            if not _begins_anew(self, *args, **kwargs):
                self.task.saved_replicas = replicas
                self.task.compare_settings(settings or {})
        if hasattr(self.task, "begin_training"):
            self.task.begin_training(self)
        return extra_state

    state_dict._codistill_wrapped = True  # type: ignore[attr-defined]
    Trainer.state_dict = state_dict
    Trainer.load_checkpoint = load_checkpoint


def _begins_anew(trainer: Trainer, filename: str, *_: Any, **__: Any) -> bool:
    """Whether what is loaded is where a new run begins: its peers are not those of the run that wrote it."""
    checkpoint = trainer.cfg.checkpoint
    return bool(checkpoint.reset_dataloader) or str(filename) == str(checkpoint.finetune_from_model)


def stock_config(cfg: dict) -> dict:
    """The configuration that plain fairseq would have written for the same model.

    Args:
        cfg: fairseq's configuration as plain containers; not changed.

    Returns:
        a copy that names the stock task and criterion, without any option of ours and without a ``user_dir``.
    """
    cfg = {**cfg, "common": {**(cfg.get("common") or {}), "user_dir": None}}
    cfg["task"] = _stock_task(cfg.get("task"))
    criterion = cfg.get("criterion")
    if isinstance(criterion, dict) and criterion.get("_name") == "codistillation":
        fields = {field.name for field in dataclasses.fields(LabelSmoothedCrossEntropyCriterionConfig)}
        cfg["criterion"] = {name: value for name, value in criterion.items() if name in fields}
        cfg["criterion"]["_name"] = "label_smoothed_cross_entropy"
    for part in ("task", "model"):  # tasks and architectures from before dataclasses keep all arguments in a namespace
        if isinstance(cfg.get(part), Namespace):
            cfg[part] = _stock_namespace(cfg[part])
    return cfg


def _stock_task(task: Any) -> Any:
    if isinstance(task, dict):
        return {**task, **{key: _stock_name(task[key]) for key in ("_name", "task") if task.get(key)}}
    return task


def _stock_namespace(args: Namespace) -> Namespace:
    values = {name: value for name, value in vars(args).items() if not name.startswith(PREFIX)}
    for name in ("task", "_name"):
        if values.get(name):
            values[name] = _stock_name(values[name])
    if values.get("criterion") == "codistillation":
        values["criterion"] = "label_smoothed_cross_entropy"
    if "user_dir" in values:
        values["user_dir"] = None
    return Namespace(**values)


def _stock_name(name: str) -> str:
    return name.removeprefix(PREFIX)
