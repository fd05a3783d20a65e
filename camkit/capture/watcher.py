"""watch(model): see the attention of the next forward without touching the model."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, grid_of_aspect
from camkit.capture.attention import Attention, ClassRows, ExplicitAttention, FusedAttention
from camkit.capture.class_query import ClassPath, ClassQuery
from camkit.capture.host import Host, block_modules, how_to_reveal, tail_modules
from camkit.capture.intercept import EvenRows, Intercept
from camkit.capture.modes import Graph
from camkit.capture.order import sequence_first
from camkit.capture.passes import same_pictures, small_pictures, tails_of_passes
from camkit.capture.record import (
    Capture,
    NoisyForward,
    PoolingCall,
    SmoothGrad,
    TokenCall,
    WatchSpec,
    scores_of,
)
from camkit.capture.session import (
    Arguments,
    AttentionCall,
    Forward,
    ForwardPass,
    ForwardSession,
    Hooks,
    Named,
    Subscriber,
)
from camkit.capture.tail import TailCall, is_classifier, tokens_of
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
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
    other_tokens: Sequence[int] | None = None,
    grid: Grid | tuple[int, int] | None = None,
) -> "Watch":
    """See the attention of the forwards inside a ``with`` block.

    The host keeps its fused kernels, modes, flags and weights, and its hooks are removed at the end
    of the block. A compiled model runs uncompiled inside it. Forwards in other threads and asyncio
    tasks are neither seen nor changed; let the first watch of a model be over before they start,
    because it measures the roles of the tokens with changed copies of parameters.

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
        class_tokens: positions of the class tokens, in the order of the classes if there are
            several; needed if camkit does not find them by their names, or if other learnt tokens
            (CTI's background) are among them.
        other_tokens: positions of further tokens that are no patches.
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
    host = Host.of(
        model, modules=modules, class_tokens=class_tokens, other_tokens=other_tokens, grid=grid
    )
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
    """A model being watched; ``capture`` is its latest forward, ``passes`` the parts of it."""

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
            CaptureError: no forward ran, its tokens do not fit its grid, or it ran several passes:
                then choose one of ``passes``.
            UnsupportedModelError: its attention does not relate patches one to one.
        """
        passes = self._recorded()
        if len(passes) > 1:
            listed = "; ".join(f"passes[{i}]: {p.described()}" for i, p in enumerate(passes))
            raise CaptureError(
                f"the forward ran {len(passes)} passes through the blocks, and their maps do not "
                f"belong together; choose one of `seen.passes` ({listed})"
            )
        return self._captured(passes[0])

    @property
    def passes(self) -> tuple[Capture, ...]:
        """One capture for each pass of the latest forward, in the order they began.

        Crops, flips, a teacher and chunks of a batch are passes of their own. Scores are known for
        the pass whose classifier made them.

        Raises:
            CaptureError: no forward ran, or the tokens of a pass do not fit its grid.
            UnsupportedModelError: the attention of a pass does not relate patches one to one.
        """
        return tuple(map(self._captured, self._recorded()))

    def _recorded(self) -> "list[Recording]":
        forward = None if self._recorder is None else self._recorder.forward
        passes = [] if forward is None else [turn for turn in forward.passes if turn.count]
        if not passes:
            raise CaptureError(self._why_nothing(forward))
        return passes

    def _captured(self, turn: "Recording") -> Capture:
        kept, count = list(turn.kept), turn.count
        if self._selected is not None:
            outside = [b for b in self._selected if not -count <= b < count]
            if outside:
                raise CaptureError(f"{count} attention blocks ran, but `blocks` asks for {outside}")
            selected = {b % count for b in self._selected}
            kept = [record for record in kept if record.index in selected]
        rgb = self._rgb
        if rgb is not None and turn.of_several and not turn.shows(rgb):
            rgb = None
        return Capture(
            blocks=tuple(record.attention for record in kept),
            names=tuple(record.name for record in kept),
            anatomy=turn.anatomy,
            grid=_checked_grid(turn, self._host.grid, kept),
            outputs=turn.outputs,
            tail=turn.known_tail(),
            pooling=tuple(turn.pooling),
            entering=tuple(turn.entering),
            leaving=tuple(turn.leaving),
            class_paths=tuple(turn.class_paths),
            samples=tuple(turn.samples),
            class_query_only=turn.class_query_only,
            rgb=rgb,
            vocabulary=self._vocabulary,
        )

    def _why_nothing(self, forward: "Forward[Recording] | None") -> str:
        if forward is None or (forward.entrance is None and not forward.ran):
            return (
                "nothing captured yet; call the model inside the `with` block, in the thread or "
                "task that opened it. If you did, it was called past its own forward: watch the "
                "module that is called with the images, or name `class_tokens=` and `grid=`"
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
class Recording(ForwardPass):
    """What a watch stores of one pass; most of it is an attribute of `Capture`.

    Attributes:
        kept: the latest attention calls, as far as they may be selected.
        count: how many attention calls there were, without pooling queries.
        of_several: whether the forward ran other passes, too.
        pooled: the pixels of the pass in small, if the forward ran several.
    """

    kept: list[AttentionRecord] = field(default_factory=list)
    count: int = 0
    of_several: bool = False
    pooled: Tensor | None = None
    pooling: list[PoolingCall] = field(default_factory=list)
    tail: list[TailCall] = field(default_factory=list)
    outputs: Tensor | None = None
    entering: list[TokenCall] = field(default_factory=list)
    leaving: list[TokenCall] = field(default_factory=list)
    class_paths: list[TokenCall] = field(default_factory=list)
    samples: list[NoisyForward] = field(default_factory=list)
    class_query_only: bool = False

    def described(self) -> str:
        """Say which images the pass was over, and through which modules."""
        count = self.kept[-1].attention.shape[0] if self.kept else self.images
        size = " of " + "x".join(map(str, self.size)) if len(self.size) else ""
        return f"{count} images{size} through {self.kept[-1].name if self.kept else 'no block'}"

    def shows(self, rgb: Tensor) -> bool:
        """Whether the pass ran on the whole of these pictures."""
        return self.pooled is not None and same_pictures(self.pooled, rgb)

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

    def class_scores(self, output: Any) -> Tensor | None:
        """Return the class scores in an output: a classifier made them, or class tokens own them.

        Embeddings have the same shape, and the gradient of their third number means nothing.
        """
        scores = scores_of(output)
        if scores is None or 1 < len(self.anatomy.class_tokens) == scores.shape[-1]:
            return scores
        for call in self.tail:
            if is_classifier(call.module) and call.output.flatten(1).shape == scores.shape:
                return scores
        return None

    def made(self, scores: Tensor) -> bool:
        """Whether a classifier behind this pass returned exactly these scores."""
        calls = [call for call in self.tail if is_classifier(call.module)]
        flat = [call.output.flatten(1) for call in calls]
        return any(o.shape == scores.shape and torch.equal(o, scores.detach()) for o in flat)


_COUNTS: "WeakKeyDictionary[nn.Module, list[int]]" = WeakKeyDictionary()  # calls of each pass


class Recorder(Subscriber[Recording]):
    """Stores what a watch is to keep of each forward; ``forward`` is the latest."""

    outermost = True  # attention is seen as edits leave it
    own_context = True
    pass_type = Recording

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
        self.forward: Forward[Recording] | None = None
        self._graph = Graph()
        self._class_query_only = False
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

    def forward_begins(self, forward: Forward[Recording]) -> None:
        self.forward, self._class_query_only = forward, False
        self._graph = Graph()
        if self._query is not None and forward.entrance is not None:
            anatomy = self._host.anatomy(forward.entrance, forward.args, forward.kwargs)
            self._class_query_only = self._query.arm(
                forward.entrance, forward.args, forward.kwargs, anatomy
            )
        if self._builds_graph:
            self._graph.enter()

    def pass_begins(self, context: Recording) -> None:
        context.class_query_only = self._class_query_only

    def context_outside(self, module: nn.Module, tokens: Tensor | None) -> Recording | None:
        """Return the pass that attention outside a known forward belongs to.

        A block that a host runs by itself behind the forward of its tower (CLIP-ES) goes on with
        the latest pass. A host that no forward is known of is recorded if the user named its tokens
        and grid.
        """
        named, forward = self._host.class_tokens, self.forward
        if forward is not None and forward.entrance is not None:
            return self._going_on(forward, module, tokens)
        if named is None or self._host.grid is None:
            return None
        if forward is None:
            forward = self.forward = Forward()
            anatomy = Anatomy().with_roles(named, self._host.other_tokens)
            forward.passes.append(Recording(anatomy, ref(forward)))
        return forward.passes[-1]

    def _going_on(
        self, forward: Forward[Recording], module: nn.Module, tokens: Tensor | None
    ) -> Recording | None:
        places = {m: place for place, m in enumerate(self.attention_modules.values())}
        latest = forward.passes[-1] if forward.passes else None
        if latest is None or tokens is None or forward.thread != get_ident():
            return None
        behind = all(places[module] > places[other] for other in latest.ran)
        alike = sorted(tokens.shape) == sorted(latest.shape)
        return latest if behind and alike else None

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
        node = self._graph.begin(tokens) if gradients else tokens.detach()
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
        self._order_entering(call, attention)
        if self._with_gradients:
            if pools or self._may_be_selected(context):
                output = self._graph.begin(output)
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

    def _order_entering(self, call: AttentionCall[Recording], attention: Attention) -> None:
        """Say which order the recorded tokens of a call have, once its map shows it."""
        entering = call.context.entering
        if entering and entering[-1].name == call.name and call.maps == 0:
            turned = call.sequence_first(entering[-1].node, attention)
            entering[-1] = replace(entering[-1], sequence_first=turned)

    def _may_be_selected(self, context: Recording) -> bool:
        index, counts = context.count, _COUNTS.get(self._host.model, [])
        if self._selected is None or index in self._selected:
            return True
        if context.place >= len(counts):
            return min(self._selected) < 0
        return index - counts[context.place] in self._selected

    def _store_pooling(self, call: AttentionCall[Recording], attention: Attention) -> None:
        context, keys = call.context, attention.shape[3]
        same = next((p for p in context.pooling if p.attention.shape[3] == keys), None)
        anatomy = context.anatomy if same is None else same.anatomy
        joined_late = bool(context.kept) and context.kept[-1].attention.shape[2] != keys
        forward = context.forward
        if same is None and joined_late and forward.entrance is not None:
            entrance, args, kwargs = forward.entrance, forward.args, forward.kwargs
            anatomy = self._host.anatomy(entrance, args, kwargs, at=call.name)
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
        record = context.kept[-1]
        images, _, length, _ = record.attention.shape
        default = context.anatomy.sequence_first
        turned = sequence_first(self.blocks[name], tokens, images, length, default)
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
        cut = self._cuts_graph and not last and self._graph.pause()
        return tokens.detach() if cut else None

    def _after_observed(self, module: nn.Module, args: Arguments, _: Named, output: Any) -> None:
        forward, is_block = self.forward, self._observed[module]
        if forward is None or not forward.passes or not args or output is None:
            return
        turn = forward.passes[-1]
        if turn.count == 0 or forward.thread != get_ident():
            return
        # a head may be called behind the forward of its backbone, but blocks are then replayed
        if is_block and not forward.running:
            return
        given, left = (tokens_of(args), tokens_of(output)) if is_block else (args[0], output)
        if not isinstance(given, Tensor) or not isinstance(left, Tensor):
            return
        if is_block and turn.kept:
            images, _heads, length, _keys = turn.kept[-1].attention.shape
            if sequence_first(module, left, images, length, turn.anatomy.sequence_first):
                given, left = given.transpose(0, 1), left.transpose(0, 1)
        turn.tail.append(TailCall(module, given.detach(), left.detach()))

    def forward_ends(self, forward: Forward[Recording], output: Any) -> Any:
        passes = forward.passes
        try:
            if output is not None and passes:
                if len(passes) > 1:
                    self._separate(forward)
                with torch.set_grad_enabled(self._builds_graph):
                    self._store_scores(forward, output)
        finally:
            began = self._graph.leave()
            if self._query is not None:
                self._query.disarm()
        if output is None:  # the forward raised
            return None
        _COUNTS[self._host.model] = [turn.count for turn in passes]
        if self._spec.noise is not None and not self._sampling:
            self._run_noisy(forward, self._spec.noise)
        # a caller without gradients gets a tensor without; the graph is camkit's
        return output.detach() if began and isinstance(output, Tensor) else None

    def _separate(self, forward: Forward[Recording]) -> None:
        """Give each pass the calls behind its blocks, as far as they can be told apart."""
        for turn in forward.passes:
            turn.of_several = True
            turn.pooled = None if turn.pixels is None else small_pictures(turn.pixels)
        behind = [turn.tail for turn in forward.passes]
        tails = tails_of_passes(forward.passes, behind, self._observed)
        for turn, tail in zip(forward.passes, tails, strict=True):
            turn.tail = tail

    def _store_scores(self, forward: Forward[Recording], output: Any) -> None:
        """Store the class scores in an output with the pass that they belong to."""
        passes = forward.passes
        if self._scores is None and forward.entrance is not self._host.core:
            return  # of a wrapper around the model
        given = None if self._scores is None else self._scores(output)
        found: list[tuple[Recording, Tensor]] = []
        for turn in passes:
            scores = turn.class_scores(output) if given is None else given
            if scores is not None:
                found.append((turn, scores))
        if len(passes) > 1:
            proven = [(turn, scores) for turn, scores in found if turn.made(scores)]
            sized = [(turn, scores) for turn, scores in found if turn.images == len(scores)]
            found = proven or (sized if len(sized) == 1 else [])
        for turn, scores in found:
            turn.outputs = scores if self._builds_graph else scores.detach()

    def _run_noisy(self, clean: Forward[Recording], noise: SmoothGrad) -> None:
        """Run the same images under noise, and keep what seeds read of each forward."""
        pixels = clean.images
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
                    for turn, again in zip(clean.passes, self.forward.passes, strict=True):
                        turn.samples.append(NoisyForward(tuple(again.entering), again.outputs))
        finally:
            self._sampling = False
            self.forward = clean

    def forward_interrupted(self, forward: Forward[Recording]) -> None:
        del forward
        self._end_even_rows()
        if self._query is not None:
            self._query.disarm()
        self._graph.abandon(self._grad_mode_outside)


def _checked_grid(turn: Recording, named: Grid | None, kept: Sequence[AttentionRecord]) -> Grid:
    """Return the patch grid of a finished pass, or say why it cannot be read by patches."""
    why = next((record.why_unreadable for record in kept if record.why_unreadable), "")
    if why:
        raise UnsupportedModelError(why)
    lengths = sorted({record.attention.shape[2] for record in kept})
    if len(lengths) > 1:
        raise UnsupportedModelError(
            f"the watched blocks run on {', '.join(map(str, lengths))} tokens, and maps of one "
            "resolution do not fit another; keep blocks of one resolution with `blocks=`"
        )
    tokens, anatomy = lengths[0], turn.anatomy
    patches = len(anatomy.patches(tokens))
    grid = named or turn.grid or grid_of_aspect(turn.size, patches)
    if patches != grid.size:
        raise CaptureError(
            f"{tokens} tokens less {len(anatomy.special_tokens)} special ones leave {patches}, but "
            f"the patch grid is {grid.rows}x{grid.cols}; correct "
            "`class_tokens=`, `other_tokens=` or `grid=`"
        )
    return grid
