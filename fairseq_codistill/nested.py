"""Owns going through what a model is called with: tensors in tuples, lists and mappings of any depth."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def mapped(inputs: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor replaced; what is none of these stays as it is. See :func:`remade` for mappings.

    >>> mapped(("name", [Tensor([1, 2])]), lambda values: values * 2)
    ('name', [tensor([2., 4.])])
    """
    if isinstance(inputs, Tensor):
        return of_tensor(inputs)
    if isinstance(inputs, Mapping):
        return remade(inputs, {name: mapped(value, of_tensor) for name, value in inputs.items()})
    if isinstance(inputs, (tuple, list)):
        entries = [mapped(value, of_tensor) for value in inputs]
        return type(inputs)(*entries) if hasattr(inputs, "_fields") else type(inputs)(entries)
    return inputs


def remade(mapping: Mapping, entries: dict) -> Mapping:
    """One of its own type with other entries, where the type is made of a dict (``BatchEncoding``); else the dict.

    >>> import collections
    >>> type(remade(collections.OrderedDict(a=1), {"a": 2})), type(remade(collections.defaultdict(int, a=1), {"a": 2}))
    (<class 'collections.OrderedDict'>, <class 'dict'>)
    """
    if type(mapping) is dict:
        return entries
    try:
        made = type(mapping)(entries)  # type: ignore[call-arg]
        is_alike = made.keys() == entries.keys() and all(made[name] is entries[name] for name in entries)
    except Exception:  # noqa: BLE001 - whatever its constructor thinks of a dict
        return entries
    return made if is_alike else entries
