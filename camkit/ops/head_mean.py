"""The attention map averaged over heads, on a CPU and without a graph: a fast way.

It agrees with the plain way, `camkit.ops.attention.head_mean`, up to the rounding of float32. The
heads of a small map are computed together. Those of a large one are computed one by one in a single
buffer, whose rows begin at multiples of 64 bytes: matrix products write them faster than rows of
577 numbers. Powers of two take half the time of exponentials, so logits are scaled by log2(e).
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.ops.paired import PairBias
from camkit.ops.reweight_plain import at_least_float32, chunks

_LOG2E = math.log2(math.e)
_TOGETHER = 3 << 18  # numbers of a small map
_ALIGNED = 16  # numbers of float32 in 64 bytes
# Powers below 2 ** -126 become zero. Where the largest of a row is at least 2 ** -96, what is lost
# is less than the rounding of the row's sum.
_DEEPEST = 96.0


def mean_of_heads(  # noqa: PLR0913 - all of one attention call
    q: Float[Tensor, "b a t d"],
    k: Float[Tensor, "b a t d"],
    normaliser: Float[Tensor, "b a t"] | None,
    *,
    scale: float,
    tokens: slice,
    total: Float[Tensor, "b r r"] | None = None,
    pairs: PairBias | None = None,
) -> Float[Tensor, "b r r"] | None:
    """Average an attention map without bias over heads, in at least float32.

    Args:
        q: queries of all tokens.
        k: keys.
        normaliser: log-sum-exp of each row; None computes it.
        scale: factor on the dot products.
        tokens: rows and columns to return, a slice of step 1.
        total: the average is added to it, in place.
        pairs: added to the logits, `camkit.ops.paired.PairBias.separable`; needs the normaliser.

    Returns:
        The average, or the total; None if this way does not take the arguments: on another device,
        in a graph, under autocast, or with logits so far apart that powers of two would be lost.
    """
    known = [each for each in (q, k, normaliser, total) if each is not None]
    graph = torch.is_grad_enabled() and any(each.requires_grad for each in known)
    plain = all(type(each) is Tensor and each.device.type == "cpu" for each in known)
    if graph or not plain or q.shape != k.shape or not q.numel():
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    dtype, small = at_least_float32(q.dtype), q.shape[1] * q.shape[2] ** 2 <= _TOGETHER
    same = q is k
    q = q.to(dtype)
    k = q if same else k.to(dtype)
    if normaliser is None:
        found = _all_heads(q, k, None, scale, tokens) if small else None
        found = _of_softmax(q, k, scale, tokens, same=same) if found is None else found
        return found if found is None or total is None else total.add_(found)
    levels = (normaliser.to(dtype) * _LOG2E + math.log2(q.shape[1]))[:, :, tokens, None]
    features = None if pairs is None else pairs.between(tokens).to(dtype)
    if small:
        found = _all_heads(q, k, levels, scale, tokens)
        if features is not None:
            found *= features.rows()[:, 0].exp_()
        return found if total is None else total.add_(found)
    q, k = q[:, :, tokens], k[:, :, tokens]
    if total is None:
        total = q.new_zeros(len(q), q.shape[2], q.shape[2])
    return _add_head_by_head(total, q, k, levels, scale, features)


def _of_softmax(q: Tensor, k: Tensor, scale: float, tokens: slice, *, same: bool) -> Tensor | None:
    whole = len(range(q.shape[2])[tokens]) == q.shape[2]
    found = _of_one_set(q, scale) if same and whole else None
    levels = _upper_bounds(q, k, scale) if found is None else None
    if levels is not None:
        found = _scaled_rows(q[:, :, tokens], k, levels[:, :, tokens], scale, columns=tokens)
    return found


def _all_heads(q: Tensor, k: Tensor, levels: Tensor | None, scale: float, tokens: slice) -> Tensor:
    images, heads, length, _ = q[:, :, tokens].shape
    total = q.new_empty(images, length, length)
    keys = k if levels is None else k[:, :, tokens]
    buffer = q.new_empty(heads, length, keys.shape[2])
    for image, into in enumerate(total):
        own, others = q[image, :, tokens], keys[image].mT
        if levels is None:
            torch.softmax(torch.bmm(own * scale, others, out=buffer), -1, out=buffer)
            torch.mean(buffer[:, :, tokens], 0, out=into)
        else:
            torch.baddbmm(
                levels[image], own, others, beta=-1, alpha=scale * _LOG2E, out=buffer
            ).exp2_()
            torch.sum(buffer, 0, out=into)
    return total


def _add_head_by_head(
    total: Tensor, q: Tensor, k: Tensor, levels: Tensor, scale: float, pairs: PairBias | None
) -> Tensor:
    """Add ``2 ** (logits * log2(e) - levels)`` of all heads to ``total``, in parts."""
    length = q.shape[2]
    for rows, buffer in _buffers(q, length):
        for image, into in enumerate(total[:, rows]):
            of_image = into if pairs is None else torch.zeros_like(into)
            for head in range(q.shape[1]):
                own, level = q[image, head, rows], levels[image, head, rows]
                of_image.add_(_powers(own, k[image, head], level, scale, buffer))
            if pairs is not None:  # all heads have the same factor
                features = pairs.queries[image, rows], pairs.keys[image].mT
                into.addcmul_(of_image, torch.mm(*features, out=buffer).exp_())
    return total


def _scaled_rows(q: Tensor, k: Tensor, levels: Tensor, scale: float, columns: slice) -> Tensor:
    """Average rows that are each scaled to sum to one; only ``columns`` are returned."""
    images, heads, length, _ = q.shape
    width = k.shape[2]
    total = q.new_zeros(images, length, len(range(width)[columns]))
    for rows, buffer in _buffers(q, width):
        for image, into in enumerate(total[:, rows]):
            for head in range(heads):
                own, level = q[image, head, rows], levels[image, head, rows]
                _powers(own, k[image, head], level, scale, buffer)
                shares = buffer.sum(-1, keepdim=True).mul_(heads).reciprocal_()
                into.addcmul_(buffer[:, columns], shares)
    return total


def _buffers(q: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut the queries into parts, each with a buffer for its rows of one map."""
    for rows in chunks(q.shape[2], width, q.device):
        count = len(range(q.shape[2])[rows])
        yield rows, q.new_empty(count, -(-width // _ALIGNED) * _ALIGNED)[:, :width]


def _powers(q: Tensor, k: Tensor, levels: Tensor, scale: float, buffer: Tensor) -> Tensor:
    torch.addmm(levels, q, k.mT, beta=-1, alpha=scale * _LOG2E, out=buffer)
    return buffer.exp2_()


def _of_one_set(q: Tensor, scale: float) -> Tensor | None:
    """Average the maps of tokens that attend to themselves, whose logits are symmetric.

    The lower left quarter of the powers is the upper right one, transposed. All logits are reduced
    by the largest of the head, because a reduction by row would break the symmetry.

    Returns:
        The average; None if the logits of a row may lie so far below that its powers are lost, or
        if a map is large, so that it is better computed by rows.
    """
    images, heads, length, _ = q.shape
    own = q.square().sum(-1) * (scale * _LOG2E)
    highest = own.amax(-1)
    deepest = highest - own.amin(-1)
    large = next(chunks(length, length, q.device)).stop < length
    if scale < 0 or large or bool(deepest.amax() > _DEEPEST):
        return None
    half = length // 2 // _ALIGNED * _ALIGNED
    first, last = slice(None, half), slice(half, None)
    total = q.new_zeros(images, length, length)
    mirrored = q.new_zeros(half, length - half)
    pairs = ((first, first), (first, last), (last, last))
    parts = [q.new_empty(len(range(length)[a]), len(range(length)[b])) for a, b in pairs]
    for image, into in enumerate(total):
        mirrored.zero_()
        for head in range(heads):
            tokens, level = q[image, head], highest[image, head]
            for (rows, columns), part in zip(pairs, parts, strict=True):
                torch.addmm(
                    level, tokens[rows], tokens[columns].mT,
                    beta=-1, alpha=scale * _LOG2E, out=part,
                ).exp2_()  # fmt: skip
            corner, side, rest = parts
            upper = (corner.sum(1) + side.sum(1)).mul_(heads).reciprocal_()
            lower = (side.sum(0) + rest.sum(1)).mul_(heads).reciprocal_()
            into[first, first].addcmul_(corner, upper[:, None])
            into[first, last].addcmul_(side, upper[:, None])
            into[last, last].addcmul_(rest, lower[:, None])
            mirrored.addcmul_(side, lower)
        into[last, first] = mirrored.mT
    return total


def _upper_bounds(q: Tensor, k: Tensor, scale: float) -> Tensor | None:
    """Return a bound of each row's logits, scaled by log2(e), ``(b, a, t, 1)``.

    Returns None if the largest logit of a row may lie so far below that its power is lost.
    """
    own = (q * k).sum(-1, keepdim=True)  # the row's largest logit is at least this
    squares = [own, own] if q is k else [each.square().sum(-1, keepdim=True) for each in (q, k)]
    longest = squares[1].amax(2, keepdim=True)
    bounds = (squares[0] * longest).sqrt_()
    if scale < 0:
        own = own.neg()
    deepest = (bounds - own).amax() * (abs(scale) * _LOG2E)
    return bounds * (abs(scale) * _LOG2E) if bool(deepest <= _DEEPEST) else None
