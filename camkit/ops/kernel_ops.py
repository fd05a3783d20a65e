"""Declarations of the attention operators: schemas, shapes, gradients, and what runs without CUDA.

Each operator stands in two namespaces: in ``camkit`` a compiled library may add kernels for CUDA,
in ``camkit_plain`` it is plain torch on every device. `camkit.ops.reweight` chooses, and is what
other code calls.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkit.ops import reweight_plain as plain

NAMESPACES = ("camkit", "camkit_plain")
_TILT = "Tensor? log_weights, float scale, int gated_rows"
_GRADS = "Tensor? grad_out, Tensor? grad_lse, Tensor? grad_rows"
SCHEMAS = {
    "reweighted_attention": (
        f"(Tensor q, Tensor k, Tensor v, {_TILT}, int class_rows)"
        " -> (Tensor out, Tensor lse, Tensor rows)"
    ),
    "reweighted_attention_backward": (
        f"({_GRADS}, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rows, {_TILT},"
        " bool to_weights) -> (Tensor to_q, Tensor to_k, Tensor to_v, Tensor to_log_weights)"
    ),
    "class_columns": f"(Tensor q, Tensor k, Tensor lse, {_TILT}, int columns) -> Tensor",
    "affinity_mean": f"(Tensor q, Tensor k, Tensor lse, {_TILT}, int skip) -> Tensor",
    "affinity_mean_": (
        f"(Tensor(a!) affinity, Tensor q, Tensor k, Tensor lse, {_TILT}, int skip,"
        " float alpha, float beta) -> ()"
    ),
    "propagate_mean": f"(Tensor q, Tensor k, Tensor lse, Tensor cam, {_TILT}, int skip) -> Tensor",
}
KERNELS: dict[str, Callable[..., Any]] = {
    "reweighted_attention": plain.reweighted_attention,
    "reweighted_attention_backward": plain.attention_backward,
    "class_columns": plain.class_columns,
    "affinity_mean": plain.affinity_mean,
    "affinity_mean_": plain.affinity_mean_,
    "propagate_mean": plain.propagate_mean,
}


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, _w: object, _s: float, _g: int, class_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    images, heads, tokens, _ = q.shape
    wide = plain.wide(q.dtype)
    return (
        q.new_empty(images, tokens, heads, v.shape[3]).transpose(1, 2),
        q.new_empty((images, heads, tokens), dtype=wide),
        q.new_empty((images, heads, class_rows, k.shape[2]), dtype=wide),
    )


def _backward_shapes(*values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, log_weights, to_weights = *values[3:6], values[9], values[-1]
    to_q, to_k, to_v = (x.new_empty(x.shape) for x in (q, k, v))
    if log_weights is None or not to_weights:
        return to_q, to_k, to_v, q.new_empty(0)
    return to_q, to_k, to_v, log_weights.new_empty(log_weights.shape)


def _column_shape(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    del k
    return lse.new_empty(*q.shape[:3], rest[-1])


def _affinity_shape(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    return lse.new_empty(len(q), q.shape[2] - rest[-1], k.shape[2] - rest[-1])


def _propagated_shape(q: Tensor, k: Tensor, lse: Tensor, cam: Tensor, *rest: Any) -> Tensor:
    del q, k, lse, rest
    return cam.new_empty(cam.shape)


SHAPES: dict[str, Callable[..., Any]] = {
    "reweighted_attention": _attention_shapes,
    "reweighted_attention_backward": _backward_shapes,
    "class_columns": _column_shape,
    "affinity_mean": _affinity_shape,
    "affinity_mean_": lambda *_: None,
    "propagate_mean": _propagated_shape,
}


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_weights, *ctx.settings, _ = inputs
    ctx.save_for_backward(q, k, v, log_weights, *output)
    ctx.set_materialize_grads(False)


def _attention_gradient(namespace: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_rows: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_weights, out, lse, rows = ctx.saved_tensors
        wanted = log_weights is not None and ctx.needs_input_grad[3]
        found = getattr(torch.ops, namespace).reweighted_attention_backward(
            *(grad_out, grad_lse, grad_rows, q, k, v, out, lse, rows, log_weights),
            *(*ctx.settings, wanted),
        )
        return *found[:3], found[3] if wanted else None, None, None, None

    return backward


def _keep_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, lse, log_weights, *ctx.settings = inputs
    ctx.save_for_backward(q, k, lse, log_weights, output)


def _columns_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, lse, log_weights, columns = ctx.saved_tensors
    scale, gated_rows, count = ctx.settings
    found = plain.Gradients(q, k, lse, log_weights, scale, gated_rows)
    at_logits = columns * gradient
    found.lse -= at_logits.sum(-1)
    found.add(at_logits, slice(None), slice(0, None), slice(0, count))
    return *found.all(), None, None, None


def _affinity_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, lse, log_weights, _ = ctx.saved_tensors
    *tilt, skip = ctx.settings
    found = plain.Gradients(q, k, lse, log_weights, *tilt)
    plain.mean_map_backward(found, q, k, skip, lambda rows: gradient[:, rows])
    return *found.all(), None, None, None


def _keep_propagated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    q, k, lse, cam, log_weights, *ctx.settings = inputs
    ctx.save_for_backward(q, k, lse, cam, log_weights)


def _propagated_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, lse, cam, log_weights = ctx.saved_tensors
    *tilt, skip = ctx.settings
    values, given = cam.to(lse.dtype), gradient.to(lse.dtype)
    found = plain.Gradients(q, k, lse, log_weights, *tilt)
    to_cam = torch.zeros_like(values)

    def at_mean(rows: slice) -> Tensor:
        return given[:, :, rows].mT @ values

    def see(weights: Tensor, rows: slice) -> None:
        to_cam.add_(given[:, :, rows] @ weights.sum(1), alpha=1 / q.shape[1])

    plain.mean_map_backward(found, q, k, skip, at_mean, see)
    to_q, to_k, to_lse, to_weights = found.all()
    return to_q, to_k, to_lse, to_cam.to(cam.dtype), to_weights, None, None, None


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would cut the products of a plain operator short."""

    @functools.wraps(function)
    def run(*values: Any) -> Any:
        # a backward may be called with no gradient at all
        devices = {value.device.type for value in values if isinstance(value, Tensor)}
        with torch.autocast(devices.pop() if devices else "cpu", enabled=False):
            return function(*values)

    return run


def _declare() -> None:
    for namespace in NAMESPACES:
        for name, schema in SCHEMAS.items():
            op = f"{namespace}::{name}"
            torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.impl(op, "CompositeExplicitAutograd", _in_full_precision(KERNELS[name]))
            torch.library.register_fake(op, SHAPES[name])
        gradients: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            "reweighted_attention": (_attention_gradient(namespace), _keep_attention),
            "class_columns": (_columns_gradient, _keep_map),
            "affinity_mean": (_affinity_gradient, _keep_map),
            "propagate_mean": (_propagated_gradient, _keep_propagated),
        }
        for name, (backward, keep) in gradients.items():
            torch.library.register_autograd(
                f"{namespace}::{name}", _in_full_precision(backward), setup_context=keep
            )


_declare()
