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
_MAP = "Tensor q, Tensor k, Tensor lse"
_CALL = "Tensor? log_weights, float scale, int gated_rows"
SCHEMAS = {
    "rows_and_columns": (
        f"({_MAP}, {_CALL}, int rows, int columns) -> (Tensor rows, Tensor columns)"
    ),
    "affinity_mean": f"({_MAP}, {_CALL}, int skip) -> Tensor",
    "affinity_mean_": (
        f"(Tensor(a!) affinity, {_MAP}, {_CALL}, int skip, float alpha, float beta) -> ()"
    ),
    "propagate_mean": f"({_MAP}, Tensor cam, {_CALL}, int skip) -> Tensor",
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


def _map_shapes(q: Tensor, k: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (images, heads, tokens, _), (rows, columns) = q.shape, rest[-2:]
    return (
        lse.new_empty(images, heads, rows, k.shape[2]),
        lse.new_empty(images, heads, tokens, columns),
    )


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


def _maps_gradient(
    ctx: Any, to_rows: Tensor | None, to_columns: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, rows, columns = ctx.saved_tensors
    sums = Gradients(AttentionMap(*inputs, *ctx.settings[:-2]))
    if to_rows is not None and rows.numel():
        at_logits = rows * (to_rows - (to_rows * rows).sum(-1, keepdim=True))
        sums.add(at_logits, ALL, slice(0, rows.shape[2]))
    if to_columns is not None and columns.numel():
        at_logits = columns * to_columns
        sums.lse -= at_logits.sum(-1)
        sums.add(at_logits, ALL, slice(0, None), slice(0, columns.shape[3]))
    to_q, to_k, to_lse, to_weights = sums.cast()
    by_lse = to_columns is not None and columns.numel() > 0  # rows sum to one whatever it is
    return to_q, to_k, to_lse if by_lse else None, to_weights, None, None, None, None


def _keep_for_normaliser(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep_inputs(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def _normaliser_gradient(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 6  # only the output or the rows were used
    sums = Gradients(AttentionMap(*ctx.saved_tensors, *ctx.settings))
    for rows, groups in sums.attention.parts():
        for heads in groups:
            weights = sums.attention.part(heads, rows)
            sums.add(weights.mul_(gradient[:, heads, rows, None]), heads, rows)
    to_q, to_k, _, to_weights = sums.cast()
    return to_q, to_k, None, to_weights, None, None


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


_maps, _affinity = _of_map(plain.rows_and_columns), _of_map(plain.affinity_mean)
_operators: list[tuple[Any, ...]] = [
    ("rows_and_columns", _maps, _map_shapes, _keep, _maps_gradient),
    ("affinity_mean", _affinity, _affinity_shape, _keep_inputs, _affinity_gradient),
    ("affinity_mean_", _affinity_mean_, lambda *_: None),
    ("propagate_mean", _propagate_mean, _propagated_shape, _keep_inputs, _propagated_gradient),
]
for _namespace in NAMESPACES:
    for _name, *_parts in _operators:
        declare(f"{_namespace}::{_name}", SCHEMAS[_name], *_parts)
declare(  # gives a normaliser that a kernel returned the gradient that torch has no formula for
    "camkit_plain::normaliser",
    f"({_MAP}, {_CALL}) -> Tensor",
    lambda _q, _k, lse, *_: lse.clone(),
    lambda _q, _k, lse, *_: torch.empty_like(lse),
    _keep_for_normaliser,
    _normaliser_gradient,
)
