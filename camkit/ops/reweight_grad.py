"""Gradients of the attention operators, streamed as the operators are: no map of all pairs.

With weights A of the map, gradients G at them and the normaliser an input of its own, the gradient
at a logit is ``A * G``; that at the normaliser is minus the row sum of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from camkit.ops.fused import ON_CPU, kernel_of
from camkit.ops.reweight_plain import part, parts, wide


class Gradients:
    """Sums of what flows to q, k, the normaliser and the log-weights, part by part."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        log_weights: Tensor | None,
        scale: float,
        gated_rows: int,
    ) -> None:
        dtype = wide(q.dtype)
        self._of = (q, k, lse, log_weights, scale, gated_rows)
        self.q = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        self.k = torch.zeros_like(k, dtype=dtype, memory_format=torch.contiguous_format)
        self.lse = torch.zeros_like(lse, memory_format=torch.contiguous_format)
        of_heads = log_weights is not None and log_weights.dim() == 3
        shape = (*k.shape[:3],) if of_heads else (len(k), k.shape[2])
        self.log_weights = k.new_zeros(shape, dtype=dtype)

    def weights(self, heads: slice, rows: slice, keys: slice) -> Tensor:
        """The part of the map that some heads and rows give some keys."""
        q, k, lse, log_weights, scale, gated_rows = self._of
        tilt = None if log_weights is None else log_weights[..., keys]
        return part(q, k[:, :, keys], lse, tilt, scale, gated_rows, heads, rows)

    def add(self, at_logits: Tensor, heads: slice, rows: slice, keys: slice) -> None:
        """Count the gradient at the logits of one part."""
        q, k, _, log_weights, scale, gated_rows = self._of
        queries, wanted = q[:, heads, rows].to(self.q.dtype), k[:, heads, keys].to(self.q.dtype)
        self.q[:, heads, rows] += at_logits @ wanted * scale
        self.k[:, heads, keys] += at_logits.mT @ queries * scale
        if log_weights is None:
            return
        start = rows.indices(q.shape[2])[0]
        gated = at_logits if gated_rows < 0 else at_logits[:, :, : max(0, gated_rows - start)]
        to_keys = gated.sum(2)
        if log_weights.dim() == 3:
            self.log_weights[:, heads, keys] += to_keys
        else:
            self.log_weights[:, keys] += to_keys.sum(1)

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """In the dtypes and shapes of what they belong to."""
        q, k, _, log_weights, _, _ = self._of
        to_weights = None if log_weights is None else self.log_weights.to(log_weights.dtype)
        return self.q.to(q.dtype), self.k.to(k.dtype), self.lse, to_weights


def mean_map_backward(
    found: Gradients,
    q: Tensor,
    k: Tensor,
    skip: int,
    at_mean: Callable[[slice], Tensor],
    see: Callable[[Tensor, slice], None] | None = None,
) -> None:
    """Carry a gradient at rows of the head-mean map, ``at_mean(rows)``, into the sums.

    ``see(weights, rows)`` is shown every part on its way.
    """
    keys = slice(skip, None)
    for rows, groups in parts(q, k[:, :, keys], skip):
        own = slice(rows.start - skip, rows.stop - skip)
        gradient = at_mean(own)[:, None] / q.shape[1]
        for heads in groups:
            weights = found.weights(heads, rows, keys)
            if see is not None:
                see(weights, own)
            at_logits = weights.mul_(gradient)
            found.lse[:, heads, rows] -= at_logits.sum(-1)
            found.add(at_logits, heads, rows, keys)


def attention_backward(  # noqa: PLR0913 - as declared
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_rows: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
    to_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at q, k, v and the log-weights; the last one is empty unless asked for.

    Torch's own backward takes the output where it can be called, a stream of parts what is left.
    The class rows are at hand, so their share costs two small products.
    """
    found = Gradients(q, k, lse, log_weights, scale, gated_rows)
    whole = slice(None)
    by_kernel = None
    if grad_out is not None and not to_weights:
        by_kernel = _kernel_backward(grad_out, q, k, v, out, lse, log_weights, scale, gated_rows)
    streamed = grad_out if by_kernel is None else None
    to_v = _stream(found, streamed, grad_lse, q, k, v, out)
    if grad_rows is not None and rows.shape[2]:
        at_logits = rows * (grad_rows - (grad_rows * rows).sum(-1, keepdim=True))
        found.add(at_logits, whole, slice(0, rows.shape[2]), whole)
    if by_kernel is not None:
        found.q += by_kernel[0]
        found.k += by_kernel[1]
        to_v = by_kernel[2]
    to_q, to_k, _, tilt = found.all()
    wanted = tilt if to_weights and tilt is not None else q.new_empty(0)
    return to_q, to_k, to_v.to(v.dtype).contiguous(), wanted


def _stream(  # noqa: PLR0913 - as above
    found: Gradients,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
) -> Tensor:
    """Count what comes through the output and the normaliser; returns what flows to v."""
    dtype, whole = wide(v.dtype), slice(None)
    to_v = torch.zeros_like(v, dtype=dtype, memory_format=torch.contiguous_format)
    if grad_out is None and grad_lse is None:
        return to_v
    for rows, groups in parts(q, k):
        for heads in groups:
            weights = found.weights(heads, rows, whole)
            at_weights = weights.new_zeros(())
            if grad_out is not None:
                gradient, values = grad_out[:, heads, rows].to(dtype), v[:, heads].to(dtype)
                to_v[:, heads] += weights.mT @ gradient
                mean = (gradient * out[:, heads, rows]).sum(-1, keepdim=True)
                at_weights = (gradient @ values.mT).sub_(mean)
            if grad_lse is not None:
                at_weights = at_weights + grad_lse[:, heads, rows, None]
            found.add(weights.mul_(at_weights), heads, rows, whole)
    return to_v


def _kernel_backward(  # noqa: PLR0913 - as above
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
) -> tuple[Tensor, ...] | None:
    """By torch's kernel for the CPU; those of devices want what only their own forward knows."""
    options = {"dropout_p": 0.0, "is_causal": False, "scale": scale}
    if q.device.type != "cpu" or kernel_of(q, k, v, None, options) != ON_CPU:
        return None
    backward = getattr(torch.ops.aten, f"{ON_CPU}_backward")
    level = lse.masked_fill(lse == -torch.inf, 0.0)  # as the kernel itself has it
    cut = q.shape[2] if log_weights is None or gated_rows < 0 else gated_rows
    found: list[tuple[Tensor, ...]] = []
    for rows, tilt in ((slice(0, cut), log_weights), (slice(cut, None), None)):
        queries = q[:, :, rows]
        if queries.numel() == 0:
            continue
        mask = tilt if tilt is None else tilt.unsqueeze(-2).reshape(len(q), -1, 1, k.shape[2])
        given = (grad_out[:, :, rows], queries, k, v, out[:, :, rows], level[:, :, rows])
        found.append(backward(*given, 0.0, False, attn_mask=mask, scale=scale))  # noqa: FBT003
    to_q = torch.cat([each[0] for each in found], 2)
    to_k, to_v = (torch.stack([each[i] for each in found]).sum(0) for i in (1, 2))
    return to_q, to_k, to_v
