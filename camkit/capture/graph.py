"""Where a graph begins inside a forward that has none, and the modes that are put back."""

from typing import Any

import torch
from torch import Tensor

_ABANDONED: list[Any] = []  # freeing one would switch inference mode on where its user left it


class Graph:
    """The gradient mode of one forward at a time.

    Everything before the first tensor given to ``begin`` runs as the caller wished, without a graph
    under `torch.no_grad`. A forward under `torch.inference_mode` runs outside of it.
    """

    def __init__(self) -> None:
        self._outside = torch.is_grad_enabled()
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
        """The tensor as a node of the graph: itself where it is one already, else a new leaf."""
        if tensor.requires_grad:
            return tensor
        torch.set_grad_enabled(True)  # until the model returns
        start = tensor.clone() if tensor.is_inference() else tensor.detach()
        return start.requires_grad_()

    def pause(self) -> bool:
        """Go on without a graph, if the caller wanted none; whether that is so."""
        if self._before is not False:
            return False
        torch.set_grad_enabled(False)
        return True

    def leave(self) -> bool:
        """The forward has ended; whether it had a graph that its caller did not ask for."""
        began = self._before is False and torch.is_grad_enabled()
        self._restore(self._before)
        if self._normal is not None:
            normal, self._normal = self._normal, None
            normal.__exit__(None, None, None)
        return began

    def stop(self) -> None:
        """No more forwards; one that was interrupted has not been left."""
        self._restore(self._outside)
        if self._normal is not None:
            _ABANDONED.append(self._normal)
            self._normal = None

    def _restore(self, mode: bool | None) -> None:
        if self._before is not None and mode is not None:
            torch.set_grad_enabled(mode)
            self._before = None
