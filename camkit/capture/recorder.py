"""What a watch stores of a forward, and the subscriber that stores it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy, with_images
from camkit.capture.attention import Attention, ClassRows, ExplicitAttention, FusedAttention
from camkit.capture.class_query import ClassPath, ClassQuery
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host
from camkit.capture.intercept import EvenRows, Intercept
from camkit.capture.modes import Graph
from camkit.capture.order import sequence_first
from camkit.capture.passes import is_further_block, same_pictures, small_pictures, tails_of_passes
from camkit.capture.record import (
    NoisyForward,
    PoolingCall,
    SmoothGrad,
    TokenCall,
    WatchSpec,
)
from camkit.capture.scores import ACTIVATIONS, checked_scores, find_scores, known_classes
from camkit.capture.session import (
    Arguments,
    AttentionCall,
    Forward,
    ForwardPass,
    Named,
    Subscriber,
)
from camkit.capture.tail import TailCall, is_classifier, tokens_of
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.printing import short_repr


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """One attention call of a forward.

    Attributes:
        index: its place among all calls.
        name: the module that made it.
        attention: the call.
        why_unreadable: why it cannot be read by patches; empty if it can.
        outside: whether the host computed it outside its module.
        called: the attention of the module itself, if the host called it right afterwards, too.
    """

    index: int
    name: str
    attention: Attention
    why_unreadable: str
    outside: bool = False
    called: Attention | None = None


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
    images_given: Tensor | None = None
    class_query_only: bool = False
    activation: str = ""
    why_no_scores: str = ""

    __repr__ = short_repr

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

    def find_scores(self, output: Any, stated: int | None) -> None:
        """Find the class scores in an output, see `camkit.capture.scores.find_scores`."""
        found = find_scores(
            output, self.tail, self.anatomy.class_tokens, images=self.images, stated=stated
        )
        self.outputs = found.scores
        self.activation, self.why_no_scores = found.activation, found.why_not

    def settle_called(self, observed: Mapping[nn.Module, bool]) -> None:
        """Choose between attention computed outside a module and that of a call right after it.

        If the host goes on with what the block returned, the call is used (ClearCLIP calls its last
        block in vain).
        """
        record = self.kept[-1] if self.kept else None
        if record is None or record.called is None:
            return
        returned = [call.output for call in self.tail if observed[call.module]]
        received = [c.input for c in self.tail if not observed[c.module] and c.input.dim() == 3]
        if not returned or not received:
            why = (
                f"the host computes the attention of {record.name} outside the module and calls "
                "the module as well, and it is not known which it uses; leave it out with `blocks=`"
            )
            self.kept[-1] = replace(record, why_unreadable=why)
        elif any(torch.equal(left, received[0]) for left in returned):
            self.kept[-1] = replace(record, attention=record.called, outside=False)

    def made_scores(self) -> bool:
        """Whether a classifier behind this pass returned exactly its scores."""
        if self.outputs is None:
            return False
        scores = self.outputs.detach()
        flat = [call.output.flatten(1) for call in self.tail if is_classifier(call.module)]
        return any(o.shape == scores.shape and torch.equal(o, scores) for o in flat)


def _keep_own_scores(passes: Sequence[Recording]) -> None:
    """Drop the scores of all passes but those that made them, or the only one of their size."""
    known = [turn for turn in passes if turn.made_scores()]
    if not known:
        sized = [t for t in passes if t.outputs is not None and len(t.outputs) == t.images]
        known = sized if len(sized) == 1 else []
    for turn in passes:
        if turn not in known:
            turn.outputs, turn.why_no_scores = None, _SCORES_OF_ANOTHER


_SCORES_OF_ANOTHER = (
    "the forward ran several passes through the blocks, and its class scores are not known to come "
    "from this one; watch the part of the model that runs once"
)

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

        around = dict(host.around)
        self.attention_modules = host.attention
        self._observed = dict.fromkeys(host.tail, False) | dict.fromkeys(around.values(), True)
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
        before, self.forward, self._class_query_only = self.forward, forward, False
        if before is not None and before.running:  # an interrupt left it
            self._graph.forget()
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
        if self._spec.pixels and context.forward.images is not None:
            context.images_given = context.forward.images.detach()

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
        latest = forward.passes[-1] if forward.passes else None
        if latest is None or tokens is None or forward.thread != get_ident():
            return None
        further = is_further_block(self.attention_modules, latest, module, tokens)
        return latest if further else None

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
        self._store(call, attention)
        return output

    def _store(self, call: AttentionCall[Recording], attention: Attention) -> None:
        """Keep an attention call, as far as it may be selected."""
        context = call.context
        context.tail.clear()
        index, why = context.count, call.why_unreadable(attention)
        call.maps += 1
        latest = context.kept[-1] if context.kept else None
        if latest is not None and latest.outside and latest.name == call.name and not call.outside:
            context.kept[-1] = replace(latest, called=attention)
            return
        context.count += 1
        context.kept.append(AttentionRecord(index, call.name, attention, why, call.outside))
        if self._selected is not None:  # drop records that can no longer be selected
            reach = index + min(0, *self._selected)
            kept = [r for r in context.kept if r.index in self._selected or r.index > reach]
            context.kept = kept

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
        node = None
        if self._builds_graph:
            scores = left if is_classifier(module) else given
            node = scores if is_classifier(module) or isinstance(module, ACTIVATIONS) else None
        turn.tail.append(TailCall(module, given.detach(), left.detach(), node))

    def forward_ends(self, forward: Forward[Recording], output: Any) -> Any:
        passes = forward.passes
        try:
            if output is not None and passes:
                if len(passes) > 1:
                    self._separate(forward)
                for turn in passes:
                    turn.settle_called(self._observed)
                with torch.set_grad_enabled(self._builds_graph):
                    self._store_scores(forward, output)
        finally:
            left = self._graph.leave(output)
            if self._query is not None:
                self._query.disarm()
        if output is None:  # the forward raised
            return None
        _COUNTS[self._host.model] = [turn.count for turn in passes]
        if len(passes) == 1:
            self._settle_grid(forward, passes[0])
        if self._spec.noise is not None and not self._sampling:
            self._run_noisy(forward, self._spec.noise)
        return left

    def _settle_grid(self, forward: Forward[Recording], turn: Recording) -> None:
        """Measure the grid, unless a patch embedding showed it."""
        if forward.entrance is None or self._host.grid is not None or not turn.kept:
            return
        record, shown = turn.kept[-1], turn.grid
        patches = len(turn.anatomy.patches(record.attention.shape[2]))
        if record.why_unreadable or (shown is not None and shown.size == patches):
            return
        call = forward.entrance, forward.args, forward.kwargs
        grid = self._host.measured_grid(*call, turn.anatomy)
        if grid is not None and grid.size == patches:
            turn.grid = grid

    def _separate(self, forward: Forward[Recording]) -> None:
        """Give each pass the calls behind its blocks, as far as they can be told apart."""
        for turn in forward.passes:
            turn.of_several, turn.images_given = True, None
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
        for turn in passes:
            if self._scores is not None:
                turn.outputs = checked_scores(self._scores(output))
            else:
                turn.find_scores(output, known_classes(self._host.model, self._host.widths))
            if turn.outputs is not None and not self._builds_graph:
                turn.outputs = turn.outputs.detach()
        if len(passes) > 1:
            _keep_own_scores(passes)

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
                args = [with_images(value, pixels, noisy) for value in clean.args]
                kwargs = {n: with_images(v, pixels, noisy) for n, v in clean.kwargs.items()}
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
