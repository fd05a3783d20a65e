"""Modes that camkit switches on a model or in a thread, and always restores."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock, local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from camkit.capture.outputs import replace_tensors
from camkit.torch_internals import modules_of


class _Thread(local):
    """What is going on in a thread.

    Attributes:
        measuring: it is inside `measurement`, so camkit's hooks do nothing.
        graph: of the forward under way, if camkit began it.
    """

    measuring = False
    graph: "Graph | None" = None

    def __init__(self) -> None:
        self.graphs: list[Graph] = []  # of the forwards that run, each watch has its own


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
        self._starts: list[Tensor] = []
        self._was_on = False

    def enter(self) -> None:
        """Store the caller's mode as the forward begins."""
        self._before = torch.is_grad_enabled()
        THREAD.graphs.append(self)
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
        self._starts.append(start.requires_grad_())
        return start

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

    def leave(self, output: Any = None) -> Any:
        """Restore the caller's mode, and return the output as that mode would have left it.

        A graph that exists only for camkit does not reach the caller: tensors in it are detached,
        in tuples, dictionaries and objects too. Tensors of the caller that require gradients, such
        as parameters, are returned as they are.
        """
        if self._before is None:
            return output
        THREAD.graph = None
        before, was_on = self._before, self._was_on or torch.is_grad_enabled()
        torch.set_grad_enabled(before)
        self._before = None
        if self._normal is not None:
            normal, self._normal = self._normal, None
            normal.__exit__(None, None, None)
        self.forget()
        if THREAD.graphs:  # another watch of this forward still needs the graph of its output
            THREAD.graphs[-1]._starts += self._starts
            THREAD.graphs[-1]._was_on = was_on
            return output
        starts = {id(start) for start in self._starts}

        def without_graph(tensor: Tensor) -> Tensor:
            if id(tensor) in starts:
                return tensor.detach()
            if tensor.grad_fn is None:
                return tensor
            own = not _has_other_leaves(tensor.grad_fn, starts) if before else was_on
            return tensor.detach() if own else tensor

        return replace_tensors(output, without_graph) if starts else output

    def forget(self) -> None:
        """Take this forward off those that run."""
        THREAD.graphs[:] = [graph for graph in THREAD.graphs if graph is not self]

    def abandon(self, mode: bool) -> None:
        """Set the gradient mode to ``mode`` after an interrupted forward."""
        THREAD.graph = None
        self.forget()
        if self._before is not None:
            torch.set_grad_enabled(mode)
            self._before = None
        if self._normal is not None:
            _ABANDONED.append(self._normal)
            self._normal = None


def _has_other_leaves(node: Any, starts: set[int]) -> bool:
    """Whether a graph ends at other leaves than these, such as a parameter of the model."""
    waiting, met = [node], {node}
    while waiting:
        current = waiting.pop()
        leaf = getattr(current, "variable", None)
        if leaf is not None and id(leaf) not in starts:
            return True
        following = {n for n, _ in current.next_functions if n is not None} - met
        met |= following
        waiting.extend(following)
    return False


_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_TURNS_LOCK = Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Wait until no other thread is in such a block with this model."""
    with _TURNS_LOCK:
        turn = _TURNS.setdefault(model, RLock())
    with turn:
        yield


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, outside inference mode; restore the mode of each module."""
    modules = modules_of(model)
    modes = [module.training for module in modules]
    try:
        if any(modes):
            model.eval()
        with torch.inference_mode(mode=False):
            yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            if module.training != training:
                module.training = training
