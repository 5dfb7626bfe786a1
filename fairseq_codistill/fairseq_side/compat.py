"""Owns every workaround for a version of fairseq or torch; each names what it works around and when it can go.

Nothing here may weaken a check: ``torch.load`` keeps ``weights_only``, and only plain data is allow-listed.
"""

import argparse
import atexit
import contextlib
import functools
import importlib
import inspect
import os
import pickle
import queue
import time
import types
import weakref
from typing import Any

import numpy as np
import torch

from fairseq_codistill.config import ConfigError

NUMBERS = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())


def apply() -> None:
    """Make fairseq and this torch work together. Idempotent; called when fairseq imports the user-dir."""
    allow_fairseq_checkpoints()
    send_plain_configuration()
    mend_nan_detector()
    mend_numpy_names()
    decline_fast_encoder()
    clear_dtype_buffers()
    end_loading_threads()
    count_groups_by_their_source()


def allow_fairseq_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read what fairseq writes, and sends between ranks, beside tensors.

    torch 2.6 made ``weights_only`` the default, and fairseq's checkpoints hold an ``argparse.Namespace`` (the model's
    arguments) and, after ``--eval-bleu``, numpy arrays (the n-gram counts of the running BLEU). When several ranks
    resume, what rank 0 sends holds a placeholder for each tensor. A Namespace stores attributes and a placeholder an
    index. numpy's own constructors are not allow-listed: a dtype takes its flags and fields from the file unchecked,
    and a forged one leaves an array that numpy cannot handle. Stand-ins under numpy's names read arrays of plain
    numbers and nothing else.

    Upstream: https://github.com/facebookresearch/fairseq/issues/5610 and /5603; stand-ins by name are
    https://github.com/pytorch/pytorch/pull/142153. Can go when fairseq allow-lists these itself.
    """
    if not hasattr(torch.serialization, "add_safe_globals"):
        return  # torch < 2.4, where weights_only is not the default either
    from fairseq.distributed.utils import _TensorPlaceholder

    add_safe_globals = torch.serialization.add_safe_globals
    add_safe_globals([argparse.Namespace, _TensorPlaceholder])
    if "tuple" not in str(inspect.signature(add_safe_globals)).lower():
        return  # no names for stand-ins yet, and weights_only is not the default either
    stand_ins: list[Any] = [_NumberArray, (_NumberArray, "numpy.ndarray"), (_NumberDtype, "numpy.dtype")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # as numpy 1 and numpy 2 write it
        stand_ins += [(_reconstruct_array, f"{module}._reconstruct"), (_number, f"{module}.scalar")]
    add_safe_globals(stand_ins)


class _NumberDtype:
    """Stands in for ``numpy.dtype`` while a checkpoint is read: a kind of number and its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in NUMBERS:
            raise pickle.UnpicklingError(f"a checkpoint holds numpy data of type {code!r}; only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"a checkpoint holds numpy data of byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


def _clean_dtype(dtype: Any) -> np.dtype:
    """A fresh dtype of numbers, also if somebody else allow-listed numpy's own, whose flags may be forged."""
    if isinstance(dtype, _NumberDtype):
        return dtype.dtype
    if isinstance(dtype, np.dtype) and dtype.str[1:] in NUMBERS:
        return np.dtype(dtype.str)
    raise pickle.UnpicklingError(f"a checkpoint holds numpy data of type {dtype!r}; only numbers are read")


class _NumberArray(np.ndarray):
    """Stands in for ``numpy.ndarray`` while a checkpoint is read; saved again, it is an ordinary array."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_NumberArray":
        raise pickle.UnpicklingError("a checkpoint makes a numpy array in another way than numpy's pickles do")

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, data = state
        if type(data) is not bytes:
            raise pickle.UnpicklingError(f"a checkpoint holds a numpy array of {type(data).__name__}, not of numbers")
        content: Any = (version, shape, _clean_dtype(dtype), is_fortran, data)
        super().__setstate__(content)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _reconstruct_array(*_: Any) -> np.ndarray:
    """Stands in for numpy's function of nearly that name: an empty array whose content comes next."""
    return np.empty(0).view(_NumberArray)


def _number(dtype: Any, data: bytes) -> Any:
    """Stands in for numpy's ``scalar``: one number."""
    (number,) = np.frombuffer(data, _clean_dtype(dtype))
    return number


def send_plain_configuration() -> None:
    """When several ranks resume, let rank 0 send the checkpoint's configuration as plain containers.

    fairseq turns it into an omegaconf object on loading, whose many classes are better not allow-listed; no rank
    reads it from what it received. Same origin and end condition as :func:`allow_fairseq_checkpoints`.
    """
    from fairseq.distributed import utils
    from omegaconf import OmegaConf

    original = utils.broadcast_object
    if getattr(original, "_codistill_wrapped", False):
        return

    @functools.wraps(original)
    def broadcast_object(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, dict) and OmegaConf.is_config(obj.get("cfg")):
            obj = {**obj, "cfg": OmegaConf.to_container(obj["cfg"], resolve=True, enum_to_str=True)}
        return original(obj, *args, **kwargs)

    broadcast_object._codistill_wrapped = True  # type: ignore[attr-defined]
    utils.broadcast_object = broadcast_object


def mend_nan_detector() -> None:
    """Let fairseq's NaN detector look at models whose encoder returns a dict of lists, as every transformer does.

    fairseq hooks the backward pass of each module with ``register_backward_hook``, for which torch takes the first
    tensor out of a module's output; a dict that holds only lists has none, and ``StopIteration`` hides the report
    that gradients became NaN. Here backward hooks go on modules without children, whose outputs are tensors.

    Seen with fairseq 0.12.2 and fairseq-fixed 0.12.3.1 on torch 2.15. Can go when the detector uses full hooks.
    """
    from fairseq.nan_detector import NanDetector

    def add_hooks(self: NanDetector, module: torch.nn.Module) -> None:
        if self.forward:
            self.fhooks.append(module.register_forward_hook(self.fhook_fn))
        if self.backward and not list(module.children()):
            self.bhooks.append(module.register_backward_hook(self.bhook_fn))

    NanDetector.add_hooks = add_hooks


def mend_numpy_names() -> None:
    """Give the modules of fairseq that use removed names of numpy those names; numpy itself stays as it is.

    Without them, ``language_modeling`` with ``--sample-break-mode eos`` and translation with ``--num-batch-buckets``
    fail on numpy 2 (``np.compat.long``), masked inputs on numpy 1.24 and later (``np.int``).

    Upstream: https://github.com/facebookresearch/fairseq/issues/4945. Can go when fairseq runs on numpy 2.
    """
    removed = {"compat": types.SimpleNamespace(long=int), "long": int, "int": int, "float": float}
    missing = {name: value for name, value in removed.items() if name not in vars(np)}
    users = "data.data_utils data.language_pair_dataset data.token_block_dataset modules.dynamic_crf_layer"
    for name in users.split():
        module: Any = importlib.import_module(f"fairseq.{name}")
        if module.np is np:
            module.np = types.ModuleType("numpy")
            module.np.__getattr__ = functools.partial(getattr, np)
            vars(module.np).update(missing)


def decline_fast_encoder() -> None:
    """Let fairseq 0.12.2 decode on torch 2: its encoder layers take their ordinary way, not that of torch 1.13.

    A layer that was read from a checkpoint and never trained calls a function of torch whose arguments have changed
    since ("Mask Type should be defined"), while ``load_to_BT`` is true. Later releases of fairseq have no such way.

    Can go when fairseq 0.12.2 need not run any more.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase

    TransformerEncoderLayerBase.load_to_BT = property(lambda layer: False, lambda layer, value: None)


def clear_dtype_buffers() -> None:
    """Let the buffer by which fairseq 0.12.2 knows the dtype of its sinusoidal positions hold a zero.

    It is made of memory as it was, and only its dtype is used. But it travels with an exchanged checkpoint, which is
    not sent where a value does not fit the codec. Later releases of fairseq have no such buffer.

    Can go when fairseq 0.12.2 need not run any more.
    """
    from fairseq.modules.sinusoidal_positional_embedding import SinusoidalPositionalEmbedding

    original = SinusoidalPositionalEmbedding.__init__
    if getattr(original, "_codistill_wrapped", False):
        return

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if "_float_tensor" in self._buffers:
            self._float_tensor.zero_()

    init._codistill_wrapped = True  # type: ignore[attr-defined]
    SinusoidalPositionalEmbedding.__init__ = init


def end_loading_threads() -> None:
    """End fairseq's loading threads before the interpreter does, so that a finished training exits with 0.

    fairseq loads batches ahead in a daemon thread, which still runs when training stops within an epoch
    (``--max-update``, patience). If the interpreter ends while that thread is inside torch, the process aborts with
    "terminate called without an active exception" and exit code -6, after everything was done and saved.

    Seen with fairseq 0.12.2 and fairseq-fixed 0.12.3.1 up to Python 3.13. Can go when fairseq joins the thread.
    """
    from fairseq.data import iterators

    if hasattr(iterators.BackgroundConsumer, "_codistill_running"):
        return

    class BackgroundConsumer(iterators.BackgroundConsumer):
        _codistill_running: weakref.WeakSet = weakref.WeakSet()

        def run(self) -> None:
            self._codistill_running.add(self)
            super().run()

    def end_all(timeout_s: float = 10.0) -> None:
        running = [consumer for consumer in BackgroundConsumer._codistill_running if consumer.is_alive()]
        for consumer in running:
            consumer._max_len = 0  # it looks at this after every batch
        deadline = time.monotonic() + timeout_s
        while any(consumer.is_alive() for consumer in running) and time.monotonic() < deadline:
            for consumer in running:
                with contextlib.suppress(queue.Empty):
                    consumer._queue.get(timeout=0.01)  # it may be waiting for room

    iterators.BackgroundConsumer = BackgroundConsumer
    atexit.register(end_all)


def check_world(world_size: int) -> None:
    """Refuse to train several independent models where one data-parallel model was meant.

    fairseq takes its world size from ``--distributed-world-size``, whose default is the number of visible GPUs. Under
    torchrun with none or one visible, every process therefore trains alone, and all write the same checkpoints.

    Args:
        world_size: devices that fairseq trains this model on.

    Raises:
        ConfigError: the environment was made by torchrun for several processes, and fairseq is alone.

    Seen with fairseq 0.12.2 and fairseq-fixed 0.12.3.1. Can go when fairseq reads WORLD_SIZE before its default.
    """
    by_torchrun = all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    expected = int(os.environ["WORLD_SIZE"]) if by_torchrun else 1
    if expected > 1 and world_size == 1:
        raise ConfigError(
            f"WORLD_SIZE is {expected} (set by torchrun), but fairseq trains this model on 1 device, so {expected} "
            f"independent models would overwrite each other; pass --distributed-world-size {expected} on GPUs, or "
            f"start the ranks with codistill-launch --devices-per-model {expected}"
        )


def count_groups_by_their_source() -> None:
    """Let fairseq's groups of micro-batches go on where a source that skipped batches stands.

    ``GroupedIterator`` counts what it gave, and at the end of an epoch asks its source for the batches that were
    skipped ("Iterator expected to have length"). For a source that skips, its count becomes that of the source. Can
    go when fairseq's grouping can skip.
    """
    from fairseq.data import iterators

    if hasattr(iterators.GroupedIterator, "_codistill_source"):
        return

    class GroupedIterator(iterators.GroupedIterator):  # type: ignore[misc, name-defined]
        _codistill_source: Any = None
        _count = 0

        def __init__(self, iterable: Any, chunk_size: int, *args: Any, **kwargs: Any):
            from fairseq_codistill.fairseq_side.batches import SkippingIterator

            super().__init__(iterable, chunk_size, *args, **kwargs)
            if isinstance(iterable, SkippingIterator):
                self._codistill_source = iterable

        @property
        def n(self) -> int:
            if self._codistill_source is None:
                return self._count
            return -(-self._codistill_source.n // self.chunk_size)

        @n.setter
        def n(self, value: int) -> None:
            self._count = value

        def has_next(self) -> bool:
            """fairseq asks between two updates, once it has logged: the place to leave from."""
            if self._codistill_source is not None and self._codistill_source.after_update is not None:
                self._codistill_source.after_update()
            return super().has_next()

    iterators.GroupedIterator = GroupedIterator


def make_loaders_anew(iterator: Any) -> None:
    """Let an iterator over epochs make a loader for each, as fairseq 0.12.2 does.

    That of fairseq-fixed uses one again: it keeps the order that it was made with (``--curriculum`` would never end),
    and its workers the epoch of the data set. A model that is resumed would have other batches than one that never
    stopped. Can go when it does not.
    """
    for name in ("reuse_dataloader", "persistent_workers"):
        if hasattr(iterator, name):
            setattr(iterator, name, False)
