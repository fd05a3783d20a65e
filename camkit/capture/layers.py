"""One forward of any model, with the outputs of chosen layers kept for gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from camkit.capture.anatomy import Anatomy, grid_of_aspect
from camkit.capture.class_query import ClassQuery
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, block_modules
from camkit.capture.modes import Graph, borrowed
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.printing import short_repr
from camkit.torch_internals import is_compiled


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let forwards of a model run in evaluation mode, without a graph, with hooks that are heard.

    Compiled models run uncompiled. Everything is as before at the end.
    """
    with ExitStack() as stack:
        stack.enter_context(borrowed(model))
        stack.enter_context(torch.no_grad())
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@dataclass(frozen=True, eq=False)
class LayerRun:
    """The result of one forward.

    Attributes:
        output: what the model returned.
        layers: outputs of the chosen layers, in the graph that begins at the first of them.
    """

    output: Any
    layers: tuple[Tensor, ...]

    __repr__ = short_repr


class Layers:
    """Runs a model and keeps the outputs of chosen layers; its hooks are gone between two runs.

    If the scores of a Vision Transformer are read from its class token, and the layers come before
    the attention of the last block, that block is computed for the class query only.

    Args:
        model: any module that takes images.
        layers: parts of it that return one tensor; None is the norm before the last attention.
        call: calls the model with images; None is ``model(pixels)``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module] | None,
        call: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        self.model = model
        self.call = call
        self._anatomy: Anatomy | None = None
        self._grid: Grid | None = None  # of the latest images
        try:
            self._host: Host | None = Host.of(model)
        except UnsupportedModelError:
            self._host = None
        if layers is None:
            name = self.right_layer()
            if name is None:
                raise ValueError(
                    f"camkit does not know which layer of {type(model).__name__} to read; name it "
                    "with `target_layers=`"
                )
            layers = [model.get_submodule(name)]
        self.modules = tuple(dict.fromkeys(layers))
        names = {module: name for name, module in model.named_modules()}
        for layer in self.modules:
            if layer not in names:
                raise ValueError(
                    "`target_layers` must be modules of the model, got another "
                    f"{type(layer).__name__}"
                )
        self.names = tuple(names[layer] for layer in self.modules)

    def right_layer(self) -> str | None:
        """Name the norm before the attention of the last block."""
        if self._host is None:
            return None
        blocks = list(block_modules(self._host.model, self._host.blocks()).values())
        last = set(blocks[-1].modules()) if blocks else set()
        for name, module in self.model.named_modules():
            if module in last and "norm" in type(module).__name__.lower():
                return name
        return None

    def patches(self, tokens: int, size: Sequence[int]) -> tuple[list[int], Grid]:
        """Return positions of the patches in a sequence of the latest run, and their grid.

        Args:
            tokens: length of the sequence.
            size: rows and columns of the images.

        Raises:
            UnsupportedModelError: the layout of the tokens is not known.
        """
        if self._anatomy is None:
            raise UnsupportedModelError(
                f"the layout of the tokens of {type(self.model).__name__} is not known; give a "
                "`reshape_transform` that returns them as (b, channels, h, w)"
            )
        positions = self._anatomy.patches(tokens)
        if self._grid is not None and self._grid.size == len(positions):
            return positions, self._grid
        return positions, grid_of_aspect(size, len(positions))  # of a later stage

    def __call__(self, pixels: Tensor, *, gradients: bool, twice: bool = False) -> LayerRun:
        """Run the model once, in evaluation mode.

        Args:
            pixels: as the model takes them.
            gradients: build a graph from the first layer on.
            twice: let gradients in this graph be differentiated once more.
        """
        outputs: dict[nn.Module, Tensor] = {}
        graph, hooks = Graph(), Hooks()

        def keep(layer: nn.Module, *call: Any) -> Tensor | None:
            if not isinstance(call[-1], Tensor):
                return None
            outputs[layer] = graph.begin(call[-1]) if gradients else call[-1]
            return outputs[layer]

        with undisturbed(self.model), ExitStack() as stack:
            if twice:  # torch's other kernels have no second derivative
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            pixels = pixels.clone() if pixels.is_inference() else pixels
            host = self._measured((pixels,), {}) if self.call is None else None
            stack.callback(hooks.remove)
            for layer in self.modules:
                hooks.after(layer, keep)
            if host is not None and self._anatomy is not None and not twice:
                query = ClassQuery(host)
                query.start(hooks)
                stack.callback(query.disarm)
                query.arm(host.core, (pixels,), {}, self._anatomy, early=self.modules)
            output = self._run(pixels, hooks)
        for name, layer in zip(self.names, self.modules, strict=True):
            if layer not in outputs:
                raise CaptureError(
                    f"{name} did not run, or returned no tensor; name a layer that does"
                )
        return LayerRun(output, tuple(outputs[layer] for layer in self.modules))

    def _run(self, pixels: Tensor, hooks: Hooks) -> Any:
        if self.call is None:
            return self.model(pixels)
        received: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        if self._host is not None:
            hooks.before(self._host.core, lambda _, *given: received.append(given))
        output = self.call(self.model, pixels)
        with torch.no_grad():
            for args, kwargs in received[:1]:
                self._measured(args, kwargs)
        return output

    def _measured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Host | None:
        """Measure the layout of tokens and the grid of these images, if there are tokens."""
        if self._host is None:
            return None
        host = self._host
        try:
            self._anatomy = self._anatomy or host.anatomy(host.core, args, kwargs)
        except (CaptureError, UnsupportedModelError):
            self._host = None
            return None
        self._grid = host.measured_grid(host.core, args, kwargs, self._anatomy)
        return host
