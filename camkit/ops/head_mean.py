"""The attention map averaged over heads, on a CPU and without a graph: a fast way.

It agrees with the plain way, `camkit.ops.attention.head_mean`, up to the rounding of float32. The
heads of a small map are computed together. Those of a large one are computed one by one in a single
buffer, whose rows begin at multiples of 64 bytes: matrix products write them faster than rows of
577 numbers. Powers of two take half the time of exponentials, so logits are scaled by log2(e).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.ops.reweight_plain import at_least_float32, chunks

_LOG2E = math.log2(math.e)
_TOGETHER = 3 << 18  # numbers of a small map
_ALIGNED = 16  # numbers of float32 in 64 bytes
# Powers below 2 ** -126 become zero. Where the largest of a row is at least 2 ** -96, what is lost
# is less than the rounding of the row's sum.
_DEEPEST = 96.0


def mean_of_heads(
    q: Float[Tensor, "b a t d"],
    k: Float[Tensor, "b a t d"],
    normaliser: Float[Tensor, "b a t"] | None,
    *,
    scale: float,
    tokens: slice,
) -> Float[Tensor, "b r r"] | None:
    """Average an attention map without bias over heads, in at least float32.

    Args:
        q: queries of all tokens.
        k: keys.
        normaliser: log-sum-exp of each row; None computes it.
        scale: factor on the dot products.
        tokens: rows and columns to return, a slice of step 1.

    Returns:
        The average; None if this way does not take the arguments: on another device, in a graph,
        under autocast, or with logits so far apart that powers of two would be lost.
    """
    known = [each for each in (q, k, normaliser) if each is not None]
    graph = torch.is_grad_enabled() and any(each.requires_grad for each in known)
    plain = all(type(each) is Tensor and each.device.type == "cpu" for each in known)
    if graph or not plain or q.shape != k.shape or not q.numel():
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    dtype, heads = at_least_float32(q.dtype), q.shape[1]
    same = q is k
    q = q.to(dtype)
    k = q if same else k.to(dtype)
    levels = None
    if normaliser is not None:
        levels = (normaliser.to(dtype) * _LOG2E + math.log2(heads))[:, :, tokens, None]
    if heads * q.shape[2] ** 2 <= _TOGETHER:
        return _all_heads(q, k, levels, scale, tokens)
    if levels is not None:
        return _head_by_head(q[:, :, tokens], k[:, :, tokens], levels, scale)
    whole = len(range(q.shape[2])[tokens]) == q.shape[2]
    found = _of_one_set(q, scale) if same and whole else None
    levels = _upper_bounds(q, k, scale) if found is None else None
    if levels is not None:
        found = _head_by_head(q[:, :, tokens], k, levels[:, :, tokens], scale, columns=tokens)
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


def _head_by_head(
    q: Tensor, k: Tensor, levels: Tensor, scale: float, columns: slice | None = None
) -> Tensor:
    """Add up ``2 ** (logits * log2(e) - levels)``.

    With ``columns``, which are all that is returned, each row is scaled to sum to one over the
    number of heads before.
    """
    images, heads, length, _ = q.shape
    width = k.shape[2]
    kept = slice(None) if columns is None else columns
    total = q.new_zeros(images, length, len(range(width)[kept]))
    for rows in chunks(length, width, q.device):
        count = len(range(length)[rows])
        buffer = q.new_empty(count, -(-width // _ALIGNED) * _ALIGNED)[:, :width]
        for image, into in enumerate(total[:, rows]):
            for head in range(heads):
                own, others, level = q[image, head, rows], k[image, head].mT, levels[image, head]
                torch.addmm(
                    level[rows], own, others, beta=-1, alpha=scale * _LOG2E, out=buffer
                ).exp2_()
                if columns is None:
                    into.add_(buffer)
                else:
                    shares = buffer.sum(-1, keepdim=True).mul_(heads).reciprocal_()
                    into.addcmul_(buffer[:, columns], shares)
    return total


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
