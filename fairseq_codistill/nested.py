"""Owns going through what a model is called with: tensors in tuples, lists and mappings of any depth."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def mapped(inputs: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor replaced; a mapping becomes a dict, and what is none of these stays as it is.

    >>> mapped(("name", [Tensor([1, 2])]), lambda values: values * 2)
    ('name', [tensor([2., 4.])])
    """
    if isinstance(inputs, Tensor):
        return of_tensor(inputs)
    if isinstance(inputs, Mapping):
        return {name: mapped(value, of_tensor) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        entries = [mapped(value, of_tensor) for value in inputs]
        return type(inputs)(*entries) if hasattr(inputs, "_fields") else type(inputs)(entries)
    return inputs
