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
_CALL = "Tensor? log_weights, float scale, int gated_rows"
_GRADS = "Tensor? grad_out, Tensor? grad_lse, Tensor? grad_rows"
SCHEMAS = {
    "reweighted_attention": (
        f"(Tensor q, Tensor k, Tensor v, {_CALL}, int class_rows)"
        " -> (Tensor out, Tensor lse, Tensor rows)"
    ),
    "reweighted_attention_backward": (
        f"({_GRADS}, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rows, {_CALL},"
        " bool to_weights) -> (Tensor to_q, Tensor to_k, Tensor to_v, Tensor to_log_weights)"
    ),
    "class_columns": f"(Tensor q, Tensor k, Tensor lse, {_CALL}, int columns) -> Tensor",
    "affinity_mean": f"(Tensor q, Tensor k, Tensor lse, {_CALL}, int skip) -> Tensor",
    "affinity_mean_": (
        f"(Tensor(a!) affinity, Tensor q, Tensor k, Tensor lse, {_CALL}, int skip,"
        " float alpha, float beta) -> ()"
    ),
    "propagate_mean": f"(Tensor q, Tensor k, Tensor lse, Tensor cam, {_CALL}, int skip) -> Tensor",
}


def declare(
    op: str,
    schema: str,
    kernel: Callable[..., Any],
    shapes: Callable[..., Any],
    keep: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Declare an operator.

    Args:
        op: namespace and name.
        schema: its arguments and results.
        kernel: computes it in plain torch, on every device without a compiled kernel.
        shapes: returns empty tensors like its results.
        keep: stores what the backward needs.
        backward: computes the gradients at the arguments; None for an operator without gradient.
    """
    torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op, "CompositeExplicitAutograd", _in_full_precision(kernel))
    torch.library.register_fake(op, shapes)
    if backward is not None:
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
    """Store the inputs, of which tensors come first, and the outputs."""
    tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
    ctx.settings = inputs[len(tensors) :]
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.save_for_backward(*tensors, *outputs)
    ctx.set_materialize_grads(len(outputs) < 2)  # None saves work if outputs are not used


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _keep(ctx, inputs, ())


def _attention_gradient(
    namespace: str, ctx: Any, *at_outputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    *heads, log_weights, out, lse, rows = ctx.saved_tensors
    *settings, _ = ctx.settings
    to_weights = log_weights is not None and ctx.needs_input_grad[3]
    backward = getattr(torch.ops, namespace).reweighted_attention_backward
    forward = (*heads, out, lse, rows, log_weights, *settings)
    *gradients, weights = backward(*at_outputs, *forward, to_weights)
    return *gradients, weights if to_weights else None, None, None, None


def _columns_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, columns = ctx.saved_tensors
    *settings, count = ctx.settings
    sums = Gradients(AttentionMap(*inputs, *settings))
    at_logits = columns * gradient
    sums.lse -= at_logits.sum(-1)
    sums.add(at_logits, ALL, slice(0, None), slice(0, count))
    return *sums.cast(), None, None, None


def _affinity_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *settings, skip = ctx.settings
    sums = Gradients(AttentionMap(*ctx.saved_tensors, *settings))
    sums.add_mean(skip, lambda rows: gradient[:, rows])
    return *sums.cast(), None, None, None


def _propagated_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, lse, cam, log_weights = ctx.saved_tensors
    *settings, skip = ctx.settings
    maps, at_output = cam.to(lse.dtype), gradient.to(lse.dtype)
    sums = Gradients(AttentionMap(q, k, lse, log_weights, *settings))
    to_cam = torch.zeros_like(maps)

    def at_mean(rows: slice) -> Tensor:
        return at_output[:, :, rows].mT @ maps

    def on_part(weights: Tensor, rows: slice) -> None:
        to_cam.add_(at_output[:, :, rows] @ weights.sum(1), alpha=1 / q.shape[1])

    sums.add_mean(skip, at_mean, on_part)
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


_columns, _affinity = _of_map(plain.class_columns), _of_map(plain.affinity_mean)
for _namespace in NAMESPACES:
    _backward = functools.partial(_attention_gradient, _namespace)
    _operators: list[tuple[Any, ...]] = [
        ("reweighted_attention", plain.reweighted_attention, _attention_shapes, _keep, _backward),
        ("reweighted_attention_backward", plain.attention_backward, _backward_shapes),
        ("class_columns", _columns, _column_shape, _keep, _columns_gradient),
        ("affinity_mean", _affinity, _affinity_shape, _keep_inputs, _affinity_gradient),
        ("affinity_mean_", _affinity_mean_, lambda *_: None),
        ("propagate_mean", _propagate_mean, _propagated_shape, _keep_inputs, _propagated_gradient),
    ]
    for _name, *_parts in _operators:
        declare(f"{_namespace}::{_name}", SCHEMAS[_name], *_parts)
