"""Module hooks, gradient mode and evaluation mode that are always restored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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


_ABANDONED: list[Any] = []  # freeing one would switch inference mode on where its user left it


class Graph:
    """The gradient mode of one forward.

    Everything before the first tensor given to ``begin`` runs as the caller wished, without a graph
    under `torch.no_grad`. A forward under `torch.inference_mode` runs outside of it.
    """

    def __init__(self) -> None:
        self._before: bool | None = None
        self._normal: Any = None

    def enter(self) -> None:
        """A forward begins."""
        self._before = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            self._normal = torch.inference_mode(mode=False)
            self._normal.__enter__()
            torch.set_grad_enabled(False)

    def begin(self, tensor: Tensor) -> Tensor:
        """Return the tensor as a node of the graph: itself if it is one, else a new leaf."""
        if tensor.requires_grad:
            return tensor
        torch.set_grad_enabled(True)  # until the model returns
        start = tensor.clone() if tensor.is_inference() else tensor.detach()
        return start.requires_grad_()

    def pause(self) -> bool:
        """Go on without a graph if the caller wanted none, and return whether that is so."""
        if self._before is not False:
            return False
        torch.set_grad_enabled(False)
        return True

    def leave(self) -> bool:
        """The forward has ended; returns whether it had a graph its caller did not ask for."""
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
        """The forward was interrupted; gradient mode is set to ``mode``."""
        if self._before is not None:
            torch.set_grad_enabled(mode)
            self._before = None
        if self._normal is not None:
            _ABANDONED.append(self._normal)
            self._normal = None


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, outside inference mode; each module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(mode=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
