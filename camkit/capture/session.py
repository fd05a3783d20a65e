"""The forwards of a host, observed from start to end.

A session puts hooks on a host, keeps the state of the forwards that run, and reports to one
subscriber: a forward begins, a pass of images through the blocks begins, attention is computed, a
block returns its tokens, a forward ends. `camkit.watch` stores the reported tensors,
`camkit.attach` edits them.

A forward may hold several passes: over the images, over crops of them, through a teacher. A pass
begins with the first attention behind a patch embedding, and its images are what the embedding was
given. Blocks that share one module run several times in one pass.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import get_ident, local
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from camkit.capture.anatomy import WINDOWS, Anatomy, image_batch
from camkit.capture.attention import Attention
from camkit.capture.hooks import Hooks
from camkit.capture.host import Host, head_count
from camkit.capture.intercept import Bias, Intercept, Tap
from camkit.capture.linears import LinearCalls, LinearTap
from camkit.capture.order import sequence_first
from camkit.capture.outside import OutsideAttention, close_windows
from camkit.capture.parameters import reshards
from camkit.capture.tail import tokens_of
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.printing import short_repr

Arguments: TypeAlias = tuple[Any, ...]
Named: TypeAlias = dict[str, Any]


C = TypeVar("C", bound="ForwardPass")


@dataclass(eq=False)
class Forward(Generic[C]):
    """One forward in one thread.

    Attributes:
        entrance: the module it began at; None if attention runs outside a known forward.
        args: positional arguments of the entrance, until the forward ends.
        kwargs: its arguments by name, until the forward ends.
        images: the images it was called with, until it ends; None if unknown.
        count: how many images; None if unknown.
        passes: through the blocks, in the order they began.
        running: whether the forward is under way.
        thread: that runs it.
    """

    entrance: nn.Module | None = None
    args: Arguments = ()
    kwargs: Named = field(default_factory=dict)
    images: Tensor | None = None
    count: int | None = None
    passes: list[C] = field(default_factory=list)
    running: bool = False
    thread: int = field(default_factory=get_ident)

    __repr__ = short_repr

    @property
    def ran(self) -> set[nn.Module]:
        """The attention modules that have run."""
        return {module for turn in self.passes for module in turn.ran}


@dataclass(eq=False)
class ForwardPass:
    """The state of one pass of images through the blocks.

    Attributes:
        anatomy: roles of its tokens.
        within: the forward that it belongs to.
        place: its place among the passes of the forward.
        pixels: what the patch embedding was given, until the forward ends; None if it is unknown.
        images: how many; None if unknown.
        size: rows and columns of pixels.
        grid: rows and columns of patches; None if no patch embedding showed them.
        ran: the attention modules that have run, in order.
        shape: of what the first of them was given.
    """

    anatomy: Anatomy
    within: "ReferenceType[Forward[Any]]"
    place: int = 0
    pixels: Tensor | None = None
    images: int | None = None
    size: Sequence[int] = ()
    grid: Grid | None = None
    ran: list[nn.Module] = field(default_factory=list)
    shape: tuple[int, ...] = ()

    __repr__ = short_repr

    @property
    def forward(self) -> "Forward[Any]":
        """The forward that it belongs to, as long as that is kept."""
        forward = self.within()
        if forward is None:
            raise CaptureError("the forward of this pass is over and was dropped")
        return forward


@dataclass(eq=False)
class AttentionCall(Generic[C]):
    """One call of an attention module; its tensors are dropped when the module returns.

    Attributes:
        context: the pass it belongs to.
        module: the module.
        name: of the module.
        heads: of the module.
        args: positional arguments of the module.
        kwargs: its arguments by name.
        outside: whether the host computes it from the module's weights without calling the module.
        maps: how many attention maps the subscriber has accepted so far.
        attention: the latest of them, if the subscriber keeps it here.
        linears: the linear layers that ran in it, if the subscriber ``keeps_linears``.
    """

    context: C
    module: nn.Module
    name: str
    heads: int
    args: Arguments = ()
    kwargs: Named = field(default_factory=dict)
    outside: bool = False
    maps: int = 0
    attention: Attention | None = None
    linears: LinearCalls | None = None

    __repr__ = short_repr

    @property
    def tokens(self) -> Tensor | None:
        """What the module was given: the first tensor among its arguments."""
        return _first_tensor(self.args, self.kwargs)

    def sequence_first(self, tokens: Tensor, attention: Attention) -> bool:
        """Whether tokens of this module come as ``(t, b, d)``."""
        images, _, length, _ = attention.shape
        default = self.context.anatomy.sequence_first
        return sequence_first(self.module, tokens, images, length, default)

    def why_unreadable(self, attention: Attention) -> str:
        """Return why a map of this call does not relate tokens one to one; empty if it does."""
        images, _, tokens, keys = attention.shape
        given = self.tokens
        if given is not None and given.dim() == 3:
            self.sequence_first(given, attention)  # remembered for batches that do not show it
        if self.maps:
            return (
                f"{self.name} makes several maps in a call and mixes them in its own way "
                "(differential attention, ConViT's gates, SCLIP's sum of two), so none of them is "
                "the one it uses; leave it out with `blocks=`"
            )
        if self.context.images is not None and images != self.context.images:
            return WINDOWS.format(windows=images, images=self.context.images)
        if tokens != keys:
            return (
                f"{tokens} queries attend to {keys} keys: spatially reduced attention (PVT, MiT) "
                "does not relate patches one to one"
            )
        lengths, width = self._lengths(images)
        if lengths and tokens not in lengths:
            return self._why_not_of(tokens, max(lengths))
        kind = type(self.module).__name__.lower()
        if ("xca" in kind or "channel" in kind) and tokens == width // self.heads:
            return (
                f"the sequence has {tokens} tokens and a head has {tokens} channels, so a map "
                "between tokens cannot be told from one between channels (XCiT); call the model "
                "with another image size"
            )
        return ""

    def _why_not_of(self, tokens: int, length: int) -> str:
        if self.outside:
            return (
                f"the host computes the attention of {self.name} outside the module, between "
                f"{tokens} positions where it has {length} tokens (as ProxyCLIP, from the features "
                "of another model); leave it out with `blocks=`"
            )
        return (
            f"an attention map of {tokens}x{tokens} belongs to no sequence of that length: "
            "attention between channels (XCiT) or inside windows (Swin) does not relate patches "
            "one to one"
        )

    def _lengths(self, images: int) -> tuple[list[int], int]:
        """Return the sequence lengths that the module's arguments may have, and their channels."""
        lengths: list[int] = []
        width = 0
        for value in (*self.args, *self.kwargs.values()):
            if not isinstance(value, Tensor) or value.dim() < 2:
                continue
            if value.dim() == 4:  # tokens on their grid, channels last or first
                lengths += [value.shape[1] * value.shape[2], value.shape[2] * value.shape[3]]
                continue
            width = width or value.shape[-1]
            if value.dim() == 2:
                lengths.append(value.shape[0])
                continue
            first, second = value.shape[:2]
            lengths += [second] if first == images else []
            lengths += [first] if second == images else []
            lengths += [first, second] if images not in (first, second) else []
        return lengths, width


class Subscriber(Generic[C]):
    """Receives the events of a session, and may change the forwards; by default nothing happens.

    Events:
        start: the session has put its hooks on; more may be added.
        forward_begins: a model is called; an error raised here ends the forward.
        pass_begins: images are about to go through the blocks.
        attention_begins: an attention module is called; may return other arguments for it.
        added_to_logits: attention is about to be computed; may return what to add to its logits,
            log-weights of the keys or a bias of pairs.
        attention: attention was computed; returns its output (fused) or weights (softmax).
        attention_ends: an attention module returned; may return another output.
        block_leaves: a block returned tokens, after its attention call; may return other tokens.
        forward_ends: a forward ended, with None if it raised; may return another output.
        forward_interrupted: the session stops before a forward has ended.

    Attributes:
        outermost: tap attention outside all other hooks, so that it is seen as they leave it.
        own_context: report only forwards that are run in the context (`contextvars`) in which the
            session was started: not those of other threads or tasks.
        pass_type: holds the state of one pass.
        attention_modules: modules whose attention is reported, by name.
        blocks: blocks whose tokens are reported, by the name of their attention.
        edits_logits: call `added_to_logits`.
        reads_values: have `nn.MultiheadAttention` attend a second time, through
            scaled_dot_product_attention, which shows queries, keys and values.
        normaliser: take the normaliser of the softmax from the kernel where it returns it.
        keeps_linears: keep what linear layers return in an attention module (`AttentionCall`).
        enabled: whether forwards are reported.
    """

    outermost: ClassVar[bool] = False
    own_context: bool = False
    pass_type: type[C]
    attention_modules: Mapping[str, nn.Module]
    blocks: Mapping[str, nn.Module]
    edits_logits: bool = False
    reads_values: bool = False
    normaliser: bool = True
    keeps_linears: bool = False
    enabled: bool = True

    def start(self, hooks: Hooks) -> None: ...

    def forward_begins(self, forward: Forward[C]) -> None: ...

    def pass_begins(self, context: C) -> None: ...

    def context_outside(self, module: nn.Module, tokens: Tensor | None) -> C | None:
        """Return the pass of attention that runs outside any forward; None ignores it."""
        del module, tokens
        return None

    def attention_begins(self, call: AttentionCall[C]) -> tuple[Arguments, Named] | None: ...

    def added_to_logits(self, call: AttentionCall[C], attention: Attention) -> Bias | None: ...

    def attention(self, call: AttentionCall[C], output: Tensor, attention: Attention) -> Tensor:
        raise NotImplementedError

    def attention_ends(self, call: AttentionCall[C], output: Any) -> Any: ...

    def block_leaves(
        self, name: str, call: AttentionCall[C], args: Arguments, kwargs: Named, tokens: Tensor
    ) -> Tensor | None: ...

    def forward_ends(self, forward: Forward[C], output: Any) -> Any: ...

    def forward_interrupted(self, forward: Forward[C]) -> None: ...


@dataclass(eq=False)
class _Embedded:
    """One call of a patch embedding, for the pass that it begins."""

    module: nn.Module
    pixels: Tensor | None
    grid: Grid | None = None

    __repr__ = short_repr


class _Here(local, Generic[C]):
    """The forwards and attention calls of one thread."""

    def __init__(self) -> None:
        self.forwards: list[Forward[C]] = []
        self.calls: list[tuple[AttentionCall[C], Intercept]] = []
        self.latest: AttentionCall[C] | None = None
        self.embedded: list[_Embedded] = []
        self.lead: nn.Module | None = None


_STARTED: ContextVar[frozenset[int]] = ContextVar("camkit_sessions", default=frozenset())
_NUMBERS = count()


class ForwardSession(Generic[C]):
    """Hooks on a host that report its forwards to a subscriber.

    Args:
        host: the model.
        subscriber: receives the events of every forward until the session stops.
    """

    def __init__(self, host: Host, subscriber: Subscriber[C]) -> None:
        self._host = host
        self._subscriber = subscriber
        self._hooks = Hooks()
        self._here: _Here[C] = _Here()
        self._thread: int | None = None
        self._number = next(_NUMBERS)
        attention = subscriber.attention_modules
        self._modules = {m: (name, head_count(m)) for name, m in attention.items()}
        self._outside: OutsideAttention | None = None

    def start(self) -> None:
        """Register the hooks."""
        hooks, outermost = self._hooks, self._subscriber.outermost
        if self._subscriber.own_context:
            _STARTED.set(_STARTED.get() | {self._number})
        for entrance in self._host.entrances:
            hooks.before(entrance, self._enter)
            hooks.after(entrance, self._leave, outermost=reshards(entrance))
        for module in self._modules:
            hooks.before(module, self._before_attention, outermost=outermost)
            hooks.after(module, self._after_attention, outermost=outermost)
        for embedding in self._host.embeddings:
            hooks.before(embedding, self._before_embedding)
            hooks.after(embedding, self._after_embedding)
        if not self._host.embeddings:
            for module in self._host.tail:
                hooks.before(module, self._before_lead)
        for name, block in self._subscriber.blocks.items():
            hooks.after(block, partial(self._after_block, name), outermost=reshards(block))
        self._outside = OutsideAttention(
            self._host,
            self._subscriber.attention_modules,
            self._begin_outside,
            self._end_outside,
            follows=self._follows_outside,
            seen=self._seen_outside,
        )
        self._outside.start(hooks)
        self._subscriber.start(hooks)

    def stop(self) -> None:
        """Remove the hooks, and exit every mode that an interrupted forward left on."""
        self._hooks.remove()
        _STARTED.set(_STARTED.get() - {self._number})
        close_windows()
        self._outside = None
        self._close_taps()
        here = self._here
        here.latest, self._thread, here.embedded = None, None, []
        while here.forwards:
            self._subscriber.forward_interrupted(here.forwards.pop())

    def _reports(self) -> bool:
        subscriber = self._subscriber
        own = not subscriber.own_context or self._number in _STARTED.get()
        return subscriber.enabled and own

    def _enter(self, module: nn.Module, args: Arguments, kwargs: Named) -> None:
        here = self._here
        inner = bool(here.forwards) and here.forwards[-1].entrance is not module
        if inner or not self._reports():
            return
        images = image_batch(args, kwargs)
        if images is None:  # an outer module that is called with something else
            return
        own = self._subscriber.own_context
        if own and self._thread not in (None, get_ident()):
            raise CaptureError(
                "two threads that share one context (`contextvars`) call a watched model at once, "
                "and their forwards would be mixed; open a watch in each of them"
            )
        close_windows()
        self._close_taps()
        self._host.check_in_place()
        self._host.check_kernels()
        self._host.anatomy(module, args, kwargs)  # measured before the forward has begun
        forward: Forward[C] = Forward(module, args, kwargs, images, len(images))
        here.embedded, here.lead = [], None
        self._subscriber.forward_begins(forward)
        forward.running, self._thread = True, get_ident()
        here.forwards.append(forward)

    def _leave(self, module: nn.Module, *call: Any) -> Any:
        here = self._here
        if not here.forwards or here.forwards[-1].entrance is not module:
            return None
        close_windows()
        forward = here.forwards.pop()
        forward.running, here.latest, here.embedded = False, None, []
        if not here.forwards:
            self._thread = None
        if call[-1] is not None and self._outside is not None:
            self._outside.forward_ended(forward.ran)
        try:
            return self._subscriber.forward_ends(forward, call[-1])
        finally:
            forward.args, forward.kwargs, forward.images = (), {}, None
            for turn in forward.passes:
                turn.pixels = None

    def _pass_of(self, module: nn.Module) -> C:
        """Return the pass that an attention module runs in; a patch embedding begins another."""
        here = self._here
        forward, embedded = here.forwards[-1], here.embedded
        if forward.passes and not embedded:
            return forward.passes[-1]
        here.embedded = []
        anatomy = self._anatomy(forward, module)
        context = self._subscriber.pass_type(anatomy, ref(forward), place=len(forward.passes))
        known = [e.pixels for e in embedded if e.pixels is not None]
        if not embedded:
            context.pixels = forward.images
        elif known and len(known) == len(embedded):
            context.grid = embedded[-1].grid
            # an embedding that is called with several batches before the blocks: they are joined
            again = [e.module for e in embedded].count(embedded[-1].module) > 1
            alike = all(pixels.shape[1:] == known[-1].shape[1:] for pixels in known)
            context.pixels = torch.cat(known) if again and alike else known[-1]
        if context.pixels is not None:
            context.images, context.size = len(context.pixels), context.pixels.shape[-2:]
        forward.passes.append(context)
        self._subscriber.pass_begins(context)
        return context

    def _anatomy(self, forward: Forward[C], module: nn.Module) -> Anatomy:
        """Return the roles of the tokens of a pass that begins at ``module``."""
        if forward.entrance is None:
            return Anatomy(class_tokens=self._host.class_tokens or ())
        call = (forward.entrance, forward.args, forward.kwargs)
        first = self._host.anatomy(*call)
        begun = [turn.ran[0] for turn in forward.passes if turn.ran]
        if not begun or any(type(module) is type(other) for other in begun):
            return first  # a teacher has the roles of its student
        name = self._modules[module][0]
        if forward.entrance.training:  # what runs before it may update a teacher or a queue
            raise CaptureError(
                f"a further pass of the forward begins at {name}, in another kind of tower, and "
                "the roles of its tokens are measured in evaluation mode only; call the model once "
                "in evaluation mode first, or name `class_tokens=` and `other_tokens=`"
            )
        return self._host.anatomy(*call, at=name)

    def _before_attention(
        self, module: nn.Module, args: Arguments, kwargs: Named
    ) -> tuple[Arguments, Named] | None:
        subscriber, here = self._subscriber, self._here
        if not self._reports():
            return None
        close_windows()
        name, heads = self._modules[module]
        if here.forwards:
            context: C | None = self._pass_of(module)
        else:
            context = subscriber.context_outside(module, _first_tensor(args, kwargs))
        if context is None:
            return None
        return self._begin(AttentionCall(context, module, name, heads, args, kwargs))

    def _begin(self, call: AttentionCall[C]) -> tuple[Arguments, Named] | None:
        """Start to tap the attention of a call."""
        subscriber, context, tokens = self._subscriber, call.context, call.tokens
        context.ran.append(call.module)
        if not context.shape and tokens is not None:
            context.shape = tuple(tokens.shape)
        changed = subscriber.attention_begins(call)
        report = partial(subscriber.attention, call)
        added = partial(subscriber.added_to_logits, call) if subscriber.edits_logits else None
        settings: dict[str, Any] = {"heads": call.heads, "normaliser": subscriber.normaliser}
        if subscriber.keeps_linears:
            call.linears = LinearCalls()
            handler: Tap = LinearTap(report, added, linears=call.linears, **settings)
        else:
            handler = Tap(report, added, **settings)
        tap = Intercept(handler, call.module, with_values=subscriber.reads_values)
        self._here.calls.append((call, tap))
        tap.__enter__()
        return changed

    def _after_attention(self, module: nn.Module, *rest: Any) -> Any:
        calls = self._here.calls
        if not calls or calls[-1][0].module is not module:
            return None
        call, tap = calls.pop()
        tap.__exit__(None, None, None)
        self._here.latest = call
        output = rest[-1]
        try:
            # None: the forward raised
            return None if output is None else self._subscriber.attention_ends(call, output)
        finally:
            call.args, call.kwargs, call.attention, call.linears = (), {}, None, None

    def _follows_outside(self) -> bool:
        return self._reports() and bool(self._here.forwards) and not self._here.calls

    def _seen_outside(self) -> bool:
        calls = self._here.calls
        return bool(calls) and calls[-1][0].maps > 0

    def _begin_outside(self, module: nn.Module, tokens: Tensor) -> bool:
        """Tap attention that is computed with the weights of a module that is not called."""
        if self._here.calls:
            return False
        name, heads = self._modules[module]
        context = self._pass_of(module)
        self._begin(AttentionCall(context, module, name, heads, (tokens,), outside=True))
        return True

    def _end_outside(self, module: nn.Module, output: Tensor | None) -> Any:
        return self._after_attention(module, output)

    def _close_taps(self) -> None:
        """Exit the modes of interrupted calls, whose hooks never ran."""
        calls = self._here.calls
        while calls:
            calls.pop()[1].__exit__(None, None, None)

    def _before_embedding(self, module: nn.Module, args: Arguments, kwargs: Named) -> None:
        here = self._here
        if here.forwards:
            close_windows()
            pixels = image_batch(args, kwargs)
            if pixels is not None and pixels.dim() == 4:
                here.embedded.append(_Embedded(module, pixels))

    def _after_embedding(self, module: nn.Module, *call: Any) -> None:
        embedded, patches = self._here.embedded, call[-1]
        if embedded and embedded[-1].module is module and isinstance(patches, Tensor):
            embedded[-1].grid = Grid(*patches.shape[-2:])

    def _before_lead(self, module: nn.Module, args: Arguments, kwargs: Named) -> None:
        """Begin a pass where a host without a known embedding calls its first module once more."""
        here = self._here
        if not here.forwards:
            return
        if not here.forwards[-1].passes:
            here.lead = here.lead or module
        elif module is here.lead:
            pixels = image_batch(args, kwargs)
            here.embedded.append(_Embedded(module, pixels))

    def _after_block(self, name: str, *rest: Any) -> Any:
        _, args, kwargs, output = rest
        latest, tokens = self._here.latest, tokens_of(output)
        if latest is None or tokens is None:
            return None
        changed = self._subscriber.block_leaves(name, latest, args, kwargs, tokens)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _first_tensor(args: Arguments, kwargs: Named) -> Tensor | None:
    values = (*args, *kwargs.values())
    return next((value for value in values if isinstance(value, Tensor)), None)
