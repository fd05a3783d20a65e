"""The attention operators of `camkit.ops.reweight` in plain torch, streamed so that no map is held.

Weights of one part of a map are ``exp(logits - lse)``, in at least float32. Parts are as large as a
processor likes: of small maps all heads at once, of large ones some rows of one head.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from camkit.ops.fused import attend

# Elements of a part. On a CPU all heads together are faster up to the first, and rows of a head
# stay in the cache up to the second; a GPU wants few and large parts.
TOGETHER = 1 << 17
HELD = 1 << 20
HELD_ON_DEVICE = 1 << 26


def reweighted_attention(  # noqa: PLR0913 - as declared
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
    class_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normaliser and first rows, in torch's own kernels."""
    out, lse = _attend_tilted(q, k, v, log_weights, scale, gated_rows)
    if log_weights is not None:
        out, lse = _nothing_from_nothing(out, lse, log_weights, gated_rows)
    first = slice(0, class_rows)
    rows = part(q, k, lse, log_weights, scale, gated_rows, slice(None), first)
    # a kernel of half precision knows its normaliser to four digits
    rows = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous(), rows.contiguous()


def class_columns(  # noqa: PLR0913 - as declared
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
    columns: int,
) -> Tensor:
    """The first columns of the map."""
    weights = None if log_weights is None else log_weights[..., :columns]
    keys = k[:, :, :columns]
    return part(q, keys, lse, weights, scale, gated_rows, slice(None), slice(None)).contiguous()


def affinity_mean(  # noqa: PLR0913 - as declared
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
    skip: int,
) -> Tensor:
    """The map averaged over heads."""
    found = lse.new_empty(len(q), q.shape[2] - skip, k.shape[2] - skip)
    affinity_mean_(found, q, k, lse, log_weights, scale, gated_rows, skip, 1.0, 0.0)
    return found


def affinity_mean_(  # noqa: PLR0913 - as declared
    affinity: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
    skip: int,
    alpha: float,
    beta: float,
) -> None:
    """The same, added to what is there; what is multiplied by zero is not read."""
    share = alpha / q.shape[1]
    weights = None if log_weights is None else log_weights[..., skip:]
    keys = k[:, :, skip:]
    for rows, groups in parts(q, keys, skip):
        into = affinity[:, slice(rows.start - skip, rows.stop - skip)]
        into = into.zero_() if beta == 0.0 else into.mul_(beta)
        for heads in groups:
            found = part(q, keys, lse, weights, scale, gated_rows, heads, rows)
            into.add_(found[:, 0] if found.shape[1] == 1 else found.sum(1), alpha=share)


def propagate_mean(  # noqa: PLR0913 - as declared
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cam: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
    skip: int,
) -> Tensor:
    """Maps carried along the mean map, some of its rows at a time."""
    if q.device.type == "cpu" and q.dtype == cam.dtype and cam.shape[1] <= q.shape[-1]:
        # maps in place of the values of torch's own kernel, which must not be wider nor rounded
        rider = F.pad(cam.mT, (0, q.shape[-1] - cam.shape[1], skip, 0))[:, None]
        rider = rider.expand(-1, q.shape[1], -1, -1)
        carried, level = _attend_tilted(q, k, rider, log_weights, scale, gated_rows)
        if log_weights is not None:
            carried, _ = _nothing_from_nothing(carried, level, log_weights, gated_rows)
        return carried[:, :, skip:, : cam.shape[1]].mean(1).mT.contiguous()
    weights = None if log_weights is None else log_weights[..., skip:]
    keys, values = k[:, :, skip:], cam.to(lse.dtype).mT
    spread = [cam.new_empty(*cam.shape[:2], 0, dtype=lse.dtype)]
    for rows, groups in parts(q, keys, skip):
        total = lse.new_zeros(())
        for heads in groups:
            found = part(q, keys, lse, weights, scale, gated_rows, heads, rows).sum(1)
            total = found if total.dim() == 0 else total.add_(found)
        spread.append((total @ values).mT / q.shape[1])
    return torch.cat(spread, 2).to(cam.dtype)


def part(  # noqa: PLR0913 - all of one attention call
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    log_weights: Tensor | None,
    scale: float,
    gated_rows: int,
    heads: slice,
    rows: slice,
) -> Tensor:
    """Attention weights of some heads and rows, ``(b, a, r, s)``, given their normaliser."""
    dtype = wide(q.dtype)
    queries, keys = q[:, heads, rows].to(dtype), k[:, heads].to(dtype)
    level = lse[:, heads, rows, None].to(dtype).clamp_min(torch.finfo(dtype).min)
    if queries.shape[1] == 1:  # one product that subtracts the normaliser as it goes
        logits = torch.baddbmm(level[:, 0], queries[:, 0], keys[:, 0].mT, beta=-1, alpha=scale)[
            :, None
        ]
    else:
        logits = (queries * scale @ keys.mT).sub_(level)
    if log_weights is not None:
        tilt = log_weights[:, None, None] if log_weights.dim() == 2 else log_weights[:, heads, None]
        start = rows.indices(q.shape[2])[0]
        gated = logits if gated_rows < 0 else logits[:, :, : max(0, gated_rows - start)]
        gated += tilt
    return logits.exp_()


def parts(q: Tensor, k: Tensor, skip: int = 0) -> Iterator[tuple[slice, list[slice]]]:
    """Rows, and groups of heads, whose weights are held at a time."""
    images, count, tokens, _ = q.shape
    of_head = max(1, images * (tokens - skip) * k.shape[2])
    together, held = (HELD_ON_DEVICE,) * 2 if q.device.type != "cpu" else (TOGETHER, HELD)
    step = max(1, together // of_head)
    groups = [slice(head, min(head + step, count)) for head in range(0, count, step)]
    length = max(1, held // max(1, images * k.shape[2]))
    for start in range(skip, tokens, length):
        yield slice(start, min(start + length, tokens)), groups


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: rows of half precision do not sum to one."""
    return torch.promote_types(dtype, torch.float32)


def _attend_tilted(
    q: Tensor, k: Tensor, v: Tensor, log_weights: Tensor | None, scale: float, gated_rows: int
) -> tuple[Tensor, Tensor]:
    if log_weights is None or gated_rows == 0:
        return attend(q, k, v, None, scale)
    mask = log_weights[:, None, None] if log_weights.dim() == 2 else log_weights[:, :, None]
    if not 0 <= gated_rows < q.shape[2]:
        return attend(q, k, v, mask, scale)
    # two calls with no mask or one row of it; one call would need a mask of all pairs
    tilted = attend(q[:, :, :gated_rows], k, v, mask, scale)
    others = attend(q[:, :, gated_rows:], k, v, None, scale)
    return torch.cat([tilted[0], others[0]], 2), torch.cat([tilted[1], others[1]], 2)


def _nothing_from_nothing(
    out: Tensor, lse: Tensor, log_weights: Tensor, gated_rows: int
) -> tuple[Tensor, Tensor]:
    """Where every key is suppressed, nothing comes out; torch's kernels say so in several ways."""
    empty = (log_weights == -torch.inf).all(-1)
    empty = empty[:, None, None] if empty.dim() == 1 else empty[:, :, None]
    if gated_rows >= 0:
        empty = empty & (torch.arange(out.shape[2], device=out.device) < gated_rows)
    return out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
