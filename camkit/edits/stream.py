"""How a block's host adds attention to its tokens, for edits that run a second stream of tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import local
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.hooks import Hooks
from camkit.capture.intercept import Intercept, taps_suspended
from camkit.capture.linears import LinearCalls
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
    """

    entered: Tensor | None = None
    context: ForwardPass | None = None
    seen: Attention | None = None
    call: ModuleCall = ((), {}, None)
    added: Tensor | None = None
    scaled_by: list[nn.Module] = field(default_factory=list)
    scale: Tensor | None = None
    is_sum: bool = False

    __repr__ = short_repr


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
        for module in self._beside if follow_sum else ():
            hooks.before(module, self._before_beside)
            hooks.after(module, self._after_beside)

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
        now.scaled_by, now.scale, now.is_sum = [], None, False

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
    ) -> None:
        """The first module that is given the sum proves that there is one."""
        del module, kwargs
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
                return

    def _after_beside(self, *call: Any) -> None:
        """Follow what attention returned through layer scale and dropout."""
        module, args, _, output = call
        now = self.now
        if now.added is not None and not now.is_sum and args and args[0] is now.added:
            now.scaled_by.append(module)
            now.added = output


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
