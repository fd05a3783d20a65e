"""Attention with a likeness of pairs of tokens in its logits, without a map of all pairs.

``softmax(scale * q k^T + f g^T)`` for features f of the queries and g of the keys is a product of
experts: a pair keeps its weight where the attention and the likeness agree. A cosine over a
temperature, a Gaussian of colours and a likeness to class embeddings are all such products of
features. Torch's own kernel attends, given the likeness of a few rows at a time as its mask; on
CUDA, few features are extra channels of queries and keys instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_variadic

from camkit.ops.extra_channels import channels_preferred
from camkit.ops.reweight_plain import ALL, at_least_float32, attend_joined, chunks, query_chunks
from camkit.printing import short_repr
from camkit.torch_internals import call_with_normaliser, cpu_attention_backward

_MOST = 40.0  # the exponential of twice that is a number of float32


@dataclass(frozen=True, eq=False)
class PairBias:
    """What is added to the logits of pairs of tokens: the products of their features.

    Attributes:
        queries: features of the tokens that attend, ``(b, t, f)`` for all heads or ``(b, a, t, f)``
            for each.
        keys: features of the tokens attended to.
        bound: no product is larger than this, in size; None if that is not known.
    """

    queries: Float[Tensor, "b t f"] | Float[Tensor, "b a t f"]
    keys: Float[Tensor, "b s f"] | Float[Tensor, "b a s f"]
    bound: float | None = None

    __repr__ = short_repr

    def __post_init__(self) -> None:
        shapes = tuple(self.queries.shape), tuple(self.keys.shape)
        alike = self.queries.dim() == self.keys.dim() and shapes[0][-1:] == shapes[1][-1:]
        if self.queries.dim() not in (3, 4) or not alike or shapes[0][:-2] != shapes[1][:-2]:
            raise ValueError(
                "`queries` and `keys` must hold features of one width, of shape (b, t, f) or "
                f"(b, a, t, f), got {shapes[0]} and {shapes[1]}"
            )

    def __add__(self, other: "PairBias") -> "PairBias":
        """Return the sum of two biases, as features side by side."""
        queries = _side_by_side(self.queries, other.queries)
        bounds = self.bound, other.bound
        bound = None if None in bounds else sum(each for each in bounds if each is not None)
        return PairBias(queries, _side_by_side(self.keys, other.keys), bound)

    def rows(self, part: slice = ALL) -> Float[Tensor, "b #a r s"]:
        """Compute the bias of some queries, in at least float32."""
        dtype = at_least_float32(self.queries.dtype)
        return self.to(dtype).products(part)

    def products(self, part: slice = ALL) -> Float[Tensor, "b #a r s"]:
        """Compute the bias of some queries in the precision of the features."""
        rows = self.queries[..., part, :] @ self.keys.mT
        return rows[:, None] if rows.dim() == 3 else rows

    def joined(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return queries and keys whose products, times ``scale``, are the logits with the bias."""
        wide = []
        for heads, features, factor in ((q, self.queries, 1 / scale), (k, self.keys, 1.0)):
            own = features[:, None] if features.dim() == 3 else features
            own = (own * factor).to(heads.dtype)
            wide.append(torch.cat([heads, own.expand(-1, heads.shape[1], -1, -1)], -1))
        return wide[0], wide[1]

    def detach(self) -> "PairBias":
        """Return the bias without its graph."""
        return PairBias(self.queries.detach(), self.keys.detach(), self.bound)

    @property
    def separable(self) -> bool:
        """Whether a map is ``exp(rows()) * exp(scale * q k^T - normaliser)`` without overflow.

        The first factor is the same for all heads then.
        """
        return self.queries.dim() == 3 and self.bound is not None and self.bound <= _MOST

    def between(self, queries: slice, keys: slice | None = None) -> "PairBias":
        """Return the bias between some tokens; without ``keys`` among them."""
        keys = queries if keys is None else keys
        return replace(self, queries=self.queries[..., queries, :], keys=self.keys[..., keys, :])

    def to(self, dtype: torch.dtype) -> "PairBias":
        """Return the bias in another precision."""
        return replace(self, queries=self.queries.to(dtype), keys=self.keys.to(dtype))

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise a ValueError if the features are not those of these tokens."""
        for name, features, heads in (("queries", self.queries, q), ("keys", self.keys, k)):
            expected = (heads.shape[0], *heads.shape[1 : features.dim() - 2], heads.shape[2])
            if tuple(features.shape[:-1]) != expected:
                raise ValueError(
                    f"`{name}` of a PairBias must hold features of shape {(*expected, 'f')} for "
                    f"this attention, got {tuple(features.shape)}"
                )


def _side_by_side(first: Tensor, second: Tensor) -> Tensor:
    """Join features, for all heads or for each."""
    parts = [first, second.to(first.dtype)]
    if first.dim() != second.dim():
        parts = [x[:, None] if x.dim() == 3 else x for x in parts]
        heads = max(x.shape[1] for x in parts)
        parts = [x.expand(-1, heads, -1, -1) for x in parts]
    return torch.cat(parts, -1)


def paired_attention(  # noqa: PLR0913 - all of one attention call
    q: Float[Tensor, "b a t d"],
    k: Float[Tensor, "b a s d"],
    v: Float[Tensor, "b a s e"],
    pairs: PairBias,
    bias: Float[Tensor, "#b #a #t s"] | None = None,
    *,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[Float[Tensor, "b a t e"], Float[Tensor, "b a t"] | None]:
    """Attend by ``softmax(scale * q k^T + pairs + bias)``.

    Gradients reach q, k, v and the features. Memory grows with the number of tokens, not of their
    pairs, in the forward and in the backward, unless ``bias`` has a row for each query itself or
    there is dropout.

    Returns:
        The output, and the log-sum-exp of each row if the kernel returned it.
    """
    if has_torch_function_variadic(q, k, v):
        seen: tuple[Tensor, Tensor | None] = handle_torch_function(
            paired_attention,
            (q, k, v),
            *(q, k, v, pairs, bias),
            scale=scale,
            dropout_p=dropout_p,
        )
        return seen
    pairs.check(q, k)
    needs_bias = bias is not None and bias.requires_grad
    if dropout_p or (needs_bias and torch.is_grad_enabled()):
        mask = _mask(pairs, bias, ALL).to(q.dtype)
        output = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, scale=scale)
        return output, None
    q, k, v = _of_one_dtype(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        if bias is None and channels_preferred(q) and pairs.queries.shape[-1] <= q.shape[-1]:
            # up to twice the products, but a kernel without mask, and its own backward
            return attend_joined(*pairs.joined(q, k, scale), v, scale)
        output, normaliser = _Paired.apply(q, k, v, pairs.queries, pairs.keys, bias, scale)
    return output, normaliser if normaliser.numel() else None


def _of_one_dtype(*heads: Tensor) -> tuple[Tensor, ...]:
    """Cast queries, keys and values as autocast would for torch's own attention."""
    device = heads[0].device.type
    if not torch.is_autocast_enabled(device) or heads[0].dtype == torch.float64:
        return heads
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in heads)


def paired_attention_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: PairBias,
    bias: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """Compute the same with the whole map: the specification of `paired_attention`."""
    logits = scale * q @ k.mT + _mask(pairs, bias, ALL)
    return logits.softmax(-1) @ v


def _mask(pairs: PairBias, bias: Tensor | None, part: slice, *, rounded: bool = False) -> Tensor:
    """Return what is added to the logits of some queries, or what is left of it in few digits."""
    rows = pairs.products(part) if rounded else pairs.rows(part)
    if bias is None:
        return rows
    return rows + (bias if bias.shape[-2] == 1 else bias[..., part, :])


def _parts(pairs: PairBias, q: Tensor, k: Tensor) -> Iterator[slice]:
    """Cut the queries so that their mask is small."""
    maps = pairs.queries.shape[:-2].numel()
    return chunks(q.shape[2], maps * k.shape[2], q.device)


class _Paired(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - all of one attention call
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        of_queries: Tensor,
        of_keys: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        pairs, options = PairBias(of_queries, of_keys), {"dropout_p": 0.0, "is_causal": False}
        outputs, normalisers = [], []
        # the mask is rounded to this precision anyway, whose products run on a GPU's tensor cores
        rounded = channels_preferred(q)
        pairs = pairs.to(q.dtype) if rounded else pairs
        for part in _parts(pairs, q, k):
            mask = _mask(pairs, bias, part, rounded=rounded).to(q.dtype)
            rows = q[:, :, part]
            known = call_with_normaliser(rows, k, v, mask, {**options, "scale": scale})
            if known is None:
                output = F.scaled_dot_product_attention(rows, k, v, mask, scale=scale)
                known = output, q.new_empty(0)
            outputs.append(known[0])
            normalisers.append(known[1])
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        whole = all(part.numel() for part in normalisers)
        normaliser = torch.cat(normalisers, -1) if whole else q.new_empty(0)
        ctx.save_for_backward(q, k, v, of_queries, of_keys, bias, output, normaliser)
        ctx.scale = scale
        ctx.mark_non_differentiable(normaliser)
        ctx.set_materialize_grads(False)
        return output, normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 7
        q, k, v, of_queries, of_keys, bias, output, normaliser = ctx.saved_tensors
        pairs = PairBias(of_queries, of_keys)
        saved = (q, k, v), pairs, bias, (output, normaliser)
        with torch.autocast(q.device.type, enabled=False):
            if not any(ctx.needs_input_grad[3:5]) and normaliser.numel():
                by_kernel = _kernel_backward(gradient, *saved, ctx.scale)
                if by_kernel is not None:
                    return (*by_kernel, None, None, None, None)
            return (*_backward(gradient, *saved, ctx.scale), None, None)


Heads = tuple[Tensor, Tensor, Tensor]


def _kernel_backward(
    gradient: Tensor,
    heads: Heads,
    pairs: PairBias,
    bias: Tensor | None,
    forward: tuple[Tensor, Tensor],
    scale: float,
) -> Heads | None:
    """Compute the gradients at q, k and v by torch's kernel, where it can be called."""
    q, k, v = heads
    to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for part in _parts(pairs, q, k):
        mask = _mask(pairs, bias, part).to(q.dtype)
        kept = forward[0][:, :, part], forward[1][:, :, part].contiguous()
        found = cpu_attention_backward(
            gradient[:, :, part], (q[:, :, part], k, v), kept, mask, scale
        )
        if found is None:
            return None
        to_q[:, :, part] = found[0]
        to_k += found[1]
        to_v += found[2]
    return to_q, to_k, to_v


def _backward(
    gradient: Tensor,
    heads: Heads,
    pairs: PairBias,
    bias: Tensor | None,
    forward: tuple[Tensor, Tensor],
    scale: float,
) -> tuple[Tensor, ...]:
    """Compute the gradients at q, k, v and the features, some rows at a time."""
    dtype = at_least_float32(heads[0].dtype)
    q, k, v = (x.to(dtype) for x in heads)
    own, other = pairs.queries.to(dtype), pairs.keys.to(dtype)
    sums = [torch.zeros_like(x) for x in (q, k, v, own, other)]
    to_q, to_k, to_v, to_own, to_other = sums
    for part in query_chunks(q, k):
        rows, at_output = q[:, :, part] * scale, gradient[:, :, part].to(dtype)
        logits = (rows @ k.mT).add_(_mask(pairs, bias, part))
        weights = logits.softmax(-1)
        if bias is not None:  # a query that may attend to no key
            none = logits.amax(-1, keepdim=True) == -torch.inf
            weights = weights.masked_fill(none, 0.0)
        to_v += weights.mT @ at_output
        level = (at_output * forward[0][:, :, part].to(dtype)).sum(-1, keepdim=True)
        at_logits = (at_output @ v.mT).sub_(level).mul_(weights)
        to_q[:, :, part] = at_logits @ k * scale
        to_k += at_logits.mT @ rows
        at_pairs = at_logits if own.dim() == 4 else at_logits.sum(1)
        to_own[..., part, :] = at_pairs @ other
        to_other += at_pairs.mT @ own[..., part, :]
    given = (*heads, pairs.queries, pairs.keys)
    return tuple(total.to(x.dtype) for total, x in zip(sums, given, strict=True))
