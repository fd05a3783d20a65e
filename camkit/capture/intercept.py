"""The torch-function mode that reports, reweights or replaces the attention calls of a host.

The mode is entered before a module runs and exited after it, so nothing of the host is replaced.
Attention calls are recognised by the identity of the function. A host's private copy of such a
function runs as its author wrote it, unless it is proven to return the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from inspect import signature
from threading import local
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

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
from camkit.capture.modes import measurement
from camkit.errors import UnsupportedModelError
from camkit.ops.reweight import compiled_for, reweighted_attention
from camkit.torch_internals import tree_leaves

_HERE = local()


@contextmanager
def taps_suspended(*, all_handlers: bool = False) -> Iterator[None]:
    """Disable all taps in this thread, so that camkit's own calls are not taken for the host's.

    Args:
        all_handlers: disable handlers that replace attention, too.
    """
    before = getattr(_HERE, "suspended", None)
    _HERE.suspended = object if all_handlers else before or Tap
    try:
        yield
    finally:
        _HERE.suspended = before


class Intercept(TorchFunctionMode):
    """Passes each call that a handler has a method for to the handler; others run untouched.

    Args:
        handler: may have the methods ``fused`` (scaled_dot_product_attention), ``softmax``,
            ``kernel`` (a fused kernel by name), ``reweighted`` (camkit's own operator) and
            ``linear``, each called with the function and its arguments. With ``fused``, the
            attention inside multi_head_attention_forward is passed to it, too.
    """

    def __init__(self, handler: Any) -> None:
        super().__init__()
        _exclude_from_compilation()
        self._handler = handler

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        suspended = getattr(_HERE, "suspended", None)
        if suspended is not None and isinstance(self._handler, suspended):
            return func(*args, **kwargs)
        kind = _known_functions().get(id(func))
        if kind is None and type(func) is FunctionType and func.__name__ in _REFERENCES:
            kind = _proven_kind(func, args, kwargs)
        if kind is None:
            return func(*args, **kwargs)
        if kind in _WRITTEN_OUT and hasattr(self._handler, "fused"):
            with self:  # the original is one opaque call; this one shows the attention inside
                return _WRITTEN_OUT[kind](*args, **kwargs)
        handle = getattr(self._handler, kind, func)
        return func(*args, **kwargs) if handle is func else handle(func, *args, **kwargs)


@cache
def _exclude_from_compilation() -> None:
    """Let compiled code call the mode instead of tracing it, which would edit keys twice.

    Not at import: it loads the compiler, which takes a moment.
    """
    untraced = torch.compiler.disable(Intercept.__torch_function__)
    Intercept.__torch_function__ = untraced  # type: ignore[method-assign]


@cache
def _known_functions() -> dict[int, str]:
    """Name the method of a handler for each function of torch and camkit, by identity."""
    aten = torch.ops.aten
    functions: dict[str, list[Any]] = {
        "fused": [F.scaled_dot_product_attention, aten.scaled_dot_product_attention],
        "softmax": [torch.softmax, F.softmax, Tensor.softmax, aten.softmax],
        "multi_head": [F.multi_head_attention_forward],
        "linear": [F.linear],
        "kernel": [getattr(aten, name, None) for name in torch_internals.KERNELS],
        "reweighted": [
            torch.ops.camkit.reweighted_attention,
            torch.ops.camkit_plain.reweighted_attention,
        ],
    }
    return {id(f): kind for kind, group in functions.items() for f in group if f is not None}


def _explicit_multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Run multi_head_attention without its fused kernel, as copies that write the softmax out."""
    given = signature(multi_head_attention).bind(*args, **kwargs).arguments
    given |= given.pop("unknown", {}) | {"need_weights": True}
    return multi_head_attention(**given)[0], None


_WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "multi_head": multi_head_attention,
    "explicit_multi_head": _explicit_multi_head,
}
_REFERENCES: dict[str, dict[str, Callable[..., Any]]] = {
    "multi_head_attention_forward": _WRITTEN_OUT,
    "scaled_dot_product_attention": {"fused": F.scaled_dot_product_attention},
    "softmax": {"softmax": torch.softmax},
}
_PROVEN: "WeakKeyDictionary[FunctionType, dict[tuple[Any, ...], str | None]]" = WeakKeyDictionary()


def _proven_kind(func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Name the function of torch that returns the same bits as a private function of a host.

    It is compared once for each form of its arguments (types, devices, options).
    """
    values = [*args, *(kwargs[name] for name in sorted(kwargs))]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        return None
    device = tensors[0].device
    form = (
        torch.is_autocast_enabled(device.type),
        *sorted(kwargs),
        *((v.dtype, v.device, v.dim()) if isinstance(v, Tensor) else str(v) for v in values),
    )
    proven = _PROVEN.setdefault(func, {})
    if form in proven:
        return proven[form]
    proven[form] = None
    with taps_suspended(all_handlers=True):
        with measurement(device):
            expected = tree_leaves(func(*args, **kwargs))
        for kind, reference in _REFERENCES[func.__name__].items():
            try:
                with measurement(device):
                    outputs = tree_leaves(reference(*args, **kwargs))
            except (RuntimeError, TypeError, ValueError, UnsupportedModelError):
                continue  # the private function takes other arguments
            if len(outputs) == len(expected) and all(map(_same_bits, outputs, expected)):
                proven[form] = kind
                break
    return proven[form]


def _same_bits(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return mine is None and theirs is None


class Tap:
    """Reports attention calls, and may add log-weights to their keys.

    Args:
        on_attention: called with ``(output, attention)`` of each fused attention, and with
            ``(weights, attention)`` of each softmax that looks like attention; returns the tensor
            the host goes on with, normally the one it was given.
        key_log_weights: called before each of them, returns log-weights on the keys, ``(b, s)`` or
            ``(b, a, s)``, which are added to the logits of the host's own kernel; None leaves the
            call as it is.
        heads: of the module; tells batch and heads apart in hosts that fold heads into the batch,
            as ``(b * a, t, d)``. What is reported always has four axes.
        normaliser: take the softmax normaliser from the host's own kernel where it returns it.
    """

    def __init__(
        self,
        on_attention: Callable[[Tensor, Attention], Tensor],
        key_log_weights: Callable[[Attention], Tensor | None] | None = None,
        *,
        heads: int = 1,
        normaliser: bool = False,
    ) -> None:
        self._on_attention = on_attention
        self._key_log_weights = key_log_weights
        self._heads = heads
        self._normaliser = normaliser

    def fused(  # noqa: PLR0913 - the signature is torch's
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
        call = (query, key, value, attn_mask)
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
        options |= {"is_causal": is_causal, "enable_gqa": enable_gqa}
        if not self._has_heads(query):
            return func(*call, **options)
        q, k, v = self._unfolded(query), self._unfolded(key), self._unfolded(value)
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        attention = _described(q, k, self._unfolded(attn_mask, query), options)
        log_weights = None if self._key_log_weights is None else self._log_weights(attention)
        normaliser = None
        if log_weights is not None:
            keys = key_bias(log_weights, query.dtype)
            bias = keys if attention.bias is None else attention.bias + keys
            attention = replace(attention, bias=bias)
            if attn_mask is None and _compiled(query, key, value, options):
                # no mask is made, and weights keep their digits
                output, normaliser, _ = reweighted_attention(
                    query, key, value, log_weights, scale=attention.scale
                )
            else:
                if query.dim() == 3:
                    bias = bias.expand(*q.shape[:2], -1, -1).flatten(0, 1)
                output = func(query, key, value, bias, **options | {"is_causal": False})
        else:
            known = (
                torch_internals.call_with_normaliser(*call, options) if self._normaliser else None
            )
            output, normaliser = known or (func(*call, **options), None)
        unfolded = self._unfolded(output)
        attention = replace(attention, v=v, output=unfolded, normaliser=normaliser)
        output = self._on_attention(unfolded, attention)
        return output.flatten(0, 1) if query.dim() == 3 else output

    def kernel(
        self, func: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any
    ) -> Any:
        """Report a kernel that another tap called by name; such calls have four axes."""
        output, normaliser, *others = func(q, k, v, *rest, **named)
        mask, causal, scale = torch_internals.kernel_options(func.__name__, rest, named)
        attention = _described(q, k, mask, {"is_causal": causal, "scale": scale})
        known = torch_internals.trim_normaliser(normaliser, q)
        attention = replace(attention, v=v, output=output, normaliser=known)
        return (self._on_attention(output, attention), normaliser, *others)

    def reweighted(  # noqa: PLR0913 - the operator's own
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
        """Report a call of camkit's own operator, by another tap or by the host."""
        output, normaliser, rows = func(q, k, v, log_weights, scale, gated_rows, *rest)
        bias = gated_bias(log_weights, gated_rows, q)
        attention = FusedAttention(q, k, scale, bias, v, output, normaliser)
        return self._on_attention(output, attention), normaliser, rows

    def softmax(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        no_map = logits.dim() == 3 and logits.shape[1] not in (1, logits.shape[2])
        if no_map or not self._has_heads(logits) or dim not in (-1, logits.dim() - 1):
            return func(*args, **kwargs)
        log_weights = None
        if self._key_log_weights is not None:
            with taps_suspended():  # other taps should see the final call only
                plain = func(*args, **kwargs)
            log_weights = self._log_weights(ExplicitAttention(self._unfolded(plain)))
        if log_weights is not None:
            biased = self._unfolded(logits) + key_bias(log_weights, logits.dtype)
            args = (biased.flatten(0, 1) if logits.dim() == 3 else biased, *args[1:])
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        weights = func(*args, **kwargs)
        unfolded = self._unfolded(weights)
        used = self._on_attention(unfolded, ExplicitAttention(unfolded))
        return used.flatten(0, 1) if weights.dim() == 3 else used

    def _log_weights(self, attention: Attention) -> Tensor | None:
        if self._key_log_weights is None:
            return None
        with taps_suspended():
            return self._key_log_weights(attention)

    def _has_heads(self, tensor: Tensor) -> bool:
        """Whether heads are an axis of their own, or folded into the batch."""
        return tensor.dim() == 4 or (tensor.dim() == 3 and len(tensor) % self._heads == 0)

    def _unfolded(self, tensor: Any, like: Tensor | None = None) -> Any:
        """Return batch and heads as two axes; a mask for all of them keeps its single axis."""
        if tensor is None or tensor.dim() != 3 or (like is not None and like.dim() != 3):
            return tensor
        return tensor[None] if len(tensor) == 1 else tensor.unflatten(0, (-1, self._heads))


def _described(
    q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> FusedAttention:
    """Describe a fused call before it runs."""
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    masked = mask is not None or options["is_causal"]
    bias = bias_of(mask, options["is_causal"], q, k) if masked else None
    return FusedAttention(q, k, scale, bias)


def _compiled(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether camkit's own kernel can take the place of the host's call."""
    bare = not (options["dropout_p"] or options["is_causal"] or options["enable_gqa"])
    four_axes = query.dim() == 4 and key.shape == query.shape
    return bare and four_axes and compiled_for(query, key, value)


def scaled_weights(factor: float, leaves: list[Tensor], heads: int) -> Intercept:
    """Return a mode under which attention uses its weights times ``factor``.

    Args:
        factor: of the weights.
        leaves: list that the scaled weights of each call are appended to, as leaves of the graph.
        heads: of the attention module.
    """

    def on_attention(output: Tensor, attention: Attention) -> Tensor:
        if isinstance(attention, FusedAttention):
            if attention.v is None:
                return output
            weights = attention.rows(range(attention.shape[2]))
        else:
            weights = output
        leaves.append((weights.detach() * factor).requires_grad_())
        if not isinstance(attention, FusedAttention) or attention.v is None:
            return leaves[-1]
        return (leaves[-1] @ attention.v.to(weights.dtype)).to(output.dtype)

    return Intercept(Tap(on_attention, heads=heads))


class EvenRows:
    """Multiplies a gradient that is the same for all tokens by the weights of a layer only once.

    If a score is read from the mean token, the gradient of a block's last layer is one row,
    repeated for each token, and torch multiplies every copy. Here rows are compared first, so the
    result is the same for any gradient. Weights get no gradient.
    """

    def linear(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kinds = set(map(type, args[:2]))  # quantised and distributed weights multiply in their way
        plain = len(args) in (2, 3) and not kwargs and kinds <= {Tensor, torch.nn.Parameter}
        if not plain or args[0].dim() != 3 or not args[0].requires_grad:
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
        first = gradient[:, :1]
        # the last row is compared first, because that is cheap
        if gradient.stride(1) == 0 or (
            torch.equal(first, gradient[:, -1:]) and bool((gradient == first).all())
        ):
            rows = (first @ weight).expand(-1, gradient.shape[1], -1)
            return rows.contiguous(), None, None  # torch's activations are slow on repeated rows
        return gradient @ weight, None, None
