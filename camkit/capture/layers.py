"""One forward of any model, with the outputs of chosen layers kept for gradients."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, measuring
from camkit.capture.class_query import ClassQuery
from camkit.capture.hooks import Graph, Hooks, borrowed
from camkit.capture.host import Host
from camkit.capture.session import grid_of_aspect
from camkit.capture.tail import block_modules
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.torch_internals import is_compiled


@dataclass(frozen=True, eq=False)
class LayerRun:
    """What one forward made.

    Attributes:
        output: what the model returned.
        layers: outputs of the chosen layers, in the graph that begins at the first of them.
    """

    output: Any
    layers: tuple[Tensor, ...]


class Layers:
    """Runs a model and keeps what chosen layers make; nothing stays on the model in between.

    Where the scores of a Vision Transformer are read from its class token, and the layers come
    before the attention of the last block, that block is evaluated for the class query only.

    Args:
        model: any module that is called with images alone.
        layers: parts of it that return one tensor; None is the norm before the last attention.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module] | None) -> None:
        self.model = model
        self._host = _host(model)
        if layers is None:
            found = self.right_layer()
            if found is None:
                raise ValueError(
                    f"the layer to look at in {type(model).__name__} is not known; name it with "
                    "`target_layers=`"
                )
            layers = [model.get_submodule(found)]
        self.names = tuple(_name(model, layer) for layer in dict.fromkeys(layers))
        self._layers = tuple(dict.fromkeys(layers))
        self._anatomy: Anatomy | None = None

    def right_layer(self) -> str | None:
        """The norm before the attention of the last block, by name."""
        if self._host is None:
            return None
        blocks = list(block_modules(self._host.model, self._host.blocks()).values())
        last = set(blocks[-1].modules()) if blocks else set()
        norms = (n for n, m in self.model.named_modules() if m in last and _is_norm(m))
        return next(norms, None)

    def patches(self, tokens: int, size: Sequence[int]) -> tuple[list[int], Grid]:
        """Positions of the patches in a sequence that this model makes of images, and their grid.

        Args:
            tokens: length of the sequence.
            size: rows and columns of the images.

        Raises:
            UnsupportedModelError: the layout of the tokens is not known.
        """
        if self._anatomy is None:
            raise UnsupportedModelError(
                f"the layout of the tokens of {type(self.model).__name__} is not known; give a "
                "`reshape_transform` that makes (b, channels, h, w) of them"
            )
        positions = self._anatomy.patches(tokens)
        return positions, grid_of_aspect(size, len(positions))

    def __call__(self, pixels: Tensor, *, gradients: bool) -> LayerRun:
        """Run the model once, in evaluation mode, with a graph from the first layer on."""
        found: dict[nn.Module, Tensor] = {}
        graph = Graph()

        def keep(layer: nn.Module, *call: Any) -> Tensor | None:
            if measuring() or not isinstance(call[-1], Tensor):
                return None
            found[layer] = graph.begin(call[-1]) if gradients else call[-1]
            return found[layer]

        with ExitStack() as stack:
            stack.enter_context(borrowed(self.model))
            stack.enter_context(torch.no_grad())
            if is_compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            pixels = pixels.clone() if pixels.is_inference() else pixels
            query = self._query(pixels)
            hooks = Hooks()
            stack.callback(hooks.remove)
            for layer in self._layers:
                hooks.after(layer, keep)
            if query is not None and self._host is not None and self._anatomy is not None:
                query.start(hooks)
                stack.callback(query.disarm)
                query.started()
                query.arm(self._host.core, (pixels,), {}, self._anatomy, early=self._layers)
            output = self.model(pixels)
        missing = [
            n for n, layer in zip(self.names, self._layers, strict=True) if layer not in found
        ]
        if missing:
            raise CaptureError(
                f"{missing[0]} did not run, or returned no tensor; name a layer that does"
            )
        return LayerRun(output, tuple(found[layer] for layer in self._layers))

    def _query(self, pixels: Tensor) -> ClassQuery | None:
        if self._host is None:
            return None
        if self._anatomy is None:
            try:
                self._anatomy = self._host.anatomy(self._host.core, (pixels,), {})
            except (CaptureError, UnsupportedModelError):
                self._host = None
                return None
        return ClassQuery(self._host)


def _host(model: nn.Module) -> Host | None:
    try:
        return Host.of(model)
    except UnsupportedModelError:
        return None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _name(model: nn.Module, layer: nn.Module) -> str:
    for name, module in model.named_modules():
        if module is layer:
            return name
    raise ValueError(f"`target_layers` must be modules of the model, got {type(layer).__name__}")
