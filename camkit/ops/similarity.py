"""Likeness of tokens and of colours: the cues that join attention, without a map of all pairs.

Everything is computed in at least float32, also under autocast, and comes back in the dtype of the
input: rows of half precision do not sum to one.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from camkit.ops.attention import CHUNK_ELEMENTS, take
from camkit.tensors import Tokens


def cosine_rows(
    tokens: Tokens, queries: Sequence[int], *, temperature: float
) -> Float[Tensor, "b c t"]:
    """How the tokens ``queries`` spread over all tokens by likeness; each row sums to one.

    Args:
        tokens: tokens of one block; a token of zeros is equally like all.
        queries: positions of the wanted rows, negative from the end.
        temperature: divides the cosines before the softmax; small values trust only the most alike.
    """
    check_positive("temperature", temperature)
    with _full_precision(tokens):
        directions = _directions(tokens)
        cosines = take(directions, queries, 1) @ directions.mT
        return (cosines / temperature).softmax(-1).to(tokens.dtype)


def cosine_columns(
    tokens: Tokens, keys: Sequence[int], *, temperature: float
) -> Float[Tensor, "b t c"]:
    """The share of every token's likeness that goes to each of the tokens ``keys``.

    Columns of the map of which `cosine_rows` gives rows. What is kept for the backward grows with
    the tokens, not with their pairs.

    Args:
        tokens: tokens of one block; a token of zeros is equally like all.
        keys: positions of the wanted columns, negative from the end.
        temperature: divides the cosines before the softmax; small values trust only the most alike.
    """
    check_positive("temperature", temperature)
    with _full_precision(tokens):
        directions = _directions(tokens)
        cosines = directions @ take(directions, keys, 1).mT
        normaliser: Tensor = _LogNormaliser.apply(directions, temperature)
        return (cosines / temperature - normaliser[..., None]).exp().to(tokens.dtype)


def cosine_rows_and_columns(
    tokens: Tokens, places: Sequence[int], *, temperature: float
) -> tuple[Float[Tensor, "b c t"], Float[Tensor, "b t c"]]:
    """`cosine_rows` and `cosine_columns` in one: cosines are symmetric, so one product serves both.

    Args:
        tokens: tokens of one block; a token of zeros is equally like all.
        places: positions of the rows and columns, negative from the end.
        temperature: divides the cosines before the softmax; small values trust only the most alike.
    """
    check_positive("temperature", temperature)
    with _full_precision(tokens):
        directions = _directions(tokens)
        logits = take(directions, places, 1) @ directions.mT / temperature
        normaliser: Tensor = _LogNormaliser.apply(directions, temperature)
        columns = (logits.mT - normaliser[..., None]).exp()
        return logits.softmax(-1).to(tokens.dtype), columns.to(tokens.dtype)


def cosine_smooth(
    tokens: Float[Tensor, "b n d"], values: Float[Tensor, "b n c"], *, temperature: float
) -> Float[Tensor, "b n c"]:
    """Average values over like tokens: the map of which `cosine_rows` gives rows, times values.

    Args:
        tokens: one for each row of values; a token of zeros is equally like all.
        values: c values per token.
        temperature: divides the cosines before the softmax; small values trust only the most alike.
    """
    check_positive("temperature", temperature)
    with _full_precision(tokens):
        directions = _directions(tokens)
        maps = values.shape[-1]
        width = 4 * math.ceil(max(directions.shape[-1], maps) / 4)  # as in `colour_smooth`
        q = F.pad(directions, (0, width - directions.shape[-1])).contiguous()[:, None]
        v = F.pad(values.to(q.dtype), (0, width - maps)).contiguous()[:, None]
        smooth = F.scaled_dot_product_attention(q, q, v, scale=1 / temperature)
    return smooth[:, 0, :, :maps].to(values.dtype)


def colour_smooth(
    colours: Float[Tensor, "b n 3"], values: Float[Tensor, "b n c"], *, width: float
) -> Float[Tensor, "b n c"]:
    """Average the values of patches over patches of like colour.

    Equals ``K @ values`` with K the row-softmax over j of ``-|r_i - r_j|^2 / (2 width^2)``. Softmax
    ignores ``|r_i|^2``, the same for a whole row, so the rest is one attention call with queries
    ``[r_i, 1]`` and keys ``[r_j, -|r_j|^2 / 2]``. In float32 the exponents are off by up to about
    ``1e-7 / width^2``.

    Args:
        colours: mean colour of each patch, in [0, 1]; gets no gradient.
        values: c values per patch.
        width: distance in colour at which likeness fades, a standard deviation.
    """
    check_positive("width", width)
    dtype = torch.promote_types(_wide(values.dtype), colours.dtype)
    with _full_precision(values):
        colours = colours.detach().to(dtype)
        colours = colours - colours.mean(1, keepdim=True)  # small numbers lose fewer digits
        norm = colours.square().sum(-1, keepdim=True)
        q = torch.cat([colours, torch.ones_like(norm)], -1)
        k = torch.cat([colours, norm / -2], -1)
        maps = values.shape[-1]
        # dense tensors of one width, in fours, take the fast kernels; others build the whole map
        size = 4 * math.ceil(max(4, maps) / 4)
        q, k, v = (
            F.pad(x, (0, size - x.shape[-1])).contiguous()[:, None]
            for x in (q, k, values.to(dtype))
        )
        smooth = F.scaled_dot_product_attention(q, k, v, scale=width**-2)
        return smooth[:, 0, :, :maps].to(values.dtype)


def colour_mass(colours: Float[Tensor, "b n 3"], *, width: float) -> Float[Tensor, "b n"]:
    """How many colours each is like: the sum over j of ``exp(-|r_i - r_j|^2 / (2 width^2))``.

    What `colour_smooth` divides by. At least 1, its own; gets no gradient.

    Args:
        colours: one for each token.
        width: distance in colour at which likeness fades, a standard deviation.
    """
    check_positive("width", width)
    with torch.no_grad(), _full_precision(colours):
        wide = colours.to(_wide(colours.dtype))
        scale = -0.5 / width**2
        parts = [
            (wide[:, part, None] - wide[:, None]).square().sum(-1).mul_(scale).exp_().sum(-1)
            for part in _chunks(wide)
        ]
    return torch.cat(parts, 1).to(colours.dtype)


class _LogNormaliser(torch.autograd.Function):
    """Log of each token's summed exponentials over all tokens; the backward keeps ``(t, d)``."""

    # Cosines are symmetric, which saves the backward most of its products.

    @staticmethod
    def forward(ctx: Any, directions: Tensor, temperature: float) -> Tensor:
        # a token is most like itself, so no maximum has to be looked for
        most = directions.square().sum(-1, keepdim=True) / temperature
        sharp, keys = 1 / temperature, directions.mT
        parts = [
            torch.baddbmm(most[:, part], directions[:, part], keys, beta=-1, alpha=sharp)
            .exp_()
            .sum(-1)
            for part in _chunks(directions)
        ]
        normaliser = torch.cat(parts, 1).log() + most[..., 0]
        ctx.save_for_backward(directions, normaliser)
        ctx.temperature = temperature
        return normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        directions, normaliser = ctx.saved_tensors
        parts = []
        with _full_precision(directions):
            for part in _chunks(directions):
                # one product of cosines serves tokens as queries and as keys
                logits = _logits(directions, part, ctx.temperature)
                pull = (logits - normaliser[:, part, None]).exp_().mul_(grad_output[:, part, None])
                pull += logits.sub_(normaliser[:, None]).exp_().mul_(grad_output[:, None])
                parts.append(pull @ directions)
        return torch.cat(parts, 1) / ctx.temperature, None


def _logits(directions: Tensor, part: slice, temperature: float) -> Tensor:
    return (directions[:, part] / temperature) @ directions.mT


def _chunks(directions: Tensor) -> Iterator[slice]:
    images, tokens, _ = directions.shape
    step = max(1, CHUNK_ELEMENTS // max(1, images * tokens))
    return (slice(start, start + step) for start in range(0, tokens, step))


def _directions(tokens: Tensor) -> Tensor:
    """Tokens at length one; zeros have no direction, stay zeros and get no gradient."""
    tokens = tokens.to(_wide(tokens.dtype))
    length = tokens.norm(dim=-1, keepdim=True)
    return tokens / length.masked_fill(length == 0, torch.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not positive and finite."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}")
