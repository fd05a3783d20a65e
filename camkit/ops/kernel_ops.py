"""Declarations of camkit's torch operators: schemas, output shapes, gradients, plain kernels.

Each operator exists in two namespaces: in ``camkit`` a compiled library may add kernels for CUDA,
in ``camkit_plain`` it is plain torch on every device. `camkit.ops.reweight` and
`camkit.ops.doei_tail` hold the functions to call and choose the namespace.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkit.ops import reweight_plain as plain
from camkit.ops.reweight_plain import ALL, AttentionMap, Gradients

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


def declare(
    op: str,
    schema: str,
    kernel: Callable[..., Any],
    shapes: Callable[..., Any],
    gradient: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> None:
    """Declare an operator.

    Args:
        op: namespace and name.
        schema: its arguments and results.
        kernel: computes it in plain torch, on every device without a compiled kernel.
        shapes: returns empty tensors like its results.
        gradient: what stores tensors for the backward, and the backward.
    """
    torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op, "CompositeExplicitAutograd", _in_full_precision(kernel))
    torch.library.register_fake(op, shapes)
    if gradient is not None:
        keep, backward = gradient
        torch.library.register_autograd(op, _in_full_precision(backward), setup_context=keep)


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast, which would round the products of plain torch."""

    @functools.wraps(function)
    def run(*values: Any) -> Any:
        # a backward may be called without any gradient
        devices = {value.device.type for value in values if isinstance(value, Tensor)}
        with torch.autocast(devices.pop() if devices else "cpu", enabled=False):
            return function(*values)

    return run


def _attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, _w: object, _s: float, _g: int, class_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    images, heads, tokens, _ = q.shape
    wide = plain.at_least_float32(q.dtype)
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


def _column_shape(q: Tensor, _k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    return lse.new_empty(*q.shape[:3], rest[-1])


def _affinity_shape(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    return lse.new_empty(len(q), q.shape[2] - rest[-1], k.shape[2] - rest[-1])


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_weights, *ctx.settings, _ = inputs
    ctx.save_for_backward(q, k, v, log_weights, *output)
    ctx.set_materialize_grads(False)


def _attention_gradient(
    namespace: str,
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_rows: Tensor | None,
) -> tuple[Tensor | None, ...]:
    q, k, v, log_weights, out, lse, rows = ctx.saved_tensors
    to_weights = log_weights is not None and ctx.needs_input_grad[3]
    gradients = getattr(torch.ops, namespace).reweighted_attention_backward(
        *(grad_out, grad_lse, grad_rows, q, k, v, out, lse, rows, log_weights),
        *(*ctx.settings, to_weights),
    )
    return *gradients[:3], gradients[3] if to_weights else None, None, None, None


def _keep_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, lse, log_weights, scale, gated_rows, ctx.count = inputs
    ctx.settings = scale, gated_rows
    ctx.save_for_backward(q, k, lse, log_weights, output)


def _columns_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, columns = ctx.saved_tensors
    sums = Gradients(AttentionMap(*inputs, *ctx.settings))
    at_logits = columns * gradient
    sums.lse -= at_logits.sum(-1)
    sums.add(at_logits, ALL, slice(0, None), slice(0, ctx.count))
    return *sums.cast(), None, None, None


def _affinity_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, _ = ctx.saved_tensors
    sums = Gradients(AttentionMap(*inputs, *ctx.settings))
    sums.add_mean(ctx.count, lambda rows: gradient[:, rows])
    return *sums.cast(), None, None, None


def _keep_propagated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    q, k, lse, cam, log_weights, scale, gated_rows, ctx.skip = inputs
    ctx.settings = scale, gated_rows
    ctx.save_for_backward(q, k, lse, cam, log_weights)


def _propagated_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, lse, cam, log_weights = ctx.saved_tensors
    maps, at_output = cam.to(lse.dtype), gradient.to(lse.dtype)
    sums = Gradients(AttentionMap(q, k, lse, log_weights, *ctx.settings))
    to_cam = torch.zeros_like(maps)

    def at_mean(rows: slice) -> Tensor:
        return at_output[:, :, rows].mT @ maps

    def on_part(weights: Tensor, rows: slice) -> None:
        to_cam.add_(at_output[:, :, rows] @ weights.sum(1), alpha=1 / q.shape[1])

    sums.add_mean(ctx.skip, at_mean, on_part)
    to_q, to_k, to_lse, to_weights = sums.cast()
    return to_q, to_k, to_lse, to_cam.to(cam.dtype), to_weights, None, None, None


def _of_map(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of an `AttentionMap` take its fields, ``q, k, lse, ...``, one by one."""
    return lambda *values: function(AttentionMap(*values[:6]), *values[6:])


def _affinity_mean_(affinity: Tensor, *values: Any) -> None:
    plain.affinity_mean_(affinity, AttentionMap(*values[:6]), *values[6:])


def _propagate_mean(q: Tensor, k: Tensor, lse: Tensor, cam: Tensor, *values: Any) -> Tensor:
    return plain.propagate_mean(AttentionMap(q, k, lse, *values[:3]), cam, values[3])


def _propagated_shape(_q: Tensor, _k: Tensor, _lse: Tensor, cam: Tensor, *_: Any) -> Tensor:
    return cam.new_empty(cam.shape)


for _namespace in NAMESPACES:
    _attention_backward = functools.partial(_attention_gradient, _namespace)
    _parts: dict[str, tuple[Any, ...]] = {
        "reweighted_attention": (
            *(plain.reweighted_attention, _attention_shapes),
            (_keep_attention, _attention_backward),
        ),
        "reweighted_attention_backward": (plain.attention_backward, _backward_shapes),
        "class_columns": (
            *(_of_map(plain.class_columns), _column_shape),
            (_keep_map, _columns_gradient),
        ),
        "affinity_mean": (
            *(_of_map(plain.affinity_mean), _affinity_shape),
            (_keep_map, _affinity_gradient),
        ),
        "affinity_mean_": (_affinity_mean_, lambda *_: None),
        "propagate_mean": (
            *(_propagate_mean, _propagated_shape),
            (_keep_propagated, _propagated_gradient),
        ),
    }
    for _name, _of_operator in _parts.items():
        declare(f"{_namespace}::{_name}", SCHEMAS[_name], *_of_operator)
