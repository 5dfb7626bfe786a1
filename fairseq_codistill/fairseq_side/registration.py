"""Owns who is told of every task that fairseq has, whenever it was or will be registered.

A user-dir registers tasks of its own before or after it imports this package. fairseq itself stays as it is but for
``register_task``, which does what it did and then tells.
"""

import sys
from collections.abc import Callable
from typing import Any

import fairseq.tasks


def tell_of_every_task(tell: Callable[[str], None], register_task: Callable[..., Any]) -> None:
    """Call ``tell`` with the name of each task: now for those that are there, later for those that come.

    Args:
        tell: may be told of a task twice, and may register another one with ``register_task``.
        register_task: fairseq's own.
    """

    def register_and_tell(name: str, dataclass: Any = None) -> Callable[[type], type]:
        register = register_task(name, dataclass)

        def register_task_cls(cls: type) -> type:
            registered = register(cls)
            tell(name)
            return registered

        return register_task_cls

    for name in list(fairseq.tasks.TASK_REGISTRY):
        tell(name)
    # Also where it was imported by name already: in a user-dir that is being imported now, above the line with ours.
    for module in list(sys.modules.values()):
        names = vars(module) if isinstance(getattr(module, "__dict__", None), dict) else {}
        for name in [name for name, value in list(names.items()) if value is register_task]:
            names[name] = register_and_tell
