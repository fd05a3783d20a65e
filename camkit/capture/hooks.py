"""Module hooks, gradient mode, evaluation mode and random state, all of which are restored."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Thread(local):
    measuring = False


_THREAD = _Thread()


class Hook:
    """A hook that stays with its module: copies and pickles of the module hold an empty one.

    Otherwise a deep copy of a watched model (an EMA teacher, say) would write into the original's
    record, and a watched model could not be saved.
    """

    def __init__(
        self, function: Callable[..., Any] | None, *, while_measuring: bool = False
    ) -> None:
        def run(*args: Any) -> Any:
            if _THREAD.measuring and not while_measuring:
                return None
            return None if function is None else function(*args)

        # compiled code calls it instead of tracing it
        self.function = None if function is None else torch.compiler.disable(run)

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(None)

    def __reduce__(self) -> tuple[type["Hook"], tuple[None]]:
        return Hook, (None,)


class Hooks:
    """A set of hooks, removed together; removing them twice is harmless.

    ``outermost`` puts a hook around all others; else newer hooks run inside older ones. Forwards
    that camkit itself runs inside `measurement` call only hooks with ``while_measuring``.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        outermost: bool = False,
        while_measuring: bool = False,
    ) -> None:
        """Call ``function(module, args, kwargs)`` before each forward of ``module``."""
        hook = Hook(function, while_measuring=while_measuring)
        self._handles.append(
            module.register_forward_pre_hook(hook, with_kwargs=True, prepend=outermost)
        )

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
        hook = Hook(function, while_measuring=while_measuring)
        self._handles.append(
            module.register_forward_hook(
                hook, with_kwargs=True, always_call=True, prepend=not outermost
            )
        )

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


@contextmanager
def measurement(device: torch.device) -> Iterator[None]:
    """Disable camkit's hooks in this thread, and fix the random numbers drawn on ``device``.

    All random number generators are restored at the end.
    """
    before, python_state = _THREAD.measuring, random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        _THREAD.measuring = True
        try:
            yield
        finally:
            _THREAD.measuring = before
            random.setstate(python_state)


_ABANDONED: list[Any] = []  # inference modes: freeing one would switch the mode on again


class Graph:
    """The gradient mode of one forward.

    Everything before the first tensor given to ``begin`` runs in the caller's mode, without a graph
    under `torch.no_grad`. `torch.inference_mode` is switched off during the forward.
    """

    def __init__(self) -> None:
        self._before: bool | None = None
        self._normal: Any = None

    def enter(self) -> None:
        """Store the caller's mode as the forward begins."""
        self._before = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            self._normal = torch.inference_mode(mode=False)
            self._normal.__enter__()
            torch.set_grad_enabled(False)

    def begin(self, tensor: Tensor) -> Tensor:
        """Return the tensor if it is in a graph, else a new leaf that begins one."""
        if tensor.requires_grad:
            return tensor
        torch.set_grad_enabled(True)  # until the model returns
        start = tensor.clone() if tensor.is_inference() else tensor.detach()
        return start.requires_grad_()

    def pause(self) -> bool:
        """Stop the graph if the caller's mode has none, and return whether it was stopped."""
        if self._before is not False:
            return False
        torch.set_grad_enabled(False)
        return True

    def leave(self) -> bool:
        """Restore the caller's mode, and return whether there was a graph only for camkit."""
        if self._before is None:
            return False
        began = not self._before and torch.is_grad_enabled()
        torch.set_grad_enabled(self._before)
        self._before = None
        if self._normal is not None:
            normal, self._normal = self._normal, None
            normal.__exit__(None, None, None)
        return began

    def abandon(self, mode: bool) -> None:
        """Set the gradient mode to ``mode`` after an interrupted forward."""
        if self._before is not None:
            torch.set_grad_enabled(mode)
            self._before = None
        if self._normal is not None:
            _ABANDONED.append(self._normal)
            self._normal = None


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, outside inference mode; restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(mode=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
