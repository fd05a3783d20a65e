"""Listens to the tokens of a host while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import image_batch
from camkit.capture.attention import FusedAttention
from camkit.capture.class_path import ClassPath
from camkit.capture.class_query import ClassQuery
from camkit.capture.even_rows import EvenRows
from camkit.capture.forward import Forward
from camkit.capture.graph import Graph
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host
from camkit.capture.stream import block_modules, tokens_of
from camkit.capture.tokens import Sample, TokenCall, TokenWatch
from camkit.errors import CaptureError, UnsupportedModelError

Listening = Callable[[], Forward | None]
"""The forward that is running and should be looked at, if any."""


class TokenRecorder:
    """Keeps the tokens that are wanted of each forward.

    Args:
        host: the model.
        wanted: what to keep.
        graph: of the forward.
        cut: between blocks, the graph is cut.
    """

    def __init__(self, host: Host, wanted: TokenWatch, graph: Graph, *, cut: bool) -> None:
        self._host = host
        self._wanted = wanted
        self._graph = graph
        self._cut = cut
        self._listening: Listening | None = None
        self._sampling = False
        self._rows: EvenRows | None = None
        self._query = ClassQuery(host) if wanted.class_query else None
        blocks = host.blocks()
        last = list(blocks)[-wanted.blocks :] if wanted.blocks else []
        self._names = {blocks[name]: name for name in last}
        through = wanted.within_blocks or wanted.leaving or wanted.class_paths
        self._blocks = block_modules(host.model, blocks) if through else {}
        paths = self._blocks if wanted.class_paths else {}
        self._paths = {name: ClassPath(name, blocks[name], block) for name, block in paths.items()}
        if (wanted.within_blocks or wanted.class_paths) and not self._blocks:
            raise UnsupportedModelError(
                "no block lies around the attention modules of this model, so nothing leaves one; "
                "use GradientSeed or RolloutSeed"
            )

    def start(self, hooks: Hooks, listening: Listening) -> None:
        """Put the hooks on, behind all others of this watch."""
        self._listening = listening
        for module in self._names:
            hooks.before(module, self._before_attention, outermost=True)
        for name, block in self._blocks.items():
            if self._cut and self._wanted.within_blocks:
                hooks.before(block, self._even_rows)
            hooks.after(block, self._leaving(name, last=name == list(self._blocks)[-1]))
        if self._query is not None:
            self._query.start(hooks)
            self._query.started()

    def stop(self) -> None:
        """Let go of the forward; the hooks are taken off by who holds them."""
        self._end_rows()
        self._listening = None
        if self._query is not None:
            self._query.disarm()

    def enter(
        self, entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Forward
    ) -> None:
        """A forward begins."""
        if self._query is not None and forward.anatomy is not None:
            armed = self._query.arm(entrance, args, kwargs, forward.anatomy)
            forward.class_query_only = armed

    def leave(self) -> None:
        """A forward has ended."""
        if self._query is not None:
            self._query.disarm()

    def sampled(
        self,
        run: nn.Module,
        call: Sequence[Any],
        clean: Forward,
        latest: Callable[[], Forward],
    ) -> Forward:
        """The forward that has ended, with those of the same images under noise.

        Args:
            run: the model.
            call: what it was called with.
            clean: its forward.
            latest: the forward seen last.
        """
        noise, pixels = self._wanted.noise, image_batch(call[0], call[1])
        if noise is None or pixels is None or self._sampling:
            return clean
        draws = torch.Generator().manual_seed(noise.rng_seed)
        self._sampling = True
        try:
            for _ in range(noise.samples):
                drawn = torch.randn(pixels.shape, generator=draws).to(pixels)
                moved = pixels + noise.spread * drawn
                named = {n: moved if v is pixels else v for n, v in call[1].items()}
                run(*(moved if value is pixels else value for value in call[0]), **named)
                clean.samples.append(Sample(tuple(latest().entering), latest().outputs))
        finally:
            self._sampling = False
        return clean

    def _before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self._listening() if self._listening is not None else None
        if forward is None:
            return None
        tokens = next((v for v in (*args, *kwargs.values()) if tokens_of(v) is v), None)
        if tokens is None:
            raise CaptureError(
                f"{self._names[module]} is called without (b, t, d) tokens, so none can be watched"
            )
        kept = self._graph.begin(tokens) if self._wanted.gradients else tokens.detach()
        forward.entering.append(TokenCall(self._names[module], kept, _turned(forward)))
        if not self._wanted.gradients:
            return None
        # queries, keys and values are often one tensor
        named = {name: kept if v is tokens else v for name, v in kwargs.items()}
        return tuple(kept if v is tokens else v for v in args), named

    def _even_rows(self, *_: Any) -> None:
        ours = not torch.is_grad_enabled()  # a caller's own graph needs gradients of weights
        if ours and self._listening is not None and self._listening() is not None:
            self._rows = EvenRows()
            self._rows.__enter__()

    def _end_rows(self) -> None:
        if self._rows is not None:
            rows, self._rows = self._rows, None
            rows.__exit__(None, None, None)

    def _leaving(self, name: str, *, last: bool) -> Callable[..., Any]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            del module
            self._end_rows()
            forward = self._listening() if self._listening is not None else None
            tokens = tokens_of(output)
            if forward is None or tokens is None or not forward.kept:
                return None
            if name in self._paths:
                self._follow(name, (args, kwargs), tokens, forward)
            if not self._wanted.within_blocks:
                if self._wanted.leaving:
                    forward.leaving.append(TokenCall(name, tokens.detach(), _turned(forward)))
                return None
            attention = forward.kept[-1].attention
            forward.leaving.append(TokenCall(name, tokens, _turned(forward), attention))
            if not self._cut or last or not self._graph.pause():
                return None
            apart = tokens.detach()
            return (apart, *output[1:]) if isinstance(output, tuple) else apart

        return leave

    def _follow(self, name: str, call: tuple[Any, Any], left: Tensor, forward: Forward) -> None:
        kept, anatomy = forward.kept[-1], forward.anatomy
        if anatomy is None:
            return
        forward.class_paths.append(self._paths[name](*call, left, kept.attention, anatomy))
        alone = self._cut and not self._wanted.within_blocks
        if alone and isinstance(kept.attention, FusedAttention):  # nobody else needs its values
            light = kept.attention.detached(values=False)
            forward.kept[-1] = replace(kept, attention=light)


def _turned(forward: Forward) -> bool:
    return forward.anatomy is not None and forward.anatomy.sequence_first
