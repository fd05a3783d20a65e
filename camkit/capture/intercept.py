"""The torch-function modes that see, weigh or replace attention calls.

The module's own hooks enter and leave the mode, so nothing of the host is replaced or un-fused.
Three functions are known; everything else passes through untouched.

Where a score is read from the mean token, the gradient of a block's last layer is one row, repeated
for each token; torch multiplies it by the weights as often. Here rows are compared first, so the
result is the same whatever they are. No gradient of weights is taken.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from threading import local
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from camkit import torch_internals
from camkit.capture.attention import (
    Attention,
    ExplicitAttention,
    FusedAttention,
    bias_of,
    gated_bias,
    key_bias,
)
from camkit.capture.mha import multi_head_attention
from camkit.ops.reweight import compiled_for, reweighted_attention

_HERE = local()


@contextmanager
def aside() -> Iterator[None]:
    """What is computed here, in this thread, is not the host's: taps look away."""
    before = getattr(_HERE, "aside", False)
    _HERE.aside = True
    try:
        yield
    finally:
        _HERE.aside = before


class Tap(TorchFunctionMode):
    """Reports, and may tilt, the attention calls made while it is on.

    Args:
        on_fused: called with ``(output, attention)`` of each fused attention.
        on_explicit: called with ``(weights,)`` of each softmax that looks like attention.
        weigh: asked before each of them for log-weights on the keys, ``(b, s)`` or ``(b, a, s)``,
            which are added to the logits and left to the host's own kernel; None leaves the call
            alone.
        heads: of the module the tap is made for; hosts that fold heads into the batch, as
            ``(b * a, t, d)``, are told apart by it. What is reported always has four axes.
        normaliser: take the softmax normaliser from the host's own kernel where it can be had.

    The first two return the tensor the host goes on with, normally the one they were given.
    """

    def __init__(
        self,
        on_fused: Callable[..., Tensor],
        on_explicit: Callable[..., Tensor],
        weigh: Callable[[Attention], Tensor | None] | None = None,
        heads: int = 1,
        *,
        normaliser: bool = False,
    ) -> None:
        super().__init__()
        _keep_untraced()
        self._on_fused = on_fused
        self._on_explicit = on_explicit
        self._weigh = weigh
        self._heads = heads
        self._normaliser = normaliser

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # by name: research hosts carry private copies of these functions
        name = "" if getattr(_HERE, "aside", False) else getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._fused(func, *args, **kwargs)
        if name in torch_internals.KERNELS:
            return self._known(func, *args, **kwargs)
        if name == "reweighted_attention":
            return self._reweighted(func, *args, **kwargs)
        if name == "softmax":
            return self._explicit(func, *args, **kwargs)
        if name == "multi_head_attention_forward":
            with self:  # so that the calls inside are seen in their turn
                return multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _fused(  # noqa: PLR0913 - the signature is torch's
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
        options |= {"is_causal": is_causal, "enable_gqa": enable_gqa}
        if not self._folds(query):
            return func(query, key, value, attn_mask, **options)
        seen = self._call(query, key, value, attn_mask, options)
        tilt = self._ask(seen)
        normaliser = None
        if tilt is not None:
            keys = key_bias(tilt, query.dtype)
            seen = replace(seen, bias=keys if seen.bias is None else seen.bias + keys)
            given = (query, key, value)
            if attn_mask is None and _compiled(given, options):
                # no mask is made, and weights keep their digits
                output, normaliser, _ = reweighted_attention(*given, tilt, scale=seen.scale)
            else:
                output = self._tilted(func, seen, given, options)
        else:
            call, known = (query, key, value, attn_mask), None
            if self._normaliser:
                known = torch_internals.call_with_normaliser(*call, options)
            output, normaliser = known or (func(*call, **options), None)
        unfolded = self._unfold(output)
        seen = replace(seen, v=self._repeated(value, query, options), normaliser=normaliser)
        return _as(query, self._on_fused(unfolded, replace(seen, output=unfolded)))

    def _tilted(
        self,
        func: Callable[..., Tensor],
        seen: FusedAttention,
        given: tuple[Tensor, Tensor, Tensor],
        options: dict[str, Any],
    ) -> Tensor:
        """The call by the host's own kernel, with the bias that ``seen`` holds."""
        added = seen.bias
        if given[0].dim() == 3 and added is not None:
            added = added.expand(*seen.q.shape[:2], -1, -1).flatten(0, 1)
        return func(*given, added, **options | {"is_causal": False})

    def _reweighted(  # noqa: PLR0913 - the operator's own
        self,
        func: Callable[..., Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_weights: Tensor | None,
        scale: float,
        gated_rows: int,
        *rest: Any,
    ) -> Any:
        """A call of camkit's own operator, by another tap or by the host."""
        output, normaliser, rows = func(q, k, v, log_weights, scale, gated_rows, *rest)
        bias = gated_bias(log_weights, gated_rows, q)
        seen = FusedAttention(q, k, scale, bias, v, output, normaliser)
        return self._on_fused(output, seen), normaliser, rows

    def _known(
        self, func: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any
    ) -> Any:
        """The same call, made by a tap that wants the normaliser: that tap has four axes."""
        output, normaliser, *others = func(q, k, v, *rest, **named)
        mask, causal, scale = torch_internals.kernel_options(func.__name__, rest, named)
        options = {"is_causal": causal, "scale": scale, "enable_gqa": False}
        seen = self._call(q, k, v, mask, options)
        level = torch_internals.trim_normaliser(normaliser, q)
        seen = replace(seen, v=v, output=output, normaliser=level)
        return (self._on_fused(output, seen), normaliser, *others)

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> FusedAttention:
        """What is known of a call before it runs."""
        del value
        q = self._unfold(query)
        k = self._repeated(key, query, options)
        mask = self._unfold(mask) if query.dim() == 3 and mask is not None else mask
        scale = options["scale"]
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        return FusedAttention(q, k, factor, bias_of(mask, options["is_causal"], q, k))

    def _repeated(self, tensor: Tensor, query: Tensor, options: dict[str, Any]) -> Tensor:
        """Keys or values, one for each head of the queries."""
        tensor = self._unfold(tensor)
        if not options["enable_gqa"]:
            return tensor
        return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1)

    def _explicit(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        folded = logits.dim() == 3 and logits.shape[1] not in (1, logits.shape[2])
        if folded or not self._folds(logits) or dim not in (-1, logits.dim() - 1):
            return func(*args, **kwargs)
        tilt = None
        if self._weigh is not None:
            with aside():  # other taps should see the tilted call only
                untilted = func(*args, **kwargs)
            tilt = self._ask(ExplicitAttention(self._unfold(untilted)))
        if tilt is not None:
            tilted = _as(logits, self._unfold(logits) + key_bias(tilt, logits.dtype))
            args, kwargs = (tilted, *args[1:]), {k: v for k, v in kwargs.items() if k != "input"}
        weights = func(*args, **kwargs)
        return _as(weights, self._on_explicit(self._unfold(weights)))

    def _ask(self, attention: Attention) -> Tensor | None:
        if self._weigh is None:
            return None
        with aside():
            return self._weigh(attention)

    def _folds(self, tensor: Tensor) -> bool:
        """Whether a tensor has heads: as an axis of its own, or folded into the batch."""
        return tensor.dim() == 4 or (tensor.dim() == 3 and len(tensor) % self._heads == 0)

    def _unfold(self, tensor: Tensor) -> Tensor:
        """Batch and heads as two axes; a mask for all of them keeps its single one."""
        if tensor.dim() != 3:
            return tensor
        return tensor[None] if len(tensor) == 1 else tensor.unflatten(0, (-1, self._heads))


@cache
def _keep_untraced() -> None:
    """Let compiled code call a tap, instead of tracing it, which would tilt keys twice.

    Not at import: it loads the compiler, which takes a moment.
    """
    untraced = torch.compiler.disable(Tap.__torch_function__)
    Tap.__torch_function__ = untraced  # type: ignore[method-assign]


def _compiled(heads: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> bool:
    """Whether camkit's own kernel can take the place of the host's call."""
    bare = not (options["dropout_p"] or options["is_causal"] or options["enable_gqa"])
    query, key, _ = heads
    return bare and query.dim() == 4 and key.shape == query.shape and compiled_for(*heads)


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    """Heads folded into the batch where ``like`` has them there."""
    return tensor.flatten(0, 1) if like.dim() == 3 else tensor


def scaled_weights(place: float, leaves: list[Tensor], heads: int) -> Tap:
    """A tap under which attention uses its weights times ``place``; they become leaves."""

    def on_weights(weights: Tensor) -> Tensor:
        leaves.append((weights.detach() * place).requires_grad_())
        return leaves[-1]

    def on_fused(output: Tensor, attention: FusedAttention) -> Tensor:
        if attention.v is None:
            return output
        used = on_weights(attention.rows(range(attention.shape[2])))
        return (used @ attention.v.to(used.dtype)).to(output.dtype)

    return Tap(on_fused, on_weights, heads=heads)


class EvenRows(TorchFunctionMode):
    """While on, linear layers inside a graph are computed so."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        plain = len(args) in (2, 3) and not kwargs and isinstance(args[0], Tensor)
        if func is not F.linear or not plain or args[0].dim() != 3 or not args[0].requires_grad:
            return func(*args, **kwargs)
        bias = args[2] if len(args) == 3 else None
        return _Linear.apply(args[0], args[1].detach(), None if bias is None else bias.detach())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if _even(gradient):
            rows = (gradient[:, :1] @ weight).expand(-1, gradient.shape[1], -1)
            return rows.contiguous(), None, None  # torch's activations are slow on repeated rows
        return gradient @ weight, None, None


def _even(gradient: Tensor) -> bool:
    """Whether every token has the same row."""
    if gradient.stride(1) == 0 or gradient.shape[1] == 1:
        return True
    likely = torch.equal(gradient[:, :1], gradient[:, -1:])
    return likely and bool((gradient == gradient[:, :1]).all())
