"""Edits that run a second stream of tokens beside the host's, which stays as it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import local
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.hooks import Hooks
from camkit.capture.intercept import Intercept, taps_suspended
from camkit.capture.tail import tokens_of
from camkit.edits.protocol import BlockContext, Edit
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.tensors import Tokens


@dataclass(frozen=True, eq=False)
class Attended:
    """One block's attention, and the way its host adds it to the tokens.

    Attributes:
        attention: with its queries, keys and values.
        project: what the block would add if the attention had returned other values, one vector for
            each head and token: the host's own projection and layer scale.
    """

    attention: FusedAttention
    project: Callable[[Tensor], Tensor]


@runtime_checkable
class StreamEdit(Edit, Protocol):
    """An edit that carries tokens of its own through the chosen blocks as well.

    Its call may change the host's stream, or hand its ``output`` back as it is.
    """

    def step(self, side: Tokens, attended: Attended) -> Tokens:
        """The second stream behind a block, given it before; it begins as the host's tokens."""

    def merge(self, tokens: Tokens, side: Tokens, site: BlockContext) -> Tokens:
        """What leaves the last chosen block, given the host's tokens and the second stream."""


@dataclass
class _Pass(local):
    """A block's call that is under way, in this thread."""

    entered: Tensor | None = None
    call: tuple[Any, ...] = ()
    seen: Attention | None = None
    added: Tensor | None = None
    behind: list[nn.Module] = field(default_factory=list)
    scale: Tensor | None = None
    fits: bool = False


class BlockStream:
    """Follows the tokens through one block: in, past its attention, out."""

    def __init__(self, attention: nn.Module, block: nn.Module) -> None:
        self._block = block
        inside = set(attention.modules())
        self._beside = [m for m in block.modules() if m not in inside and m is not block]
        self._pass = _Pass()

    def listen(
        self, hooks: Hooks, on_leave: Callable[[Tensor], Tensor | None] | None = None
    ) -> None:
        """Put hooks on; ``on_leave`` is called with what leaves the block, and may change it."""
        hooks.before(self._block, self._before)
        if on_leave is None:
            return
        self._on_leave = on_leave
        for module in self._beside:
            hooks.before(module, self._before_beside)
            hooks.after(module, self._after_beside)
        hooks.after(self._block, self._after)

    @property
    def entered(self) -> Tensor | None:
        """The tokens that the block was given, as its host lays them out."""
        return self._pass.entered

    @property
    def seen(self) -> Attention:
        """The block's attention."""
        seen = self._pass.seen
        if seen is None:
            raise CaptureError("the block has not attended yet")
        return seen

    def attended(self, call: tuple[Any, ...], seen: Attention) -> None:
        """Told of the block's attention: module, arguments, output, and what was seen inside."""
        now = self._pass
        output = call[-1]
        now.call, now.seen, now.behind, now.scale, now.fits = call, seen, [], None, False
        now.added = output[0] if isinstance(output, tuple) else output

    def attention(self, turn: Callable[[Tensor], Tensor]) -> Attended:
        """What is known once the block has run; ``turn`` makes tokens batch first.

        Raises:
            UnsupportedModelError: the attention hides its values, or is added in a way of its own.
        """
        now = self._pass
        if not isinstance(now.seen, FusedAttention) or now.seen.v is None:
            raise UnsupportedModelError(
                "the host writes its attention out as a softmax, so queries, keys and values are "
                "not seen; switch its fused kernel on (timm: attn.fused_attn = True, transformers: "
                'attn_implementation="sdpa")'
            )
        if not now.fits:
            raise UnsupportedModelError(
                f"{type(self._block).__name__} does not add its attention to its tokens and go on "
                "with their sum, so a second stream cannot do as it does"
            )
        return Attended(now.seen, lambda values: turn(self._project(values)))

    def forget(self) -> None:
        """Let go of the tensors of this call."""
        now = self._pass
        now.entered, now.call, now.seen, now.added = None, (), None, None

    def _project(self, values: Tensor) -> Tensor:
        module, args, kwargs, _ = self._pass.call
        with taps_suspended(), Intercept(ReplacedAttention(values)):
            output = module.forward(*args, **kwargs)
        added: Tensor = output[0] if isinstance(output, tuple) else output
        for scale in self._pass.behind:
            added = scale.forward(added)
        return added if self._pass.scale is None else added * self._pass.scale

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        self.forget()
        self._pass.entered = tokens_of((*args, *kwargs.values()))

    def _before_beside(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The first module that is given the sum proves that there is one."""
        del module, kwargs
        now = self._pass
        if now.added is None or now.entered is None or now.fits or not args:
            return
        total = args[0]
        if not isinstance(total, Tensor) or total.shape != now.added.shape:
            return
        # BEiT and EVA hold their layer scale as a parameter of the block
        own = [p for p in self._block.parameters(recurse=False) if p.shape == total.shape[-1:]]
        for scale in (None, *own):
            added = now.added if scale is None else now.added * scale
            found = (now.entered + added).to(total.dtype)  # of a host that casts by itself
            if torch.allclose(total, found, rtol=1e-3, atol=1e-3):
                now.scale, now.fits = scale, True
                return

    def _after_beside(self, *call: Any) -> None:
        """Layer scale and dropout, which take what attention returned, are walked through."""
        module, args, _, output = call
        now = self._pass
        if now.added is not None and not now.fits and args and args[0] is now.added:
            now.behind.append(module)
            now.added = output

    def _after(self, *call: Any) -> Any:
        output = call[-1]
        left = tokens_of(output)
        if left is None or self._pass.seen is None:
            self.forget()
            return None
        try:
            changed = self._on_leave(left)
        finally:
            self.forget()
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class ReplacedAttention:
    """Attention returns given values, ``(b, a, t, e)``, whatever it is called with."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def fused(self, func: Callable[..., Any], query: Tensor, *_: Any, **__: Any) -> Tensor:
        values = self._values.to(query.dtype)
        return values.flatten(0, 1) if query.dim() == 3 else values
