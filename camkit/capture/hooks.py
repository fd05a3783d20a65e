"""camkit's hooks on the modules of a model, which copies and pickles of the model are without."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from camkit.capture.modes import THREAD
from camkit.torch_internals import leave_out_of_copies


class Hook:
    """A hook of camkit; `Hooks` keeps it out of copies and pickles of its module.

    Where it is copied by itself (as quantisation moves hooks to the modules it puts in), the copy
    does nothing, and its pickle names nothing of camkit.

    Args:
        function: called with so many arguments.
        arguments: their number. torch passes fewer to a forward of another thread that comes while
            the hook is put on or taken off; the hook does nothing then.
        while_measuring: see `Hooks`.
    """

    def __init__(
        self, function: Callable[..., Any], arguments: int, *, while_measuring: bool = False
    ) -> None:
        _exclude_from_compilation()
        self.function, self.arguments = function, arguments
        self.while_measuring = while_measuring

    def __call__(self, *args: Any) -> Any:
        measuring = THREAD.measuring and not self.while_measuring
        if measuring or len(args) < self.arguments:
            return None
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments and returns None


@cache
def _exclude_from_compilation() -> None:
    """Let compiled code call hooks instead of tracing them; not at import, it loads the compiler.

    Once for all hooks: one photo needs 200 of them, and each of its own would take 10 us.
    """
    Hook.__call__ = torch.compiler.disable(Hook.__call__)  # type: ignore[method-assign]


class Hooks:
    """A set of hooks, removed together; removing them twice is harmless.

    ``outermost`` puts a hook around all others; else newer hooks run inside older ones. Forwards
    that camkit itself runs inside `measurement` call only hooks with ``while_measuring``.

    Deep copies and pickles of the module are without these hooks: a copy of a watched model (an EMA
    teacher, say) would write into the original's record, and a pickle would need camkit.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._first: dict[tuple[int, str], RemovableHandle] = {}

    def before(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        outermost: bool = False,
        while_measuring: bool = False,
    ) -> None:
        """Call ``function(module, args, kwargs)`` before each forward of ``module``."""
        hook = Hook(function, 3, while_measuring=while_measuring)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=outermost)
        self._keep(handle, (id(module), "before"))

    def after(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        outermost: bool = False,
        while_measuring: bool = False,
    ) -> None:
        """Call ``function(module, args, kwargs, output)`` after each forward.

        It is called after a forward that raised, too; then the output is None.
        """
        hook = Hook(function, 4, while_measuring=while_measuring)
        handle = module.register_forward_hook(
            hook, with_kwargs=True, always_call=True, prepend=not outermost
        )
        self._keep(handle, (id(module), "after"))

    def _keep(self, handle: RemovableHandle, place: tuple[int, str]) -> None:
        self._handles.append(handle)
        if place not in self._first:
            self._first[place] = handle
            leave_out_of_copies(handle, Hook)

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        while self._first:
            _, handle = self._first.popitem()
            leave_out_of_copies(handle, Hook)
