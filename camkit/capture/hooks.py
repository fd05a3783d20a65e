"""Module hooks that always come off."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hook:
    """A hook that stays with its module: copies and pickles of the module carry a dead one.

    Without this, a deep copy of a watched model (an EMA teacher, say) would write into the
    original's record, and a watched model could not be saved.
    """

    def __init__(self, function: Callable[..., Any] | None) -> None:
        # compiled code calls it, instead of tracing what it does
        self.function = None if function is None else torch.compiler.disable(function)

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(None)

    def __reduce__(self) -> tuple[type["Hook"], tuple[None]]:
        return Hook, (None,)


class Hooks:
    """A set of hooks, removed together; removing twice is harmless."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before(
        self, module: nn.Module, function: Callable[..., Any], *, outermost: bool = False
    ) -> None:
        """Call ``function(module, args, kwargs)`` before each forward of ``module``."""
        self._handles.append(
            module.register_forward_pre_hook(Hook(function), with_kwargs=True, prepend=outermost)
        )

    def after(
        self, module: nn.Module, function: Callable[..., Any], *, outermost: bool = False
    ) -> None:
        """Call ``function(module, args, kwargs, output)`` after each forward, also one that raised.

        What was entered last is left first: newer hooks run inside older ones, unless they are to
        be the outermost of all.
        """
        self._handles.append(
            module.register_forward_hook(
                Hook(function), with_kwargs=True, always_call=True, prepend=not outermost
            )
        )

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
