"""watch(model): see the attention of the next forward without touching the model."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import NO_GRID, Anatomy, image_batch
from camkit.capture.attention import Attention, ClassRows, ExplicitAttention, FusedAttention
from camkit.capture.class_query import ClassPath, ClassQuery
from camkit.capture.host import Host, block_modules, how_to_reveal, tail_modules
from camkit.capture.intercept import EvenRows, Intercept
from camkit.capture.modes import Graph
from camkit.capture.record import (
    Capture,
    NoisyForward,
    PoolingCall,
    SmoothGrad,
    TokenCall,
    WatchSpec,
)
from camkit.capture.scores import ACTIVATIONS, find_scores, known_classes
from camkit.capture.session import (
    Arguments,
    AttentionCall,
    ForwardContext,
    ForwardSession,
    Hooks,
    Named,
    Subscriber,
)
from camkit.capture.tail import TailCall, is_classifier, tokens_of
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.ops.images import check_rgb
from camkit.tensors import RGB
from camkit.torch_internals import is_compiled
from camkit.vocabulary import Vocabulary


def watch(  # noqa: PLR0913 - each says one thing about the model or the record
    model: nn.Module,
    *,
    blocks: int | Sequence[int] | None = None,
    requires: WatchSpec | None = None,
    gradients: bool = False,
    class_rows_only: bool = False,
    skip_unused_patches: bool = False,
    rgb: RGB | None = None,
    vocabulary: Vocabulary | None = None,
    scores: Callable[[Any], Tensor] | None = None,
    modules: Iterable[str] | None = None,
    class_tokens: Sequence[int] | None = None,
    grid: Grid | tuple[int, int] | None = None,
) -> "Watch":
    """See the attention of the forwards inside a ``with`` block.

    The host keeps its fused kernels, modes, flags and weights, and its hooks are removed at the end
    of the block. A compiled model runs uncompiled inside it.

    Args:
        model: any Vision Transformer; call it inside the block as you always do.
        blocks: attention blocks to keep, in the order they run: None all, n the last n, or indices.
        requires: what seeds and refiners will read, ``seed.requires | refiner.requires``; None is
            attention alone.
        gradients: the same as ``requires=WatchSpec(gradients=True)``, for gradient seeds. Works in
            no_grad and on frozen models: the graph then begins at the first watched block.
        class_rows_only: keep the rows of the class tokens and nothing else, for large batches: then
            memory hardly grows, and `ClassAttentionSeed` works but no refiner that reads attention.
        skip_unused_patches: compute the last block for the class token only, if ``requires`` says
            that nothing reads the patches behind it and a trial on the model finds its scores
            exact. The model's other outputs are then unknown.
        rgb: the pictures in [0, 1], for refiners that read colours.
        vocabulary: names of the classes, and which classifier outputs make up each.
        scores: returns ``(b, classes)`` scores of what the model returns, for hosts that return
            embeddings; CLIP's are ``lambda image: 100 * image @ text.T`` of normalised embeddings.
        modules: names of the attention modules, if camkit does not find them by their form.
        class_tokens: positions of the class tokens, if camkit does not find them by their names.
        grid: rows and columns of patches, if no patch embedding shows them.

    Raises:
        UnsupportedModelError: the model holds no attention that camkit knows, or hides it.

    Example:
        >>> with camkit.watch(model, blocks=3) as seen:  # doctest: +SKIP
        ...     logits = model(pixels)
        >>> seen.capture.class_to_patch()  # doctest: +SKIP
    """
    spec = requires or WatchSpec()
    spec = replace(spec, gradients=spec.gradients or gradients)
    if (spec.gradients or spec.within_blocks or spec.class_paths) and class_rows_only:
        raise ValueError("`class_rows_only` drops what `gradients` needs; choose one of them")
    if rgb is not None:
        check_rgb(rgb)
    host = Host.of(model, modules=modules, class_tokens=class_tokens, grid=grid)
    if isinstance(blocks, int):
        if blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, got {blocks}")
        blocks = range(-blocks, 0)
    if blocks is not None and not list(blocks):
        raise ValueError("`blocks` must name at least one block, got none")
    selected = None if blocks is None else list(blocks)
    recorder = partial(
        Recorder,
        host,
        selected,
        spec,
        class_rows_only=class_rows_only,
        skip_unused_patches=skip_unused_patches,
        scores=scores,
    )
    return Watch(host, selected, recorder, rgb=rgb, vocabulary=vocabulary)


class Watch:
    """A model being watched; ``capture`` is its latest forward."""

    def __init__(
        self,
        host: Host,
        selected: list[int] | None,
        new_recorder: "Callable[[], Recorder]",
        *,
        rgb: RGB | None,
        vocabulary: Vocabulary | None,
    ) -> None:
        self._host = host
        self._selected = selected
        self._new_recorder = new_recorder
        self._rgb = rgb
        self._vocabulary = vocabulary
        self._recorder: Recorder | None = None
        self._stack = ExitStack()
        finalize(self, self._stack.close).atexit = False  # a forgotten watch leaves no hooks

    def __enter__(self) -> "Watch":
        self._recorder = self._new_recorder()
        session = ForwardSession(self._host, self._recorder)
        self._stack.callback(session.stop)
        if is_compiled(self._host.model):  # compiled code would run past hooks it has not met
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        session.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def capture(self) -> Capture:
        """What the latest forward showed.

        Raises:
            CaptureError: no forward ran, or its tokens do not fit its grid.
            UnsupportedModelError: its attention does not relate patches one to one.
        """
        forward = None if self._recorder is None else self._recorder.forward
        if forward is None or forward.count == 0:
            raise CaptureError(self._why_nothing(forward))
        kept, count = list(forward.kept), forward.count
        if self._selected is not None:
            outside = [b for b in self._selected if not -count <= b < count]
            if outside:
                raise CaptureError(f"{count} attention blocks ran, but `blocks` asks for {outside}")
            selected = {b % count for b in self._selected}
            kept = [record for record in kept if record.index in selected]
        return Capture(
            blocks=tuple(record.attention for record in kept),
            names=tuple(record.name for record in kept),
            anatomy=forward.anatomy,
            grid=_checked_grid(forward, self._host.grid, kept),
            outputs=forward.outputs,
            tail=forward.known_tail(),
            pooling=tuple(forward.pooling),
            entering=tuple(forward.entering),
            leaving=tuple(forward.leaving),
            class_paths=tuple(forward.class_paths),
            samples=tuple(forward.samples),
            class_query_only=forward.class_query_only,
            activation=forward.activation,
            why_no_scores=forward.why_no_scores,
            rgb=self._rgb,
            vocabulary=self._vocabulary,
        )

    def _why_nothing(self, forward: "Recording | None") -> str:
        if forward is None or (forward.entrance is None and not forward.ran):
            return (
                "nothing captured yet; call the model inside the `with` block. If you did, it was "
                "called past its own forward: watch the module that is called with the images, or "
                "name `class_tokens=` and `grid=`"
            )
        if not forward.ran:
            return (
                "the model ran but none of its attention modules did; name those that run with "
                f"`modules=` (found: {', '.join(list(self._host.attention)[:3])}, ...)"
            )
        return (
            f"{len(forward.ran)} attention modules ran but none called softmax, "
            "scaled_dot_product_attention or multi_head_attention_forward on (b, heads, t, t) "
            f"maps: {how_to_reveal(self._host.model)}"
        )


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention call of a forward.

    Attributes:
        index: its place among all calls.
        name: the module that made it.
        attention: the call.
        why_unreadable: why it cannot be read by patches; empty if it can.
    """

    index: int
    name: str
    attention: Attention
    why_unreadable: str


@dataclass(eq=False)
class Recording(ForwardContext):
    """What a watch stores of one forward; most of it is an attribute of `Capture`.

    Attributes:
        kept: the latest attention calls, as far as they may be selected.
        count: how many attention calls there were, without pooling queries.
        graph: the gradient mode of the forward.
    """

    kept: list[AttentionRecord] = field(default_factory=list)
    count: int = 0
    graph: Graph = field(default_factory=Graph)
    pooling: list[PoolingCall] = field(default_factory=list)
    tail: list[TailCall] = field(default_factory=list)
    outputs: Tensor | None = None
    entering: list[TokenCall] = field(default_factory=list)
    leaving: list[TokenCall] = field(default_factory=list)
    class_paths: list[TokenCall] = field(default_factory=list)
    samples: list[NoisyForward] = field(default_factory=list)
    class_query_only: bool = False
    activation: str = ""
    why_no_scores: str = ""

    def known_tail(self) -> tuple[TailCall, ...]:
        """Return the calls behind the last block, without tokens that were never computed."""
        if not self.class_query_only:
            return tuple(self.tail)
        place = self.anatomy.class_tokens[0]

        def known(tokens: Tensor) -> Tensor:
            return tokens[:, place, None] if tokens.dim() == 3 else tokens

        return tuple(
            TailCall(call.module, known(call.input), known(call.output))
            for call in self.tail
            if call.input.dim() == call.output.dim() < 4
        )

    def find_scores(self, output: Any, stated: int | None) -> None:
        """Find the class scores in an output, see `camkit.capture.scores.find_scores`."""
        found = find_scores(
            output, self.tail, self.anatomy.class_tokens, images=self.images, stated=stated
        )
        self.outputs = found.scores
        self.activation, self.why_no_scores = found.activation, found.why_not


_COUNTS: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()  # attention calls of a forward


class Recorder(Subscriber[Recording]):
    """Stores what a watch is to keep of each forward; ``forward`` is the latest."""

    outermost = True  # attention is seen as edits leave it
    one_thread = True
    context_type = Recording

    def __init__(
        self,
        host: Host,
        selected: list[int] | None,
        spec: WatchSpec,
        *,
        class_rows_only: bool,
        skip_unused_patches: bool,
        scores: Callable[[Any], Tensor] | None,
    ) -> None:
        self.forward: Recording | None = None
        self._host = host
        self._selected = selected
        self._spec = spec
        self._class_rows_only = class_rows_only
        self._scores = scores
        self._with_gradients = spec.gradients or spec.within_blocks
        self._builds_graph = self._with_gradients or spec.entering_gradients or spec.class_paths
        self._cuts_graph = not spec.gradients and not spec.entering_gradients
        self._grad_mode_outside = torch.is_grad_enabled()
        self._sampling = False
        self._even_rows: Intercept | None = None
        self._entering = list(host.blocks())[-spec.entering :] if spec.entering else []

        around = block_modules(host.model, host.attention)
        self.attention_modules = host.attention
        tail = tail_modules(host.model, list(host.attention))
        self._observed = dict.fromkeys(tail, False) | dict.fromkeys(around.values(), True)
        leaving = spec.within_blocks or spec.leaving or spec.class_paths
        self.blocks = around if leaving else {}
        if (spec.within_blocks or spec.class_paths) and not around:
            raise UnsupportedModelError(
                "the attention modules of this model lie in no block, so there are no tokens that "
                "leave one; use GradientSeed or RelevanceSeed"
            )
        self._paths: dict[str, ClassPath] = {}
        for name, block in around.items() if spec.class_paths else ():
            self._paths[name] = ClassPath(name, host.attention[name], block)
        # the normaliser of a single query does not hold for the others
        self.normaliser = not skip_unused_patches or spec.last_patches
        self._query = None if self.normaliser else ClassQuery(host)

    def start(self, hooks: Hooks) -> None:
        for module, is_block in self._observed.items():  # blocks as all other hooks leave them
            hooks.after(module, self._after_observed, outermost=is_block)
        if self._cuts_graph and self._spec.within_blocks:
            for block in self.blocks.values():
                hooks.before(block, self._begin_even_rows)
                hooks.after(block, self._end_even_rows)
        if self._query is not None:
            self._query.start(hooks)

    def forward_begins(self, context: Recording) -> None:
        before, self.forward = self.forward, context
        if before is not None and before.running:  # an interrupt left it
            before.graph.forget()
        if self._query is not None and context.entrance is not None:
            context.class_query_only = self._query.arm(
                context.entrance, context.args, context.kwargs, context.anatomy
            )
        if self._builds_graph:
            context.graph.enter()

    def context_outside(self) -> Recording | None:
        """Record a host that no forward is known of, if the user named its tokens and grid."""
        named = self._host.class_tokens
        if named is None or self._host.grid is None:
            return None
        if self.forward is None:
            self.forward = Recording(Anatomy(class_tokens=named))
        return self.forward if self.forward.entrance is None else None

    def attention_begins(self, call: AttentionCall[Recording]) -> tuple[Arguments, Named] | None:
        if call.name not in self._entering:
            return None
        context, args, kwargs = call.context, call.args, call.kwargs
        tokens = next((v for v in (*args, *kwargs.values()) if tokens_of(v) is v), None)
        if tokens is None:
            raise CaptureError(
                f"{call.name} is called without (b, t, d) tokens, so its tokens cannot be recorded"
            )
        gradients = self._spec.entering_gradients
        node = context.graph.begin(tokens) if gradients else tokens.detach()
        context.entering.append(TokenCall(call.name, node, context.anatomy.sequence_first))
        if not gradients:
            return None
        # queries, keys and values are often one tensor
        named = {name: node if value is tokens else value for name, value in kwargs.items()}
        return tuple(node if value is tokens else value for value in args), named

    def attention(
        self, call: AttentionCall[Recording], output: Tensor, attention: Attention
    ) -> Tensor:
        context, pools = call.context, output.shape[2] == 1
        if self._with_gradients:
            if pools or self._may_be_selected(context.count):
                output = context.graph.begin(output)
            if isinstance(attention, FusedAttention):
                attention = replace(attention, output=output)
            else:
                attention = ExplicitAttention(output)
        elif isinstance(attention, FusedAttention):
            attention = attention.detached(values=self._spec.class_paths)
        else:
            attention = ExplicitAttention(output.detach())
        if self._class_rows_only:
            attention = ClassRows.of(attention, context.anatomy.class_tokens)
        if pools:  # its query is no patch
            call.maps += 1
            self._store_pooling(call, attention)
            return output
        context.tail.clear()
        index, why = context.count, call.why_unreadable(attention)
        call.maps += 1
        context.count += 1
        context.kept.append(AttentionRecord(index, call.name, attention, why))
        if self._selected is not None:  # drop records that can no longer be selected
            reach = index + min(0, *self._selected)
            kept = [r for r in context.kept if r.index in self._selected or r.index > reach]
            context.kept = kept
        return output

    def _may_be_selected(self, index: int) -> bool:
        if self._selected is None or index in self._selected:
            return True
        count = _COUNTS.get(self._host.model)
        return min(self._selected) < 0 if count is None else index - count in self._selected

    def _store_pooling(self, call: AttentionCall[Recording], attention: Attention) -> None:
        context, keys = call.context, attention.shape[3]
        same = next((p for p in context.pooling if p.attention.shape[3] == keys), None)
        anatomy = context.anatomy if same is None else same.anatomy
        joined_late = bool(context.kept) and context.kept[-1].attention.shape[2] != keys
        if same is None and joined_late and context.entrance is not None:
            anatomy = self._host.anatomy(
                context.entrance, context.args, context.kwargs, at=call.name
            )
        context.pooling.append(PoolingCall(attention, anatomy))

    def _begin_even_rows(self, *_: Any) -> None:
        self._end_even_rows()  # of a block that holds two attention modules, or was interrupted
        if not torch.is_grad_enabled():  # a caller's graph needs gradients of weights
            self._even_rows = Intercept(EvenRows())
            self._even_rows.__enter__()

    def _end_even_rows(self, *_: Any) -> None:
        if self._even_rows is not None:
            even_rows, self._even_rows = self._even_rows, None
            even_rows.__exit__(None, None, None)

    def block_leaves(
        self,
        name: str,
        call: AttentionCall[Recording],
        args: Arguments,
        kwargs: Named,
        tokens: Tensor,
    ) -> Tensor | None:
        context, spec = call.context, self._spec
        if not context.kept:
            return None
        record, turned = context.kept[-1], context.anatomy.sequence_first
        if name in self._paths:
            path = self._paths[name](args, kwargs, tokens, record.attention, context.anatomy)
            context.class_paths.append(path)
            unused = self._cuts_graph and not spec.within_blocks
            if unused and isinstance(record.attention, FusedAttention):  # nothing reads its values
                light = record.attention.detached(values=False)
                context.kept[-1] = replace(record, attention=light)
        if not spec.within_blocks:
            if spec.leaving:
                context.leaving.append(TokenCall(name, tokens.detach(), turned))
            return None
        context.leaving.append(TokenCall(name, tokens, turned, record.attention))
        last = name == list(self.blocks)[-1]
        cut = self._cuts_graph and not last and context.graph.pause()
        return tokens.detach() if cut else None

    def _after_observed(self, module: nn.Module, args: Arguments, _: Named, output: Any) -> None:
        forward, is_block = self.forward, self._observed[module]
        if forward is None or forward.count == 0 or not args or output is None:
            return
        if forward.running and forward.thread != get_ident():
            return
        # a head may be called behind the forward of its backbone, but blocks are then replayed
        if is_block and not forward.running:
            return
        given, left = (tokens_of(args), tokens_of(output)) if is_block else (args[0], output)
        if not isinstance(given, Tensor) or not isinstance(left, Tensor):
            return
        if is_block and forward.anatomy.sequence_first:
            given, left = given.transpose(0, 1), left.transpose(0, 1)
        node = None
        if self._builds_graph:
            scores = left if is_classifier(module) else given
            node = scores if is_classifier(module) or isinstance(module, ACTIVATIONS) else None
        forward.tail.append(TailCall(module, given.detach(), left.detach(), node))

    def forward_ends(self, context: Recording, output: Any) -> Any:
        try:
            if output is not None:
                with torch.set_grad_enabled(self._builds_graph):
                    if self._scores is not None:
                        context.outputs = self._scores(output)
                    elif context.entrance is self._host.core:  # not of a wrapper around it
                        context.find_scores(output, known_classes(self._host.model))
                if context.outputs is not None and not self._builds_graph:
                    context.outputs = context.outputs.detach()
        finally:
            left = context.graph.leave(output)
            if self._query is not None:
                self._query.disarm()
        if output is None:  # the forward raised
            return None
        _COUNTS[self._host.model] = context.count
        self._settle_grid(context)
        if self._spec.noise is not None and not self._sampling:
            self._run_noisy(context, self._spec.noise)
        return left

    def _settle_grid(self, context: Recording) -> None:
        """Measure the grid, unless a patch embedding showed it."""
        if context.entrance is None or self._host.grid is not None or not context.kept:
            return
        record, shown = context.kept[-1], context.grid
        patches = len(context.anatomy.patches(record.attention.shape[2]))
        if record.why_unreadable or (shown is not None and shown.size == patches):
            return
        call = context.entrance, context.args, context.kwargs
        grid = self._host.measured_grid(*call, context.anatomy)
        if grid is not None and grid.size == patches:
            context.grid = grid

    def _run_noisy(self, clean: Recording, noise: SmoothGrad) -> None:
        """Run the same images under noise, and keep what seeds read of each forward."""
        pixels = image_batch(clean.args, clean.kwargs)
        if pixels is None or clean.entrance is None:
            return
        generator = torch.Generator().manual_seed(noise.rng_seed)
        self._sampling = True
        try:
            for _ in range(noise.samples):
                drawn = torch.randn(pixels.shape, generator=generator).to(pixels)
                noisy = pixels + noise.spread * drawn
                args = [noisy if value is pixels else value for value in clean.args]
                kwargs = {n: noisy if v is pixels else v for n, v in clean.kwargs.items()}
                clean.entrance(*args, **kwargs)
                if self.forward is not None:
                    sample = NoisyForward(tuple(self.forward.entering), self.forward.outputs)
                    clean.samples.append(sample)
        finally:
            self._sampling = False
            self.forward = clean

    def forward_interrupted(self, context: Recording) -> None:
        self._end_even_rows()
        if self._query is not None:
            self._query.disarm()
        context.graph.abandon(self._grad_mode_outside)


def _checked_grid(forward: Recording, named: Grid | None, kept: Sequence[AttentionRecord]) -> Grid:
    """Return the patch grid of a finished forward, or say why it cannot be read by patches."""
    why = next((record.why_unreadable for record in kept if record.why_unreadable), "")
    if why:
        raise UnsupportedModelError(why)
    lengths = sorted({record.attention.shape[2] for record in kept})
    if len(lengths) > 1:
        raise UnsupportedModelError(
            f"the watched blocks run on {', '.join(map(str, lengths))} tokens, and maps of one "
            "resolution do not fit another; keep blocks of one resolution with `blocks=`"
        )
    tokens, anatomy = lengths[0], forward.anatomy
    patches = len(anatomy.patches(tokens))
    grid = named or forward.grid
    if grid is None:
        raise UnsupportedModelError(NO_GRID)
    if patches != grid.size:
        raise CaptureError(
            f"{tokens} tokens less {len(anatomy.special_tokens)} special ones leave {patches}, but "
            f"the patch grid is {grid.rows}x{grid.cols}; correct `class_tokens=` or `grid=`"
        )
    return grid
