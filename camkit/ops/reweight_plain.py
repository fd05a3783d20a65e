"""The attention operators of `camkit.ops.reweight` in plain torch, and their gradients.

This is the specification that compiled kernels must agree with. An element of an attention map is
``exp(logit - lse)``, computed in at least float32 and in parts, so that no whole map is in memory.
With attention weights A, the gradient at A being G and the normaliser (``lse``) a separate input,
the gradient at a logit is ``A * G`` and that at the normaliser is minus the row sum of ``A * G``.
"""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from camkit.ops.extra_channels import aligned, channels_preferred, with_key_weights
from camkit.torch_internals import call_with_normaliser, kernels_in_order

ALL = slice(None)
# Elements of a map in memory at a time. On a CPU, all heads together are fastest up to the first
# number, and rows of one head stay in the cache up to the second; a GPU needs few and large parts.
TOGETHER = 1 << 17
HELD = 1 << 20
HELD_ON_DEVICE = 1 << 26


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for softmax: rows of half precision do not sum to one."""
    return torch.promote_types(dtype, torch.float32)


def chunks(count: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Cut ``count`` rows of ``elements`` each into slices that fit in memory together."""
    step = max(1, (HELD if device.type == "cpu" else HELD_ON_DEVICE) // max(1, elements))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def query_chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Cut the rows of an attention map, of all images and heads, into slices."""
    images, heads, tokens, _ = q.shape
    return chunks(tokens, images * heads * k.shape[2], q.device)


class AttentionMap(NamedTuple):
    """An attention map, as the inputs of one attention call and their normaliser.

    Attributes:
        q: queries, ``(b, a, t, d)``.
        k: keys.
        lse: log-sum-exp of each row, ``(b, a, t)``.
        log_weights: added to the logits of each key, ``(b, t)`` or ``(b, a, t)``.
        scale: factor on the dot products.
        gated_rows: number of rows, from the first, that ``log_weights`` apply to; -1 for all.
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    log_weights: Tensor | None
    scale: float
    gated_rows: int

    def columns(self, keys: slice) -> "AttentionMap":
        """Return the map with some of its columns only."""
        weights = None if self.log_weights is None else self.log_weights[..., keys]
        return self._replace(k=self.k[:, :, keys], log_weights=weights)

    def part(self, heads: slice = ALL, rows: slice = ALL) -> Tensor:
        """Compute the attention weights of some heads and rows, ``(b, a, r, s)``."""
        dtype = at_least_float32(self.q.dtype)
        q, k = self.q[:, heads, rows].to(dtype), self.k[:, heads].to(dtype)
        level = self.lse[:, heads, rows, None].to(dtype).clamp_min(torch.finfo(dtype).min)
        if q.shape[1] == 1:  # one product that subtracts the normaliser as it goes
            logits = torch.baddbmm(level[:, 0], q[:, 0], k[:, 0].mT, beta=-1, alpha=self.scale)
            logits = logits[:, None]
        else:
            logits = (q * self.scale @ k.mT).sub_(level)
        if self.log_weights is not None:
            weights = self.log_weights
            weights = weights[:, None] if weights.dim() == 2 else weights[:, heads]
            gated = self.gated(logits, rows)
            gated += weights[:, :, None]
        return logits.exp_()

    def parts(self, skip: int = 0) -> Iterator[tuple[slice, list[slice]]]:
        """Yield rows from ``skip`` on, with the groups of heads to compute one by one."""
        images, heads, tokens, _ = self.q.shape
        keys, on_cpu = self.k.shape[2], self.q.device.type == "cpu"
        of_head = max(1, images * (tokens - skip) * keys)
        step = max(1, (TOGETHER if on_cpu else HELD_ON_DEVICE) // of_head)
        groups = [slice(head, min(head + step, heads)) for head in range(0, heads, step)]
        for rows in chunks(tokens - skip, images * keys, self.q.device):
            yield slice(rows.start + skip, rows.stop + skip), groups

    def gated(self, of_rows: Tensor, rows: slice) -> Tensor:
        """Return the gated rows of a tensor that holds ``rows`` on its third axis."""
        if self.gated_rows < 0:
            return of_rows
        start = rows.indices(self.q.shape[2])[0]
        return of_rows[:, :, : max(0, self.gated_rows - start)]


def rows_and_columns(attention: AttentionMap, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Compute the first rows and the first columns of the map."""
    q, keys = attention.q, attention.k.shape[2]
    of_rows = attention.lse.new_empty(*q.shape[:2], rows, keys)
    of_columns = attention.lse.new_empty(*q.shape[:3], columns)
    if rows:
        found = attention.part(rows=slice(0, rows))
        # a kernel of half precision computes its normaliser to four digits only
        sums = found.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
        torch.div(found, sums, out=of_rows)
    if columns:
        of_columns = attention.columns(slice(0, columns)).part().contiguous()
    return of_rows, of_columns


def affinity_mean(attention: AttentionMap, skip: int) -> Tensor:
    """Average the map over heads, without its first rows and columns."""
    tokens, keys = attention.q.shape[2], attention.k.shape[2]
    affinity = attention.lse.new_empty(len(attention.q), tokens - skip, keys - skip)
    affinity_mean_(affinity, attention, skip, 1.0, 0.0)
    return affinity


def affinity_mean_(
    affinity: Tensor, attention: AttentionMap, skip: int, alpha: float, beta: float
) -> None:
    """Add the averaged map to ``affinity``, which is not read if ``beta`` is zero."""
    attention = attention.columns(slice(skip, None))
    for rows, groups in attention.parts(skip):
        into = affinity[:, rows.start - skip : rows.stop - skip]
        into = into.zero_() if beta == 0.0 else into.mul_(beta)
        for heads in groups:
            weights = attention.part(heads, rows)
            total = weights[:, 0] if weights.shape[1] == 1 else weights.sum(1)
            into.add_(total, alpha=alpha / attention.q.shape[1])


def propagate_mean(attention: AttentionMap, cam: Tensor, skip: int) -> Tensor:
    """Multiply the averaged map with class maps."""
    q, maps, dtype = attention.q, cam.shape[1], attention.lse.dtype
    if q.device.type == "cpu" and q.dtype == cam.dtype and maps <= q.shape[-1]:
        # the maps replace the values of torch's kernel: as wide as the keys, and not rounded
        values = F.pad(cam.mT, (0, q.shape[-1] - maps, skip, 0))[:, None]
        values = values.expand(-1, q.shape[1], -1, -1)
        carried, _ = attend(q, attention.k, values, *attention[3:])
        return carried[:, :, skip:, :maps].mean(1).mT.contiguous()
    attention, values = attention.columns(slice(skip, None)), cam.to(dtype).mT
    carried = cam.new_empty(*cam.shape[:2], q.shape[2] - skip, dtype=dtype)
    for rows, groups in attention.parts(skip):
        total = attention.part(groups[0], rows).sum(1)
        for heads in groups[1:]:
            total += attention.part(heads, rows).sum(1)
        carried[:, :, rows.start - skip : rows.stop - skip] = (total @ values).mT / q.shape[1]
    return carried.to(cam.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor | None, scale: float, gated_rows: int
) -> tuple[Tensor, Tensor]:
    """Compute output and normaliser in torch's own kernels; only the output has a gradient."""
    if log_weights is None or gated_rows == 0:
        return _attend_masked(q, k, v, None, scale)
    # torch's kernels differ in what they return for a row without any key
    empty = (log_weights == -torch.inf).all(-1, keepdim=True)
    log_weights = log_weights.masked_fill(empty, 0.0)
    graph = torch.is_grad_enabled() and log_weights.requires_grad
    if gated_rows >= 0 or graph or channels_preferred(q):
        wide = with_key_weights(q, k, log_weights, scale, gated_rows)
        out, lse = attend_joined(*wide, v, scale)
    else:
        mask = log_weights[:, None] if log_weights.dim() == 2 else log_weights
        out, lse = _attend_masked(q, k, v, mask[:, :, None], scale)
    on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not empty.any():
        return out, lse  # elsewhere it would be read back from the device
    empty = empty if empty.dim() == 3 else empty[:, None]  # as the normaliser
    if gated_rows >= 0:
        empty = empty & (torch.arange(q.shape[2], device=q.device) < gated_rows)
    return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def attend_joined(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute output and normaliser of queries and keys with more channels than the values."""
    wide_q, wide_k, wide_v = aligned(q, k, v)
    wide, lse = _attend_masked(wide_q, wide_k, wide_v, None, scale)
    return wide[..., : v.shape[-1]], lse


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute output and normaliser under a mask of one row, in at least float32.

    CAMKIT_SDPA in the environment names torch's kernels in the order to prefer; the attention of
    the host itself does not come here.
    """
    if torch.compiler.is_compiling():  # compiled code drops a normaliser that nobody uses
        return _attend_in_torch(q, k, v, mask, scale)
    options = {"dropout_p": 0.0, "is_causal": False, "scale": scale}
    with kernels_in_order(os.environ.get("CAMKIT_SDPA", "")):
        known = call_with_normaliser(q, k, v, mask, options)
        return _attend_in_torch(q, k, v, mask, scale) if known is None else known


def _attend_in_torch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    rounded = None if mask is None else mask.to(q.dtype)  # cuDNN misreads any other dtype
    output = F.scaled_dot_product_attention(q, k, v, rounded, scale=scale)
    return output, row_logsumexp(q.detach(), k.detach(), scale, mask)


def row_logsumexp(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Compute the log-sum-exp of each row of logits, ``(b, a, t)``, in at least float32."""
    dtype = at_least_float32(q.dtype)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    q, k = q.to(dtype), k.to(dtype)
    for rows in query_chunks(q, k):
        lse[:, :, rows] = logits_of(q, k, scale, bias, rows).logsumexp(-1)
    return lse


def logits_of(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, rows: slice) -> Tensor:
    """Compute the logits of some queries, the bias added."""
    logits = (q[:, :, rows] * scale) @ k.mT
    if bias is None:
        return logits
    return logits + (bias if bias.shape[-2] == 1 else bias[..., rows, :]).to(logits.dtype)


class Gradients:
    """Sums up the gradients at the inputs of a map, part by part."""

    def __init__(self, attention: AttentionMap) -> None:
        q, k, lse, log_weights, *_ = attention
        dtype = at_least_float32(q.dtype)
        self.attention = attention
        self.q = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
        self.k = torch.zeros_like(k, dtype=dtype, memory_format=torch.contiguous_format)
        self.lse = torch.zeros_like(lse, memory_format=torch.contiguous_format)
        self.log_weights = k.new_zeros(
            () if log_weights is None else log_weights.shape, dtype=dtype
        )

    def add(self, at_logits: Tensor, heads: slice, rows: slice, keys: slice = ALL) -> None:
        """Add the gradient at the logits of one part."""
        q, k, scale = self.attention.q, self.attention.k, self.attention.scale
        self.q[:, heads, rows] += at_logits @ k[:, heads, keys].to(self.q.dtype) * scale
        self.k[:, heads, keys] += at_logits.mT @ q[:, heads, rows].to(self.q.dtype) * scale
        if self.attention.log_weights is not None:
            to_weights = self.attention.gated(at_logits, rows).sum(2)
            if self.log_weights.dim() == 3:
                self.log_weights[:, heads, keys] += to_weights
            else:
                self.log_weights[:, keys] += to_weights.sum(1)

    def add_mean(
        self,
        skip: int,
        at_mean: Callable[[slice], Tensor],
        on_part: Callable[[Tensor, slice], None] | None = None,
    ) -> None:
        """Add a gradient at the map averaged over heads, without its first rows and columns.

        ``at_mean`` returns the gradient at some rows of the average; ``on_part`` is called with the
        attention weights of each part and its rows.
        """
        keys = slice(skip, None)
        attention = self.attention.columns(keys)
        for rows, groups in attention.parts(skip):
            own = slice(rows.start - skip, rows.stop - skip)
            gradient = at_mean(own)[:, None] / attention.q.shape[1]
            for heads in groups:
                weights = attention.part(heads, rows)
                if on_part is not None:
                    on_part(weights, own)
                at_logits = weights.mul_(gradient)
                self.lse[:, heads, rows] -= at_logits.sum(-1)
                self.add(at_logits, heads, rows, keys)

    def cast(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the sums in the dtypes of the inputs."""
        q, k, _, log_weights, *_ = self.attention
        to_weights = None if log_weights is None else self.log_weights.to(log_weights)
        return self.q.to(q.dtype), self.k.to(k.dtype), self.lse, to_weights
