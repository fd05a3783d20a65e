"""The torch-function mode that reports, reweights or replaces the attention calls of a host.

The mode is entered before a module runs and exited after it, so nothing of the host is replaced.
Attention calls are recognised by the identity of the function. A host's private copy of such a
function runs as its author wrote it, and what it calls is seen.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import cache
from threading import local
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
from camkit.capture.mha import (
    attend_explicitly,
    by_fast_path,
    multi_head_attention,
    same_bits,
    with_values_shown,
)
from camkit.capture.modes import THREAD, measurement
from camkit.ops.extra_channels import channels_preferred
from camkit.ops.paired import PairBias, paired_attention
from camkit.ops.reweight import reweighted_attention
from camkit.torch_internals import (
    disable_compiler,
    function_modes_disabled,
    sleeping_modes,
    tree_leaves,
)

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
            ``kernel`` (a fused kernel by name), ``reweighted`` and ``paired`` (camkit's own
            operators) and ``linear``, each called with the function and its arguments. With
            ``fused``, the attention inside multi_head_attention_forward is passed to it, too.
        module: whose forward is observed. Then code in it that asks whether a torch-function mode
            is on goes the way it goes without one.
        with_values: have multi_head_attention_forward show queries, keys and values
            (`camkit.capture.mha.with_values_shown`).
    """

    def __init__(
        self, handler: Any, module: nn.Module | None = None, *, with_values: bool = False
    ) -> None:
        super().__init__()
        _exclude_from_compilation()
        self._handler = handler
        self._module = module
        self._with_values = with_values
        self._asleep: AbstractContextManager[Any] | None = None
        self._running: list[FunctionType] = []

    def __enter__(self) -> "Intercept":
        super().__enter__()
        if self._module is not None and _asks_for_modes(self._module):
            self._asleep = sleeping_modes()
            if self._asleep is not None:
                self._asleep.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._asleep is not None:
            asleep, self._asleep = self._asleep, None
            asleep.__exit__(None, None, None)
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _known_functions().get(id(func))
        private = func if kind is None and type(func) is FunctionType else None
        if kind is None and (private is None or _is_torchs(private)):
            return func(*args, **kwargs)
        suspended = getattr(_HERE, "suspended", None)
        if suspended is not None and isinstance(self._handler, suspended):
            return func(*args, **kwargs)
        if private is not None:
            kind = _proven_kind(private, args, kwargs)
            if kind is None:
                return self._run_private(private, args, kwargs)
        if kind == "multi_head" and hasattr(self._handler, "fused"):
            with self._on():  # the original is one opaque call; this one shows the attention inside
                return self._multi_head(args, kwargs)
        handle = getattr(self._handler, str(kind), func)
        return func(*args, **kwargs) if handle is func else handle(func, *args, **kwargs)

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run multi_head_attention_forward step by step."""
        if self._with_values:
            shown = with_values_shown(*args, **kwargs)
            if hasattr(self._handler, "replaces"):
                return shown
            with function_modes_disabled():  # what the host goes on with, to the bit
                fast = by_fast_path(self._module, args, kwargs)
                return fast or multi_head_attention(*args, **kwargs)
        fast = by_fast_path(self._module, args, kwargs)
        return fast or multi_head_attention(*args, **kwargs)

    def _run_private(
        self, func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a host's own function as its author wrote it, and see what it calls."""
        asleep = None if func in self._running else sleeping_modes()
        if asleep is None:  # it asks for modes late, and would end up here again and again
            return func(*args, **kwargs)
        self._running.append(func)
        try:
            with self._on(), asleep:
                return func(*args, **kwargs)
        finally:
            self._running.pop()

    @contextmanager
    def _on(self) -> Iterator[None]:
        """Switch the mode on again inside its own `__torch_function__`."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)


_ASKS: "WeakKeyDictionary[nn.Module, tuple[Any, bool]]" = WeakKeyDictionary()


def _asks_for_modes(module: nn.Module) -> bool:
    """Whether a module's forward, or a function it calls, has a guard for torch-function modes."""
    forward: Any = module.forward
    forward = getattr(forward, "__func__", forward)
    known = _ASKS.get(module)
    if known is None or known[0] is not forward:
        known = _ASKS[module] = (forward, _has_guard(forward, module, set()))
    return known[1]


def _has_guard(function: Any, module: nn.Module, visited: set[Any]) -> bool:
    if type(function) is not FunctionType or function in visited or _is_torchs(function):
        return False
    visited.add(function)
    names = function.__code__.co_names
    if any(name.startswith("has_torch_function") for name in names):
        return True
    called: list[Any] = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            called.append(cell.cell_contents)
    for name in names:
        called.append(function.__globals__.get(name))
        called.append(vars(module).get(name, getattr(type(module), name, None)))
    return any(_has_guard(callee, module, visited) for callee in called)


def _is_torchs(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"


@cache
def _exclude_from_compilation() -> None:
    """Let compiled code call the mode instead of tracing it, which would edit keys twice.

    Not at import: it loads the compiler, which takes a moment.
    """
    untraced = disable_compiler(
        Intercept.__torch_function__,
        "camkit watches or edits attention in Python and cannot see into a compiled kernel such as "
        "flex_attention; switch the model to scaled_dot_product_attention (transformers: "
        "camkit.capture.torch_kernels)",
    )
    Intercept.__torch_function__ = untraced  # type: ignore[method-assign]


@cache
def _known_functions() -> dict[int, str]:
    """Name the method of a handler for each function of torch and camkit, by identity."""
    aten = torch.ops.aten
    functions: dict[str, list[Any]] = {
        "fused": [
            F.scaled_dot_product_attention,
            aten.scaled_dot_product_attention,
            attend_explicitly,
        ],
        "softmax": [torch.softmax, F.softmax, Tensor.softmax, aten.softmax],
        "multi_head": [F.multi_head_attention_forward],
        "linear": [F.linear],
        "paired": [paired_attention],
        "kernel": [getattr(aten, name, None) for name in torch_internals.KERNELS],
        "reweighted": [reweighted_attention],
    }
    return {id(f): kind for kind, group in functions.items() for f in group if f is not None}


_REFERENCES: dict[str, tuple[str, Callable[..., Any]]] = {
    "scaled_dot_product_attention": ("fused", F.scaled_dot_product_attention),
    "softmax": ("softmax", torch.softmax),
}
_PROVEN: "WeakKeyDictionary[FunctionType, dict[tuple[Any, ...], str | None]]" = WeakKeyDictionary()


def _proven_kind(func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Name the function of torch that returns the same bits as a private function of a host.

    It is compared once for each form of its arguments (types, devices, options). Only functions
    that may compute nothing before they attend need it; of others what they call is seen.
    """
    if func.__name__ not in _REFERENCES:
        return None
    kind, reference = _REFERENCES[func.__name__]
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
        try:
            with measurement(device):
                outputs = tree_leaves(reference(*args, **kwargs))
        except (RuntimeError, TypeError, ValueError):
            return None  # the private function takes other arguments
    if len(outputs) == len(expected) and all(map(same_bits, outputs, expected)):
        proven[form] = kind
    return proven[form]


_OPTIONS = ("dropout_p", "is_causal", "enable_gqa")
Bias = Tensor | PairBias
"""What may be added to the logits of a call: log-weights of its keys, or a bias of its pairs."""


class Tap:
    """Reports attention calls, and may add to their logits.

    Args:
        on_attention: called with ``(output, attention)`` of each fused attention, and with
            ``(weights, attention)`` of each softmax that looks like attention; returns the tensor
            the host goes on with, normally the one it was given.
        added_to_logits: called before each of them, returns log-weights on the keys, ``(b, s)`` or
            ``(b, a, s)``, or a `PairBias`, which is added to the logits of the host's own kernel;
            None leaves the call as it is.
        heads: of the module; tells batch and heads apart in hosts that fold heads into the batch,
            as ``(b * a, t, d)``. What is reported always has four axes.
        normaliser: take the softmax normaliser from the host's own kernel where it returns it.
    """

    def __init__(
        self,
        on_attention: Callable[[Tensor, Attention], Tensor],
        added_to_logits: Callable[[Attention], Bias | None] | None = None,
        *,
        heads: int = 1,
        normaliser: bool = False,
    ) -> None:
        self._on_attention = on_attention
        self._added_to_logits = added_to_logits
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
        graph = THREAD.graph
        if attn_mask is not None and graph is not None and graph.caller_has_none:
            attn_mask = _without_own_graph(attn_mask)
        call = (query, key, value, attn_mask)
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
        options |= {"is_causal": is_causal, "enable_gqa": enable_gqa}
        if not self._has_heads(query):
            return func(*call, **options)
        q, k, v = self._unfolded(query), self._unfolded(key), self._unfolded(value)
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        attention = _described(q, k, self._unfolded(attn_mask, query), options)
        attention = replace(attention, v=v)
        added = self._added(attention)
        if added is not None:
            output, attention = self._attend_with(added, attention, func, call, options)
        else:
            known = None
            if self._normaliser and func is not attend_explicitly:
                known = torch_internals.call_with_normaliser(*call, options)
            output, normaliser = known or (func(*call, **options), None)
            attention = replace(attention, normaliser=normaliser)
        unfolded = self._unfolded(output)
        output = self._on_attention(unfolded, replace(attention, output=unfolded))
        return output.flatten(0, 1) if query.dim() == 3 else output

    def _attend_with(
        self,
        added: Bias,
        attention: FusedAttention,
        func: Callable[..., Tensor],
        call: tuple[Tensor, Tensor, Tensor, Tensor | None],
        options: dict[str, Any],
    ) -> tuple[Tensor, FusedAttention]:
        """Return the output with something added to the logits, laid out as the host's call."""
        query, q, scale = call[0], attention.q, attention.scale
        folded = query.dim() == 3
        if isinstance(added, PairBias):
            dropout = options["dropout_p"]
            heads: Any = (q, attention.k, attention.v, added, attention.bias)
            output, normaliser = paired_attention(*heads, scale=scale, dropout_p=dropout)
            attention = replace(attention, pairs=added, normaliser=normaliser)
            return output.flatten(0, 1) if folded else output, attention
        keys = key_bias(added, query.dtype)
        bias = keys if attention.bias is None else attention.bias + keys
        attention = replace(attention, bias=bias)
        if not folded and _is_bare(call, options) and channels_preferred(query):
            # no mask is made, and weights keep their digits
            output, normaliser, _ = reweighted_attention(*call[:3], added, scale=scale)
            return output, replace(attention, normaliser=normaliser)
        if folded:
            bias = bias.expand(*q.shape[:2], -1, -1).flatten(0, 1)
        return func(*call[:3], bias, **options | {"is_causal": False}), attention

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
        *,
        scale: float | None,
        gated_rows: int | None,
        class_rows: int,
    ) -> Any:
        """Report a call of camkit's own function, by another tap or by the host."""
        settings: dict[str, Any] = {"scale": scale, "gated_rows": gated_rows}
        found = func(q, k, v, log_weights, **settings, class_rows=class_rows)
        bias = gated_bias(log_weights, gated_rows, q)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        attention = FusedAttention(q, k, scale, bias, v, found.output, found.lse)
        return found._replace(output=self._on_attention(found.output, attention))

    def paired(
        self,
        func: Callable[..., Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pairs: PairBias,
        bias: Tensor | None,
        **options: Any,
    ) -> Any:
        """Report a call that another tap has added a bias of pairs to, and add this one's."""
        attention = FusedAttention(q, k, options["scale"], bias, pairs=pairs)
        added = self._added(attention)
        if isinstance(added, PairBias):
            pairs = pairs + added
        elif added is not None:
            keys = key_bias(added, q.dtype)
            bias = keys if bias is None else bias + keys
        output, normaliser = func(q, k, v, pairs, bias, **options)
        attention = FusedAttention(q, k, options["scale"], bias, v, output, normaliser, pairs=pairs)
        return self._on_attention(output, attention), normaliser

    def softmax(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        no_map = logits.dim() == 3 and logits.shape[1] not in (1, logits.shape[2])
        if no_map or not self._has_heads(logits) or dim not in (-1, logits.dim() - 1):
            return func(*args, **kwargs)
        added = None
        if self._added_to_logits is not None:
            with taps_suspended():  # other taps should see the final call only
                plain = func(*args, **kwargs)
            added = self._added(ExplicitAttention(self._unfolded(plain)))
        if added is not None:
            unfolded = self._unfolded(logits)
            if isinstance(added, PairBias):
                added.check(unfolded, unfolded.mT)
                biased = unfolded + added.rows().to(logits.dtype)
            else:
                biased = unfolded + key_bias(added, logits.dtype)
            args = (biased.flatten(0, 1) if logits.dim() == 3 else biased, *args[1:])
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        weights = func(*args, **kwargs)
        unfolded = self._unfolded(weights)
        used = self._on_attention(unfolded, ExplicitAttention(unfolded))
        return used.flatten(0, 1) if weights.dim() == 3 else used

    def _added(self, attention: Attention) -> Bias | None:
        if self._added_to_logits is None:
            return None
        with taps_suspended():
            return self._added_to_logits(attention)

    def _has_heads(self, tensor: Tensor) -> bool:
        """Whether heads are an axis of their own, or folded into the batch."""
        return tensor.dim() == 4 or (tensor.dim() == 3 and len(tensor) % self._heads == 0)

    def _unfolded(self, tensor: Any, like: Tensor | None = None) -> Any:
        """Return batch and heads as two axes; a mask for all of them keeps its single axis."""
        if tensor is None or tensor.dim() != 3 or (like is not None and like.dim() != 3):
            return tensor
        return tensor[None] if len(tensor) == 1 else tensor.unflatten(0, (-1, self._heads))


def _without_own_graph(mask: Tensor) -> Tensor:
    """Detach a mask that is made of parameters alone: for one with a graph torch takes other ways.

    The graph is camkit's, so nobody asks for gradients of weights.
    """
    nodes, visited = [mask.grad_fn], 0
    while nodes:
        node, visited = nodes.pop(), visited + 1
        if node is None:
            continue
        variable = getattr(node, "variable", None)
        if visited > 100 or not (variable is None or isinstance(variable, nn.Parameter)):
            return mask
        nodes += [following for following, _ in node.next_functions]
    return mask.detach()


def _described(
    q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> FusedAttention:
    """Describe a fused call before it runs."""
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    masked = mask is not None or options["is_causal"]
    bias = bias_of(mask, options["is_causal"], q, k) if masked else None
    return FusedAttention(q, k, scale, bias)


def _is_bare(call: tuple[Tensor, Tensor, Tensor, Tensor | None], options: dict[str, Any]) -> bool:
    """Whether a call has no mask, no other option than a scale, and nothing to broadcast."""
    plain = call[3] is None and not any(options[name] for name in _OPTIONS)
    return plain and call[0].shape[:2] == call[1].shape[:2] == call[2].shape[:2]


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
