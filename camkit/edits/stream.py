"""How a block's host adds attention to its tokens, for edits that run a second stream of tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident, local
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.class_query import close_outputs
from camkit.capture.hooks import Hooks
from camkit.capture.intercept import Intercept, taps_suspended
from camkit.capture.linears import LinearCalls
from camkit.capture.modes import measurement
from camkit.capture.session import ForwardPass
from camkit.capture.tail import tokens_of
from camkit.edits.protocol import Attended
from camkit.errors import UnsupportedModelError
from camkit.printing import short_repr
from camkit.torch_internals import modules_of

ModuleCall: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], LinearCalls | None]


@dataclass
class BlockCall:
    """What is known of the call of a block that is under way.

    Attributes:
        entered: the tokens the block was called with, as its host lays them out.
        context: the forward, once the block has attended.
        seen: the block's attention.
        call: arguments of the attention module, by position and by name, and the linear layers
            that ran in it.
        added: what it returned, after the modules that take it in turn.
        scaled_by: those modules, layer scale and dropout.
        scale: a parameter of the block that scales what is added.
        is_sum: whether the block goes on with the sum of its tokens and what is added.
        kept: the axis and the place of the only token that is read behind the sum, while the block
            runs; None if all may be read.
    """

    entered: Tensor | None = None
    context: ForwardPass | None = None
    seen: Attention | None = None
    call: ModuleCall = ((), {}, None)
    added: Tensor | None = None
    scaled_by: list[nn.Module] = field(default_factory=list)
    scale: Tensor | None = None
    is_sum: bool = False
    kept: tuple[int, int] | None = None

    __repr__ = short_repr


@dataclass
class _Route:
    """What an earlier call of a block showed.

    Attributes:
        modules: those that took what attention returned, and the one that was given the sum.
        given_sum: the latter.
        alone: whether a single token behind the sum is computed as among all others; None if that
            was not tried.
    """

    modules: tuple[nn.Module, ...]
    given_sum: nn.Module
    alone: bool | None = None

    __repr__ = short_repr


_ROUTES: "WeakKeyDictionary[nn.Module, _Route]" = WeakKeyDictionary()


class _Here(local):
    def __init__(self) -> None:
        self.now = BlockCall()


class BlockStream:
    """Follows the tokens of one block: in, past its attention, out.

    Args:
        attention: the attention module.
        block: the block it lies in.
    """

    def __init__(self, attention: nn.Module, block: nn.Module) -> None:
        inside = {*modules_of(attention), block}
        self._attention = attention
        self.block = block
        self._beside = [module for module in modules_of(block) if module not in inside]
        self._here = _Here()

    @property
    def now(self) -> BlockCall:
        """The call that is under way in this thread."""
        return self._here.now

    def start(self, hooks: Hooks, *, follow_sum: bool) -> None:
        """Put hooks on; ``follow_sum`` finds out how attention is added, for `attended`."""
        hooks.before(self.block, self._before)
        route = self._route()
        for module in () if not follow_sum else route.modules if route else self._beside:
            hooks.before(module, self._before_beside)
            hooks.after(module, self._after_beside)

    def _route(self) -> _Route | None:
        """Return what earlier calls showed, if the modules are still parts of the block."""
        route = _ROUTES.get(self.block)
        known = route is not None and set(route.modules) <= set(self._beside)
        return route if known else None

    def forget(self) -> None:
        """Drop the tensors of this call."""
        self._here.now = BlockCall()

    def follow(
        self,
        context: ForwardPass,
        seen: Attention,
        call: ModuleCall,
        output: Tensor,
    ) -> None:
        """The block has attended: with which arguments, and what its attention module returned."""
        now = self.now
        now.context, now.seen, now.call, now.added = context, seen, call, output
        now.scaled_by, now.scale, now.is_sum, now.kept = [], None, False, None

    def keep_only(self, axis: int, place: int) -> None:
        """Compute what follows the sum, in this call, for one token only, if that is exact.

        The sum of all tokens and what the block computes for one is right for that one alone. A
        trial (`try_alone`) must have shown that.
        """
        route = self._route()
        if route is not None and route.alone:
            self.now.kept = axis, place

    def try_alone(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, axis: int, place: int
    ) -> None:
        """Find out, once, whether a token behind the sum does not depend on the others.

        Args:
            args: positional arguments of the block.
            kwargs: its arguments by name.
            tokens: what it returned.
            axis: of the tokens.
            place: of the token.
        """
        route = self._route()
        if route is None or route.alone is not None:
            return
        only = {"axis": axis, "place": place, "count": tokens.shape[axis]}

        thread = get_ident()

        def narrow(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (_only(given[0], **only), *given[1:]) if get_ident() == thread else None

        handle = route.given_sum.register_forward_pre_hook(narrow)
        try:
            with measurement(tokens.device), torch.no_grad():
                again = tokens_of(self.block.forward(*args, **kwargs))
        except (RuntimeError, TypeError):  # of the host: it needs all tokens
            again = None
        finally:
            handle.remove()
        route.alone = (
            again is not None
            and again.shape == tokens.shape
            and close_outputs(_only(again, **only), _only(tokens, **only))
        )

    def attended(self, batch_first: Callable[[Tensor], Tensor]) -> Attended:
        """Describe how the block used its attention, once it has run.

        Args:
            batch_first: turns the host's tokens into ``(b, t, d)``.

        Raises:
            UnsupportedModelError: the attention hides its values, or is added in another way.
        """
        seen = self.now.seen
        if not isinstance(seen, FusedAttention) or seen.v is None:
            raise UnsupportedModelError(
                "the host writes its attention out as a softmax, so queries, keys and values are "
                "not seen; switch its fused kernel on (timm: attn.fused_attn = True, transformers: "
                'attn_implementation="sdpa")'
            )
        if not self.now.is_sum:
            _ROUTES.pop(self.block, None)
            raise UnsupportedModelError(
                f"{type(self.block).__name__} does not add its attention to its tokens and go on "
                "with the sum, so a second stream cannot follow it"
            )
        return Attended(seen, lambda values: batch_first(self._project(values)))

    def _project(self, values: Tensor) -> Tensor:
        args, kwargs, linears = self.now.call
        replaced = ReplacedAttention(values, linears or LinearCalls())
        with taps_suspended(), Intercept(replaced, with_values=True):
            output = self._attention.forward(*args, **kwargs)
        added: Tensor = output[0] if isinstance(output, tuple) else output
        for module in self.now.scaled_by:
            added = module.forward(added)
        return added if self.now.scale is None else added * self.now.scale

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        self.forget()
        self.now.entered = tokens_of((*args, *kwargs.values()))

    def _before_beside(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The first module that is given the sum proves that there is one."""
        self._find_sum(module, args)
        now = self.now
        if not now.is_sum or now.kept is None or now.entered is None or not args:
            return None
        axis, place = now.kept
        only = _only(args[0], axis=axis, place=place, count=now.entered.shape[axis])
        return (only, *args[1:]), kwargs

    def _find_sum(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        now = self.now
        if now.added is None or now.entered is None or now.is_sum or not args:
            return
        total = args[0]
        if not isinstance(total, Tensor) or total is now.added or total.shape != now.added.shape:
            return
        # BEiT and EVA hold their layer scale as a parameter of the block
        own = [p for p in self.block.parameters(recurse=False) if p.shape == total.shape[-1:]]
        for scale in (None, *own):
            added = now.added if scale is None else now.added * scale
            expected = (now.entered + added).to(total.dtype)  # of a host that casts by itself
            # the bits are nearly always the same, and seen to be so in a tenth of the time
            if torch.equal(total, expected) or torch.allclose(
                total, expected, rtol=1e-3, atol=1e-3
            ):
                now.scale, now.is_sum = scale, True
                self._remember(module)
                return

    def _remember(self, given_sum: nn.Module) -> None:
        modules = (*self.now.scaled_by, given_sum)
        route = self._route()
        if route is None or route.modules != modules:
            _ROUTES[self.block] = _Route(modules, given_sum)

    def _after_beside(self, *call: Any) -> None:
        """Follow what attention returned through layer scale and dropout."""
        module, args, _, output = call
        now = self.now
        if now.added is not None and not now.is_sum and args and args[0] is now.added:
            now.scaled_by.append(module)
            now.added = output


def _only(tokens: Any, *, axis: int, place: int, count: int) -> Any:
    """Return one of ``count`` tokens along an axis; anything else as it is."""
    suits = isinstance(tokens, Tensor) and tokens.dim() == 3 and tokens.shape[axis] == count
    return tokens.narrow(axis, place, 1) if suits else tokens


class ReplacedAttention:
    """Lets attention return given values, ``(b, a, t, e)``, whatever it is called with.

    Linear layers that were called with the same numbers before, those in front of the attention,
    return what they returned then.
    """

    replaces = True

    def __init__(self, values: Tensor, linears: LinearCalls) -> None:
        self._values = values
        self._linears = linears

    def fused(self, func: Callable[..., Any], query: Tensor, *_: Any, **__: Any) -> Tensor:
        del func
        values = self._values.to(query.dtype)
        return values.flatten(0, 1) if query.dim() == 3 else values

    def linear(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        known = self._linears.output(args, kwargs)
        return func(*args, **kwargs) if known is None else known
