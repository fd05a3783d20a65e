"""Modes that camkit switches on a model or in a thread, and always restores."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch
from torch import Tensor, nn


class _Thread(local):
    """What is going on in a thread.

    Attributes:
        measuring: it is inside `measurement`, so camkit's hooks do nothing.
        graph: of the forward under way, if camkit began it.
    """

    measuring = False
    graph: "Graph | None" = None


THREAD = _Thread()


@contextmanager
def measurement(device: torch.device) -> Iterator[None]:
    """Disable camkit's hooks in this thread, and fix the random numbers drawn on ``device``.

    All random number generators are restored at the end.
    """
    before, python_state = THREAD.measuring, random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        THREAD.measuring = True
        try:
            yield
        finally:
            THREAD.measuring = before
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
        THREAD.graph = self
        start = tensor.clone() if tensor.is_inference() else tensor.detach()
        return start.requires_grad_()

    @property
    def caller_has_none(self) -> bool:
        """Whether the caller runs the forward without gradients."""
        return self._before is False

    def pause(self) -> bool:
        """Stop the graph if the caller's mode has none, and return whether it was stopped."""
        if self._before is not False:
            return False
        torch.set_grad_enabled(False)
        THREAD.graph = None
        return True

    def leave(self) -> bool:
        """Restore the caller's mode, and return whether there was a graph only for camkit."""
        if self._before is None:
            return False
        THREAD.graph = None
        began = not self._before and torch.is_grad_enabled()
        torch.set_grad_enabled(self._before)
        self._before = None
        if self._normal is not None:
            normal, self._normal = self._normal, None
            normal.__exit__(None, None, None)
        return began

    def abandon(self, mode: bool) -> None:
        """Set the gradient mode to ``mode`` after an interrupted forward."""
        THREAD.graph = None
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
