"""The attention operators of `camkit.ops.reweight` in plain torch, streamed, and their gradients.

Weights of one part of a map are ``exp(logits - lse)``, in at least float32. Parts are as large as a
processor likes: of small maps all heads at once, of large ones some rows of one head.

With weights A of the map, gradients G at them and the normaliser an input of its own, the gradient
at a logit is ``A * G``; that at the normaliser is minus the row sum of it.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from camkit.torch_internals import call_with_normaliser, cpu_attention_backward

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


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``(b, a, t, e)`` and normaliser ``(b, a, t)``, by one kernel where torch has one.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: added to the logits, one row for all queries, in at least float32.
        scale: factor on the dot products.
    """
    options = {"dropout_p": 0.0, "is_causal": False, "scale": scale}
    known = call_with_normaliser(q, k, v, mask, options)
    if known is not None:
        return known
    own = None if mask is None else mask.to(q.dtype)  # cuDNN misreads any other
    output = F.scaled_dot_product_attention(q, k, v, own, scale=scale)
    dtype, (images, heads, tokens, _) = wide(q.dtype), q.shape
    queries, keys = q.to(dtype), k.to(dtype)
    step = max(1, HELD // max(1, images * heads * k.shape[2]))
    found = [queries.new_empty(images, heads, 0)]
    for start in range(0, tokens, step):
        logits = queries[:, :, start : start + step] * scale @ keys.mT
        found.append((logits if mask is None else logits + mask.to(dtype)).logsumexp(-1))
    return output, torch.cat(found, 2)


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
    level = lse.masked_fill(lse == -torch.inf, 0.0)  # as the kernel itself has it
    cut = q.shape[2] if log_weights is None or gated_rows < 0 else gated_rows
    found: list[tuple[Tensor, ...]] = []
    for rows, tilt in ((slice(0, cut), log_weights), (slice(cut, None), None)):
        queries = q[:, :, rows]
        if queries.numel() == 0:
            continue
        mask = tilt if tilt is None else tilt.unsqueeze(-2).reshape(len(q), -1, 1, k.shape[2])
        given = {"out": out[:, :, rows], "logsumexp": level[:, :, rows]}
        given |= {"attn_mask": mask, "scale": scale}
        by_kernel = cpu_attention_backward(grad_out[:, :, rows], (queries, k, v), given)
        if by_kernel is None:
            return None
        found.append(by_kernel)
    to_q = torch.cat([each[0] for each in found], 2)
    to_k, to_v = (torch.stack([each[i] for each in found]).sum(0) for i in (1, 2))
    return to_q, to_k, to_v
