"""One forward of a host, observed from its start to its end.

A session puts hooks on a host, keeps the state of the forwards that run, and reports four kinds of
events to one subscriber: a forward begins, attention is computed, a block returns its tokens, a
forward ends. `camkit.watch` stores the reported tensors, `camkit.attach` edits them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident, local
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from camkit.capture.anatomy import WINDOWS, Anatomy, image_batch
from camkit.capture.attention import Attention
from camkit.capture.host import Host, head_count
from camkit.capture.intercept import Intercept, Tap
from camkit.capture.modes import THREAD
from camkit.capture.tail import tokens_of
from camkit.errors import CaptureError
from camkit.grid import Grid

Arguments: TypeAlias = tuple[Any, ...]
Named: TypeAlias = dict[str, Any]


class Hook:
    """A hook that stays with its module: copies and pickles of the module hold an empty one.

    Otherwise a deep copy of a watched model (an EMA teacher, say) would write into the original's
    record, and a watched model could not be saved.
    """

    def __init__(
        self, function: Callable[..., Any] | None, *, while_measuring: bool = False
    ) -> None:
        def run(*args: Any) -> Any:
            if THREAD.measuring and not while_measuring:
                return None
            return None if function is None else function(*args)

        # compiled code calls it instead of tracing it
        self.function = None if function is None else torch.compiler.disable(run)

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(None)

    def __reduce__(self) -> tuple[type["Hook"], tuple[None]]:
        return Hook, (None,)


class Hooks:
    """A set of hooks, removed together; removing them twice is harmless.

    ``outermost`` puts a hook around all others; else newer hooks run inside older ones. Forwards
    that camkit itself runs inside `measurement` call only hooks with ``while_measuring``.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def before(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        outermost: bool = False,
        while_measuring: bool = False,
    ) -> None:
        """Call ``function(module, args, kwargs)`` before each forward of ``module``."""
        hook = Hook(function, while_measuring=while_measuring)
        self._handles.append(
            module.register_forward_pre_hook(hook, with_kwargs=True, prepend=outermost)
        )

    def after(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        *,
        outermost: bool = False,
        while_measuring: bool = False,
    ) -> None:
        """Call ``function(module, args, kwargs, output)`` after each forward.

        It is called after a forward that raised, too; then the output is None.
        """
        hook = Hook(function, while_measuring=while_measuring)
        self._handles.append(
            module.register_forward_hook(
                hook, with_kwargs=True, always_call=True, prepend=not outermost
            )
        )

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()


@dataclass(eq=False)
class ForwardContext:
    """The state of one forward in one thread.

    Attributes:
        anatomy: roles of its tokens.
        entrance: the module it began at; None if attention runs outside a known forward.
        args: positional arguments of the entrance, until the forward ends.
        kwargs: its arguments by name, until the forward ends.
        images: how many; None if unknown.
        size: rows and columns of pixels.
        grid: rows and columns of patches, once a patch embedding has run.
        ran: the attention modules that have run, in order.
        running: whether the forward is under way.
        thread: that runs it.
    """

    anatomy: Anatomy
    entrance: nn.Module | None = None
    args: Arguments = ()
    kwargs: Named = field(default_factory=dict)
    images: int | None = None
    size: Sequence[int] = ()
    grid: Grid | None = None
    ran: list[nn.Module] = field(default_factory=list)
    running: bool = False
    thread: int = field(default_factory=get_ident)


C = TypeVar("C", bound=ForwardContext)


@dataclass(eq=False)
class AttentionCall(Generic[C]):
    """One call of an attention module; its tensors are dropped when the module returns.

    Attributes:
        context: the forward it belongs to.
        module: the module.
        name: of the module.
        heads: of the module.
        order_known: whether the order of batch and sequence is measured.
        args: positional arguments of the module.
        kwargs: its arguments by name.
        maps: how many attention maps the subscriber has accepted so far.
        attention: the latest of them, if the subscriber keeps it here.
    """

    context: C
    module: nn.Module
    name: str
    heads: int
    order_known: bool
    args: Arguments = ()
    kwargs: Named = field(default_factory=dict)
    maps: int = 0
    attention: Attention | None = None

    def why_unreadable(self, attention: Attention) -> str:
        """Return why a map of this call does not relate tokens one to one; empty if it does."""
        images, _, tokens, keys = attention.shape
        if self.maps:
            return (
                "one attention module makes several maps in a call and mixes them in its own way "
                "(differential attention, ConViT's gates), so none of them is the one it uses"
            )
        if self.context.images is not None and images != self.context.images:
            return WINDOWS.format(windows=images, images=self.context.images)
        if tokens != keys:
            return (
                f"{tokens} queries attend to {keys} keys: spatially reduced attention (PVT, MiT) "
                "does not relate patches one to one"
            )
        lengths, width = self._lengths()
        if lengths and tokens not in lengths:
            return (
                f"an attention map of {tokens}x{keys} belongs to no sequence of that length: "
                "attention between channels (XCiT) or inside windows (Swin) does not relate "
                "patches one to one"
            )
        kind = type(self.module).__name__.lower()
        if ("xca" in kind or "channel" in kind) and tokens == width // self.heads:
            return (
                f"the sequence has {tokens} tokens and a head has {tokens} channels, so a map "
                "between tokens cannot be told from one between channels (XCiT); call the model "
                "with another image size"
            )
        return ""

    def _lengths(self) -> tuple[list[int], int]:
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
            first = value.dim() == 2 or self.context.anatomy.sequence_first
            lengths += [value.shape[0 if first else 1]] if self.order_known else value.shape[:2]
        return lengths, width


class Subscriber(Generic[C]):
    """Receives the events of a session, and may change the forwards; by default nothing happens.

    Events:
        start: the session has put its hooks on; more may be added.
        forward_begins: a model is called; an error raised here ends the forward.
        attention_begins: an attention module is called; may return other arguments for it.
        key_log_weights: attention is about to be computed; may return log-weights on its keys.
        attention: attention was computed; returns its output (fused) or weights (softmax).
        attention_ends: an attention module returned; may return another output.
        block_leaves: a block returned tokens, after its attention call; may return other tokens.
        forward_ends: a forward ended, with None if it raised; may return another output.
        forward_interrupted: the session stops before a forward has ended.

    Attributes:
        outermost: tap attention outside all other hooks, so that it is seen as they leave it.
        one_thread: refuse forwards in two threads at once.
        context_type: holds the state of one forward.
        attention_modules: modules whose attention is reported, by name.
        blocks: blocks whose tokens are reported, by the name of their attention.
        weighs_keys: call `key_log_weights`.
        normaliser: take the normaliser of the softmax from the kernel where it returns it.
        enabled: whether forwards are reported.
    """

    outermost: ClassVar[bool] = False
    one_thread: ClassVar[bool] = False
    context_type: type[C]
    attention_modules: Mapping[str, nn.Module]
    blocks: Mapping[str, nn.Module]
    weighs_keys: bool = False
    normaliser: bool = True
    enabled: bool = True

    def start(self, hooks: Hooks) -> None: ...

    def forward_begins(self, context: C) -> None: ...

    def context_outside(self) -> C | None:
        """Return the context of attention that runs outside any forward; None ignores it."""
        return None

    def attention_begins(self, call: AttentionCall[C]) -> tuple[Arguments, Named] | None: ...

    def key_log_weights(self, call: AttentionCall[C], attention: Attention) -> Tensor | None: ...

    def attention(self, call: AttentionCall[C], output: Tensor, attention: Attention) -> Tensor:
        raise NotImplementedError

    def attention_ends(self, call: AttentionCall[C], output: Any) -> Any: ...

    def block_leaves(
        self, name: str, call: AttentionCall[C], args: Arguments, kwargs: Named, tokens: Tensor
    ) -> Tensor | None: ...

    def forward_ends(self, context: C, output: Any) -> Any: ...

    def forward_interrupted(self, context: C) -> None: ...


class _Here(local, Generic[C]):
    """The forwards and attention calls of one thread."""

    def __init__(self) -> None:
        self.contexts: list[C] = []
        self.calls: list[tuple[AttentionCall[C], Intercept]] = []
        self.latest: AttentionCall[C] | None = None


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
        attention = subscriber.attention_modules
        self._modules = {m: (name, head_count(m)) for name, m in attention.items()}

    def start(self) -> None:
        """Register the hooks."""
        hooks, outermost = self._hooks, self._subscriber.outermost
        for entrance in self._host.entrances:
            hooks.before(entrance, self._enter)
            hooks.after(entrance, self._leave)
        for module in self._modules:
            hooks.before(module, self._before_attention, outermost=outermost)
            hooks.after(module, self._after_attention, outermost=outermost)
        for embedding in self._host.embeddings:
            hooks.after(embedding, self._after_embedding)
        for name, block in self._subscriber.blocks.items():
            hooks.after(block, partial(self._after_block, name))
        self._subscriber.start(hooks)

    def stop(self) -> None:
        """Remove the hooks, and exit every mode that an interrupted forward left on."""
        self._hooks.remove()
        self._close_taps()
        here = self._here
        here.latest, self._thread = None, None
        while here.contexts:
            self._subscriber.forward_interrupted(here.contexts.pop())

    def _enter(self, module: nn.Module, args: Arguments, kwargs: Named) -> None:
        contexts = self._here.contexts
        inner = bool(contexts) and contexts[-1].entrance is not module
        if not self._subscriber.enabled or inner:
            return
        images = image_batch(args, kwargs)
        if images is None:  # an outer module that is called with something else
            return
        if self._subscriber.one_thread and self._thread not in (None, get_ident()):
            raise CaptureError(
                "two threads call a watched model at once, and their forwards would be mixed; let "
                "one wait for the other, or give each a copy of the model"
            )
        self._close_taps()
        self._host.check_in_place()
        context = self._subscriber.context_type(
            self._host.anatomy(module, args, kwargs),
            entrance=module,
            args=args,
            kwargs=kwargs,
            images=len(images),
            size=images.shape[-2:],
        )
        self._subscriber.forward_begins(context)
        context.running, self._thread = True, get_ident()
        contexts.append(context)

    def _leave(self, module: nn.Module, *call: Any) -> Any:
        here = self._here
        if not here.contexts or here.contexts[-1].entrance is not module:
            return None
        context = here.contexts.pop()
        context.running, here.latest = False, None
        if not here.contexts:
            self._thread = None
        try:
            return self._subscriber.forward_ends(context, call[-1])
        finally:
            context.args, context.kwargs = (), {}

    def _before_attention(
        self, module: nn.Module, args: Arguments, kwargs: Named
    ) -> tuple[Arguments, Named] | None:
        subscriber, contexts = self._subscriber, self._here.contexts
        if not subscriber.enabled:
            return None
        context = contexts[-1] if contexts else subscriber.context_outside()
        if context is None:
            return None
        name, heads = self._modules[module]
        order_known = self._host.class_tokens is None
        call = AttentionCall(context, module, name, heads, order_known, args, kwargs)
        context.ran.append(module)
        changed = subscriber.attention_begins(call)
        report = partial(subscriber.attention, call)
        weigh = partial(subscriber.key_log_weights, call) if subscriber.weighs_keys else None
        tap = Intercept(Tap(report, weigh, heads=heads, normaliser=subscriber.normaliser), module)
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
            call.args, call.kwargs, call.attention = (), {}, None

    def _close_taps(self) -> None:
        """Exit the modes of interrupted calls, whose hooks never ran."""
        calls = self._here.calls
        while calls:
            calls.pop()[1].__exit__(None, None, None)

    def _after_embedding(self, *call: Any) -> None:
        contexts, patches = self._here.contexts, call[-1]
        if contexts and isinstance(patches, Tensor):
            contexts[-1].grid = Grid(*patches.shape[-2:])

    def _after_block(self, name: str, *rest: Any) -> Any:
        _, args, kwargs, output = rest
        latest, tokens = self._here.latest, tokens_of(output)
        if latest is None or tokens is None:
            return None
        changed = self._subscriber.block_leaves(name, latest, args, kwargs, tokens)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed
