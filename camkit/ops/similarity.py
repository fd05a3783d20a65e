"""Similarity of tokens and of colours, without a map of all pairs.

Everything is computed in at least float32, also under autocast, and returned in the dtype of the
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

from camkit.ops.attention import take
from camkit.ops.reweight_plain import at_least_float32, chunks
from camkit.tensors import Tokens


def cosine_rows_and_columns(
    tokens: Tokens, positions: Sequence[int], *, temperature: float
) -> tuple[Float[Tensor, "b c t"], Float[Tensor, "b t c"]]:
    """Return rows and columns of the softmax over cosine similarities of tokens.

    The rows say how the tokens at ``positions`` spread over all tokens; each row sums to one.
    The columns say which share of every token's similarity goes to each of them. Cosines are
    symmetric, so one product serves both. Memory kept for the backward grows with the number of
    tokens, not of their pairs.

    Args:
        tokens: of one block; a token of zeros is equally similar to all.
        positions: of the rows and columns among the tokens, negative from the end.
        temperature: divides the cosines before the softmax; small values keep only the most
            similar.
    """
    check_positive("temperature", temperature)
    with torch.autocast(tokens.device.type, enabled=False):
        directions = unit_length(tokens)
        logits = take(directions, positions, 1) @ directions.mT / temperature
        lse: Tensor = _CosineLogSumExp.apply(directions, temperature)
        columns = (logits.mT - lse[..., None]).exp()
        return logits.softmax(-1).to(tokens.dtype), columns.to(tokens.dtype)


def cosine_smooth(
    tokens: Float[Tensor, "b n d"], values: Float[Tensor, "b n c"], *, temperature: float
) -> Float[Tensor, "b n c"]:
    """Average values over similar tokens: the softmax over cosine similarities, times the values.

    Each token has c values; `cosine_rows_and_columns` explains the other arguments.
    """
    check_positive("temperature", temperature)
    with torch.autocast(tokens.device.type, enabled=False):
        directions = unit_length(tokens)
        return _attend(directions, directions, values, 1 / temperature)


def colour_smooth(
    colours: Float[Tensor, "b n 3"], values: Float[Tensor, "b n c"], *, width: float
) -> Float[Tensor, "b n c"]:
    """Average the values of patches over patches of similar colour.

    Equals ``K @ values`` with K the row-softmax over j of ``-|r_i - r_j|^2 / (2 width^2)``. Softmax
    ignores ``|r_i|^2``, which is the same for a whole row, so the rest is one attention call with
    queries ``[r_i, 1]`` and keys ``[r_j, -|r_j|^2 / 2]``. In float32 the exponents are off by up to
    about ``1e-7 / width^2``.

    Args:
        colours: mean colour of each patch, in [0, 1]; gets no gradient.
        values: c values per patch.
        width: distance in colour at which similarity fades, a standard deviation.
    """
    check_positive("width", width)
    dtype = torch.promote_types(at_least_float32(values.dtype), colours.dtype)
    with torch.autocast(values.device.type, enabled=False):
        colours = colours.detach().to(dtype)
        colours = colours - colours.mean(1, keepdim=True)  # small numbers lose fewer digits
        norm = colours.square().sum(-1, keepdim=True)
        q = torch.cat([colours, torch.ones_like(norm)], -1)
        k = torch.cat([colours, norm / -2], -1)
        return _attend(q, k, values, width**-2)


def colour_mass(colours: Float[Tensor, "b n 3"], *, width: float) -> Float[Tensor, "b n"]:
    """Sum up the similarity of each colour to all: ``exp(-|r_i - r_j|^2 / (2 width^2))`` over j.

    `colour_smooth` divides by this mass, which is at least 1 (a colour's similarity to itself). It
    gets no gradient.
    """
    check_positive("width", width)
    with torch.no_grad(), torch.autocast(colours.device.type, enabled=False):
        wide = colours.to(at_least_float32(colours.dtype))
        scale, (images, tokens, channels) = -0.5 / width**2, wide.shape
        parts = [
            (wide[:, part, None] - wide[:, None]).square().sum(-1).mul_(scale).exp_().sum(-1)
            for part in chunks(tokens, images * tokens * channels, wide.device)
        ]
    return torch.cat(parts, 1).to(colours.dtype)


class _CosineLogSumExp(torch.autograd.Function):
    """Log of the summed exponentials of each token's cosines; the backward keeps ``(t, d)``."""

    @staticmethod
    def forward(ctx: Any, directions: Tensor, temperature: float) -> Tensor:
        # a token is most similar to itself, so the maximum of each row is known
        largest = directions.square().sum(-1, keepdim=True) / temperature
        keys, factor = directions.mT, 1 / temperature
        parts = [
            torch.baddbmm(largest[:, part], directions[:, part], keys, beta=-1, alpha=factor)
            .exp_()
            .sum(-1)
            for part in _token_chunks(directions)
        ]
        lse = torch.cat(parts, 1).log() + largest[..., 0]
        ctx.save_for_backward(directions, lse)
        ctx.temperature = temperature
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        directions, lse = ctx.saved_tensors
        parts = []
        with torch.autocast(directions.device.type, enabled=False):
            for part in _token_chunks(directions):
                # one product of cosines serves tokens as queries and as keys
                logits = (directions[:, part] / ctx.temperature) @ directions.mT
                weights = (logits - lse[:, part, None]).exp_().mul_(grad_output[:, part, None])
                weights += logits.sub_(lse[:, None]).exp_().mul_(grad_output[:, None])
                parts.append(weights @ directions)
        return torch.cat(parts, 1) / ctx.temperature, None


def _token_chunks(directions: Tensor) -> Iterator[slice]:
    images, tokens, _ = directions.shape
    return chunks(tokens, images * tokens, directions.device)


def _attend(q: Tensor, k: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend with one head, in the dtype of the queries."""
    maps = values.shape[-1]
    # dense tensors of one width, a multiple of four, get fast kernels; others build the whole map
    width = 4 * math.ceil(max(q.shape[-1], maps) / 4)
    q, k, v = (
        F.pad(x, (0, width - x.shape[-1])).contiguous()[:, None] for x in (q, k, values.to(q.dtype))
    )
    smooth = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return smooth[:, 0, :, :maps].to(values.dtype)


def unit_length(tokens: Tensor) -> Tensor:
    """Scale tokens to length one; zeros have no direction, stay zeros and get no gradient."""
    tokens = tokens.to(at_least_float32(tokens.dtype))
    length = tokens.norm(dim=-1, keepdim=True)
    return tokens / length.masked_fill(length == 0, torch.inf)


def check_positive(name: str, value: float) -> None:
    """Raise a ValueError if a setting is zero, negative, infinite or NaN."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}")


def check_shape(
    name: str, tensor: Tensor, expected: tuple[int, ...], reference: str, advice: str = ""
) -> None:
    """Raise a ValueError if an argument has another shape than expected.

    ``reference`` says what the shape follows from, such as "to match `maps`".
    """
    if tensor.shape != expected:
        wanted, given = ("x".join(map(str, shape)) for shape in (expected, tensor.shape))
        text = f"`{name}` must be {wanted} {reference}, got {given}"
        raise ValueError(f"{text}; {advice}" if advice else text)
