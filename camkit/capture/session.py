"""One forward of a host, observed from its entrance to its end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, image_batch, measuring
from camkit.capture.attention import (
    Attention,
    AttentionInputs,
    ClassRows,
    ExplicitAttention,
    FusedAttention,
)
from camkit.capture.class_query import ClassPath, ClassQuery
from camkit.capture.hooks import Graph, Hooks
from camkit.capture.host import Host, head_count
from camkit.capture.intercept import EvenRows, Intercept, Tap
from camkit.capture.record import NoisyForward, PoolingCall, TokenCall, WatchSpec, scores_of
from camkit.capture.tail import (
    TailCall,
    block_modules,
    is_classifier,
    pooling_modules,
    tail_modules,
    tokens_of,
)
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention call of a forward.

    Attributes:
        index: its place among all calls.
        name: the module that made it.
        attention: the call.
        against: why it cannot be read by patches; empty where it can.
    """

    index: int
    name: str
    attention: Attention
    against: str


class Selection:
    """All blocks, the last n, or indices; negative ones count from the last block that runs."""

    def __init__(self, blocks: int | Sequence[int] | None) -> None:
        if isinstance(blocks, int):
            if blocks < 1:
                raise ValueError(f"`blocks` must be at least 1, got {blocks}")
            blocks = range(-blocks, 0)
        if blocks is not None and not list(blocks):
            raise ValueError("`blocks` must name at least one block, got none")
        self._blocks = None if blocks is None else list(blocks)

    def wants(self, index: int, calls: int | None) -> bool:
        """Whether call ``index`` is kept, or may be while the number of calls is unknown."""
        if self._blocks is None or index in self._blocks:
            return True
        if calls is None:
            return min(self._blocks) < 0
        return index - calls in self._blocks

    def drop(self, kept: list[AttentionRecord]) -> None:
        """Let go of calls that can no longer be wanted."""
        if self._blocks is None:
            return
        newest = kept[-1].index
        reach = -min(0, *self._blocks)
        kept[:] = [c for c in kept if c.index in self._blocks or newest - c.index < reach]

    def pick(self, kept: list[AttentionRecord], calls: int) -> list[AttentionRecord]:
        """The wanted calls of a finished forward, in the order they ran."""
        if self._blocks is None:
            return list(kept)
        outside = [b for b in self._blocks if not -calls <= b < calls]
        if outside:
            raise CaptureError(f"{calls} attention blocks ran, but `blocks` asks for {outside}")
        wanted = {b % calls for b in self._blocks}
        return [call for call in kept if call.index in wanted]


@dataclass
class Forward:
    """What has been seen of the forward that is running."""

    images: int | None = None
    size: Sequence[int] = ()
    anatomy: Anatomy | None = None
    kept: list[AttentionRecord] = field(default_factory=list)
    pooling: list[PoolingCall] = field(default_factory=list)
    calls: int = 0
    modules: int = 0
    running: str = ""
    entered: AttentionInputs = field(default_factory=AttentionInputs)
    grid: Grid | None = None
    tail: list[TailCall] = field(default_factory=list)
    outputs: Tensor | None = None
    entering: list[TokenCall] = field(default_factory=list)
    leaving: list[TokenCall] = field(default_factory=list)
    class_paths: list[TokenCall] = field(default_factory=list)
    samples: list[NoisyForward] = field(default_factory=list)
    class_query_only: bool = False

    def known_tail(self) -> tuple[TailCall, ...]:
        """Calls behind the last block, without the tokens that were never evaluated."""
        if not self.class_query_only or self.anatomy is None:
            return tuple(self.tail)
        place = self.anatomy.class_tokens[0]

        def known(tokens: Tensor) -> Tensor:
            return tokens[:, place, None] if tokens.dim() == 3 else tokens

        return tuple(
            TailCall(call.module, known(call.input), known(call.output))
            for call in self.tail
            if call.input.dim() == call.output.dim() < 4
        )

    def read(self, output: Any, scores: Callable[[Any], Tensor] | None, *, at_core: bool) -> None:
        """Find the class scores in what the model returned; a wrapper around it makes none."""
        if scores is not None:
            self.outputs = scores(output)
        elif at_core:
            self.outputs = self.classified(scores_of(output))
        if self.outputs is not None and not torch.is_grad_enabled():
            self.outputs = self.outputs.detach()

    def classified(self, outputs: Tensor | None) -> Tensor | None:
        """The outputs if they are class scores: a classifier made them, or each has a class token.

        Embeddings look the same, and a gradient of their third number means nothing.
        """
        if outputs is None or self.anatomy is None:
            return None
        made = any(
            call.output.flatten(1).shape == outputs.shape
            for call in self.tail
            if is_classifier(call.module)
        )
        owned = 1 < len(self.anatomy.class_tokens) == outputs.shape[-1]
        return outputs if made or owned else None


def checked_grid(
    forward: Forward, said: Grid | None, kept: Sequence[AttentionRecord]
) -> tuple[Anatomy, Grid]:
    """Token roles and patch grid of a finished forward, or why it cannot be read by patches."""
    if forward.anatomy is None:
        raise CaptureError("the tokens of this forward were not measured")
    against = next((call.against for call in kept if call.against), "")
    if against:
        raise UnsupportedModelError(against)
    shapes = [call.attention.shape for call in kept]
    lengths = sorted({shape[2] for shape in shapes})
    if len(lengths) > 1:
        raise UnsupportedModelError(
            f"the watched blocks run on {', '.join(map(str, lengths))} tokens, and maps of one "
            "resolution do not fit another; keep blocks of one resolution with `blocks=`"
        )
    tokens = shapes[-1][2]
    patches = len(forward.anatomy.patches(tokens))
    grid = said or forward.grid or grid_of_aspect(forward.size, patches)
    if patches != grid.size:
        raise CaptureError(
            f"{tokens} tokens less {len(forward.anatomy.special_tokens)} special ones leave "
            f"{patches}, but the patch grid is {grid.rows}x{grid.cols}; name what is wrong with "
            "`class_tokens=` or `grid=`"
        )
    return forward.anatomy, grid


def grid_of_aspect(size: Sequence[int], count: int) -> Grid:
    """The one grid that has this number of patches and exactly the image's aspect."""
    if len(size) == 2 and count:
        height, width = size
        rows = round((count * height / width) ** 0.5)
        if rows and count % rows == 0 and rows * width == count // rows * height:
            return Grid(rows, count // rows)
    raise UnsupportedModelError(
        "no patch embedding found (a convolution with 3 input channels, stride = kernel >= 4), "
        "so the patch grid is unknown; name it with `grid=(rows, cols)`"
    )


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

    def __init__(
        self, host: Host, wanted: WatchSpec, graph: Graph, *, cut: bool, skip_unused_patches: bool
    ) -> None:
        self._host = host
        self._wanted = wanted
        self._graph = graph
        self._cut = cut
        self._listening: Listening | None = None
        self._sampling = False
        self._rows: Intercept | None = None
        self._query = ClassQuery(host) if skip_unused_patches and not wanted.last_patches else None
        blocks = host.blocks()
        last = list(blocks)[-wanted.entering :] if wanted.entering else []
        self._names = {blocks[name]: name for name in last}
        through = wanted.within_blocks or wanted.leaving or wanted.class_paths
        self._blocks = block_modules(host.model, blocks) if through else {}
        paths = self._blocks if wanted.class_paths else {}
        self._paths = {name: ClassPath(name, blocks[name], block) for name, block in paths.items()}
        if (wanted.within_blocks or wanted.class_paths) and not self._blocks:
            raise UnsupportedModelError(
                "no block lies around the attention modules of this model, so nothing leaves one; "
                "use GradientSeed or RelevanceSeed"
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
                clean.samples.append(NoisyForward(tuple(latest().entering), latest().outputs))
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
        kept = self._graph.begin(tokens) if self._wanted.entering_gradients else tokens.detach()
        forward.entering.append(TokenCall(self._names[module], kept, _turned(forward)))
        if not self._wanted.entering_gradients:
            return None
        # queries, keys and values are often one tensor
        named = {name: kept if v is tokens else v for name, v in kwargs.items()}
        return tuple(kept if v is tokens else v for v in args), named

    def _even_rows(self, *_: Any) -> None:
        ours = not torch.is_grad_enabled()  # a caller's own graph needs gradients of weights
        if ours and self._listening is not None and self._listening() is not None:
            self._rows = Intercept(EvenRows())
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


_RUNS: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()  # attention calls a forward makes


class Recorder:
    """Hooks on a host, and the forward they have seen last."""

    def __init__(
        self,
        host: Host,
        keep: Selection,
        *,
        requires: WatchSpec,
        class_rows_only: bool,
        skip_unused_patches: bool,
        scores: Callable[[Any], Tensor] | None,
    ) -> None:
        self.forward = Forward()
        self.entered = 0
        self._host = host
        self._keep = keep
        wanted = requires
        self._gradients = wanted.gradients or wanted.within_blocks
        self._values = wanted.class_paths
        drawn = self._gradients or wanted.entering_gradients or wanted.class_paths
        self._graph, self._drawn = Graph(), drawn
        self._class_rows_only = class_rows_only
        self._scores = scores
        self._names = {module: name for name, module in host.attention.items()}
        self._hooks = Hooks()
        whole = (
            not skip_unused_patches or wanted.last_patches
        )  # the normaliser of one query is none of the others'
        self._taps = {
            m: Intercept(Tap(self._on_attention, heads=head_count(m), normaliser=whole))
            for m in self._names
        }
        self._tap: Intercept | None = None
        self._entrance: nn.Module | None = None
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._thread = 0
        cut = not wanted.gradients and not wanted.entering_gradients
        self._tokens = TokenRecorder(
            host, wanted, self._graph, cut=cut, skip_unused_patches=skip_unused_patches
        )

    def start(self) -> None:
        """Put the hooks on."""
        host = self._host
        for entrance in host.entrances:
            self._hooks.before(entrance, self._before_entrance)
            self._hooks.after(entrance, self._after_entrance)
        for module in host.attention.values():
            # outside all edits, so that attention is seen as they leave it
            self._hooks.before(module, self._before_attention, outermost=True)
            self._hooks.after(module, self._after_attention, outermost=True)
        for embedding in host.embeddings:
            self._hooks.after(embedding, self._after_embedding)
        tail = tail_modules(host.model, list(host.attention))
        for module in (*tail, *pooling_modules(host.model, host.attention)):
            self._hooks.after(module, self._after_tail)
        for module in set(block_modules(host.model, host.attention).values()):
            self._hooks.after(module, self._after_block, outermost=True)
        self._tokens.start(self._hooks, self._running)

    def stop(self) -> None:
        """Take the hooks off and leave every mode as it was found."""
        self._hooks.remove()
        self._untap()
        self._taps.clear()  # they point back here, and a cycle would hold the graph until collected
        self._leave()
        self._tokens.stop()
        self._graph.stop()

    def _before_entrance(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if measuring() or self._inside():
            return
        images = image_batch(args, kwargs)
        if images is None:  # an outer module that is called with something else
            return
        self._host.check_in_place()
        anatomy = self._host.anatomy(module, args, kwargs)
        self._entrance = module
        self._call = (args, kwargs)
        self._thread = get_ident()
        self.entered += 1
        self.forward = Forward(images=len(images), size=images.shape[-2:], anatomy=anatomy)
        self._tokens.enter(module, args, kwargs, self.forward)
        if self._drawn:
            self._graph.enter()

    def _after_entrance(self, module: nn.Module, *call: Any) -> Tensor | None:
        if measuring() or module is not self._entrance or self._thread != get_ident():
            return None
        self._leave()
        output = call[-1]
        if output is not None:
            with torch.set_grad_enabled(self._drawn):
                self.forward.read(output, self._scores, at_core=module is self._host.core)
        began = self._graph.leave()
        self._tokens.leave()
        if output is None:  # the forward raised
            return None
        _RUNS[self._host.model] = self.forward.calls
        self.forward = self._tokens.sampled(module, call, self.forward, lambda: self.forward)
        # who asked for no gradients gets a tensor without; the graph is ours
        return output.detach() if began and isinstance(output, Tensor) else None

    def _before_attention(self, module: nn.Module, *call: Any) -> None:
        if measuring() or not self._listening():
            return
        self.forward.modules += 1
        self.forward.running = self._names[module]
        self.forward.entered = AttentionInputs.by(
            (*call[0], *call[1].values()),
            images=self.forward.images,
            module=module,
            anatomy=self.forward.anatomy,
            measured=self._host.class_tokens is None,
        )
        self._tap = self._taps[module]
        self._tap.__enter__()

    def _inside(self) -> bool:
        """Whether a forward is under way, in this thread."""
        if self._entrance is not None and self._thread != get_ident():
            raise CaptureError(
                "two threads call a watched model at once, and what they show would mix; let one "
                "wait for the other, or give each a copy of the model"
            )
        return self._entrance is not None

    def _elsewhere(self) -> bool:
        """Whether this is a measurement, or a thread that has been refused."""
        return measuring() or (self._entrance is not None and self._thread != get_ident())

    def _leave(self) -> None:
        self._entrance, self._call = None, ((), {})

    def _listening(self) -> bool:
        """Inside a forward; or in a host that never enters one, whose tokens the user has named."""
        said = self._host.class_tokens is not None and self._host.grid is not None
        if self._entrance is None and not self.entered and said and self.forward.anatomy is None:
            self.forward.anatomy = self._host.anatomy(self._host.model, (), {})
        return self._inside() or (not self.entered and said)

    def _after_attention(self, *_: Any) -> None:
        if not self._elsewhere():
            self._untap()

    def _after_embedding(self, *call: Any) -> None:
        if not self._elsewhere() and isinstance(call[-1], Tensor):
            self.forward.grid = Grid(*call[-1].shape[-2:])

    def _after_tail(self, *call: Any) -> None:
        module, args, _, output = call
        if self._elsewhere() or self.forward.calls == 0 or not args:
            return
        if isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.forward.tail.append(TailCall(module, args[0].detach(), output.detach()))

    def _after_block(self, *call: Any) -> None:
        module, args, _, output = call
        given, left = tokens_of(args), tokens_of(output)
        running = self.forward.calls > 0 and self._entrance is not None  # no checkpoint's replay
        if self._elsewhere() or not running or given is None or left is None:
            return
        if self.forward.anatomy is not None and self.forward.anatomy.sequence_first:
            given, left = given.transpose(0, 1), left.transpose(0, 1)
        self.forward.tail.append(TailCall(module, given.detach(), left.detach()))

    def _on_attention(self, output: Tensor, attention: Attention) -> Tensor:
        if isinstance(attention, FusedAttention):
            return self._on_fused(output, attention)
        return self._on_explicit(output)

    def _on_fused(self, output: Tensor, attention: FusedAttention) -> Tensor:
        if self._gradients:
            output = self._in_graph(output)
            self._add(replace(attention, output=output))
            return output
        self._add(replace(attention, output=output).detached(values=self._values))
        return output

    def _on_explicit(self, weights: Tensor) -> Tensor:
        weights = self._in_graph(weights) if self._gradients else weights
        self._add(ExplicitAttention(weights if self._gradients else weights.detach()))
        return weights

    def _add(self, attention: Attention) -> None:
        if self._class_rows_only and self.forward.anatomy is not None:
            attention = ClassRows.of(attention, self.forward.anatomy.class_tokens)
        if attention.shape[2] == 1:  # one query that is no patch: it pools
            self._add_pooling(attention)
            return
        forward = self.forward
        forward.tail.clear()
        against = forward.entered.against(attention.shape)
        forward.kept.append(AttentionRecord(forward.calls, forward.running, attention, against))
        forward.entered = replace(forward.entered, calls=forward.entered.calls + 1)
        forward.calls += 1
        self._keep.drop(forward.kept)

    def _add_pooling(self, attention: Attention) -> None:
        forward, keys = self.forward, attention.shape[3]
        same = next((call for call in forward.pooling if call.attention.shape[3] == keys), None)
        anatomy = forward.anatomy if same is None else same.anatomy
        joined = bool(forward.kept) and forward.kept[-1].attention.shape[2] != keys
        if same is None and joined and self._entrance is not None:  # a token joined late
            anatomy = self._host.anatomy(self._entrance, *self._call, at=forward.running)
        if anatomy is not None:
            forward.pooling.append(PoolingCall(attention, anatomy))

    def _in_graph(self, tensor: Tensor) -> Tensor:
        """Begin the graph here when the caller runs without one and this block is watched."""
        calls = _RUNS.get(self._host.model)
        wanted = tensor.shape[2] == 1 or self._keep.wants(self.forward.calls, calls)
        return self._graph.begin(tensor) if wanted else tensor

    def _running(self) -> Forward | None:
        """The forward to look at, if one is under way."""
        return None if measuring() or not self._listening() else self.forward

    def _untap(self) -> None:
        """Leave the mode if it is on: an interrupt, or another's hook that raised, skips steps."""
        if self._tap is not None:
            tap, self._tap = self._tap, None
            tap.__exit__(None, None, None)
