"""Chosen rows and columns of an attention map, computed from q and k without the whole map.

Softmax is computed in at least float32, also under autocast.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from camkit.ops import reweight
from camkit.ops.extra_channels import channels_preferred
from camkit.ops.head_mean import mean_of_heads
from camkit.ops.paired import PairBias
from camkit.ops.reweight import Heads as Heads, LogWeights, Normaliser as Normaliser
from camkit.ops.reweight_plain import (
    ALL,
    at_least_float32,
    attend,
    logits_of,
    query_chunks,
    row_logsumexp,
)
from camkit.printing import short_repr

Keys = Float[Tensor, "b a s d"]
Bias = Float[Tensor, "#b #a #t s"]


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What the map of one attention call is computed from, as the host's attention used it.

    Attributes:
        q: queries of all tokens, after norms and rotations.
        k: keys.
        scale: factor on the dot products.
        bias: added to the logits, broadcast over images, heads and queries; a masked key holds
            -inf.
        normaliser: log-sum-exp of each row, if the kernel that ran returned it. Then a weight is
            one exponential, and no other logits are computed.
        pairs: also added to the logits. Features that all heads share multiply a map, averaged or
            not, by one exponential for all heads; they become channels only where gradients need
            it.
    """

    q: Heads
    k: Keys
    scale: float
    bias: Bias | None = None
    normaliser: Normaliser | None = None
    pairs: PairBias | None = None

    __repr__ = short_repr

    def joined(self) -> "AttentionInputs":
        """Return the call with the bias of pairs as further channels."""
        if self.pairs is None:
            return self
        q, k = self.pairs.joined(self.q, self.k, self.scale)
        return replace(self, q=q, k=k, pairs=None)

    def has_graph(self, *others: Tensor | None) -> bool:
        """Whether gradients are asked for."""
        features = () if self.pairs is None else (self.pairs.queries, self.pairs.keys)
        every = (*others, self.q, self.k, self.bias, self.normaliser, *features)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in every)

    @property
    def is_square(self) -> bool:
        """Whether tokens attend to themselves, as far as sizes tell."""
        return self.q.shape[2] == self.k.shape[2]


def attention_rows(call: AttentionInputs, queries: Sequence[int]) -> Float[Tensor, "b a c s"]:
    """Return the attention of the tokens at positions ``queries``, one softmax row each."""
    q, pairs = call.q, call.pairs
    if call.normaliser is not None and run_of(queries, q.shape[2]) == range(len(queries)):
        found = _first_rows_and_columns(call, len(queries), 0)
        if found is not None:
            return found[0].to(q.dtype)
    added = rows_of(call.bias, queries)
    if pairs is not None:
        own = take(pairs.queries, queries, pairs.queries.dim() - 2)
        more = PairBias(own, pairs.keys).rows()
        added = more if added is None else added + more
    return _softmax(take(q, queries, 2), call.k, call.scale, added).to(q.dtype)


def attention_columns(call: AttentionInputs, keys: Sequence[int]) -> Float[Tensor, "b a t c"]:
    """Return how much every token attends to the tokens at positions ``keys``, per head.

    Streamed over the queries, forward and backward.
    """
    dtype = call.q.dtype
    if call.normaliser is None or call.has_graph():
        call = call.joined()
    if run_of(keys, call.k.shape[2]) == range(len(keys)):
        found = _first_rows_and_columns(call, 0, len(keys))
        if found is not None:
            return found[1].to(dtype)
    return _columns_at(call, keys).to(dtype)


def rows_and_columns(
    call: AttentionInputs, tokens: Sequence[int]
) -> tuple[Float[Tensor, "b a c s"], Float[Tensor, "b a t c"]]:
    """Return what the first tokens attend to, and how much all attend to them, in one pass.

    Both are in at least float32, unless ``tokens`` are not the first ones or the normaliser is
    unknown: then they are computed one after the other.
    """
    if run_of(tokens, call.k.shape[2]) == range(len(tokens)):
        found = _first_rows_and_columns(call, len(tokens), len(tokens))
        if found is not None:
            return found
    rows = attention_rows(replace(call, normaliser=None), tokens)
    return rows, attention_columns(call, tokens)


def _first_rows_and_columns(
    call: AttentionInputs, rows: int, columns: int
) -> tuple[Tensor, Tensor] | None:
    """Compute the first rows and columns by one operator; None if it does not take the call."""
    pairs = call.pairs
    if not call.is_square or (pairs is not None and (call.has_graph() or not pairs.separable)):
        return None
    with torch.autocast(call.q.device.type, enabled=False):
        inputs = operator_inputs(call)
        if inputs is None:
            return None
        of_rows, of_columns = reweight.rows_and_columns(
            call.q, call.k, *inputs, rows=rows, columns=columns, scale=call.scale
        )
        if pairs is None:
            return of_rows, of_columns
        if rows:  # plain torch has scaled them to sum to one without the bias
            of_rows = of_rows.mul_(pairs.between(slice(rows), ALL).rows().exp_())
            of_rows = of_rows.div_(of_rows.sum(-1, keepdim=True))
        if columns:
            of_columns = of_columns.mul_(pairs.between(ALL, slice(columns)).rows().exp_())
        return of_rows, of_columns


def _columns_at(call: AttentionInputs, keys: Sequence[int]) -> Tensor:
    """Compute columns of any tokens."""
    pairs, dtype = call.pairs, at_least_float32(call.q.dtype)
    with torch.autocast(call.q.device.type, enabled=False):
        added = None if call.bias is None else take(call.bias, keys, 3)
        if pairs is not None:
            other = take(pairs.keys, keys, pairs.keys.dim() - 2)
            more = PairBias(pairs.queries, other).rows()
            added = more if added is None else added + more
        chosen = take(call.k.to(dtype), keys, 2)
        logits = logits_of(call.q.to(dtype), chosen, call.scale, added, ALL)
        lse = log_normaliser(call)[..., None]
        return (logits - lse.clamp_min(torch.finfo(dtype).min)).exp()


def head_mean(call: AttentionInputs, tokens: Sequence[int] | None = None) -> Float[Tensor, "b _ _"]:
    """Return the attention map averaged over heads, whole or between ``tokens``."""
    return add_head_mean(None, call, tokens).to(call.q.dtype)


def add_head_mean(
    total: Float[Tensor, "b _ _"] | None,
    call: AttentionInputs,
    tokens: Sequence[int] | None = None,
) -> Float[Tensor, "b _ _"]:
    """Return ``total + head_mean(...)`` in at least float32; None begins a sum.

    Without a graph, ``total`` is written in place, and no other map is held: this adds up the maps
    of many blocks.
    """
    graph, pairs, count = call.has_graph(total), call.pairs, call.q.shape[2]
    if pairs is not None and (graph or call.normaliser is None or not pairs.separable):
        call = call.joined()
    run = range(count) if tokens is None else run_of(tokens, count)
    if run is None:
        found = add_head_mean(None, call)
    else:
        added = _add_run(total, call, run, graph=graph)
        if added is not None:
            return added
        found = _mean_one_by_one(call.joined())
    if tokens is not None:
        found = take(take(found, tokens, 1), tokens, 2)
    if total is None:
        return found
    return total + found if graph else total.add_(found)


def _add_run(
    total: Tensor | None, call: AttentionInputs, run: range, *, graph: bool
) -> Tensor | None:
    """Return what `add_head_mean` returns for consecutive tokens; None if there is no fast way."""
    within = slice(run.start, run.stop)
    if call.bias is None and call.is_square:
        found = mean_of_heads(
            *(call.q, call.k, call.normaliser),
            scale=call.scale,
            tokens=within,
            total=total,
            pairs=call.pairs,
        )
        if found is not None:
            return found
    with torch.autocast(call.q.device.type, enabled=False):
        if not graph:
            call = _with_normaliser(call)
        inputs = operator_inputs(call)
        if inputs is None or (len(run) < call.q.shape[2] and not call.is_square):
            return None
        q, k, (lse, weights) = call.q, call.k, inputs
        if call.is_square:  # what lies behind the run is not read
            q, k, lse = (x[:, :, : run.stop] for x in (q, k, lse))
            weights = None if weights is None else weights[..., : run.stop]
        options: dict[str, Any] = {"scale": call.scale, "skip": run.start}
        if total is not None and not graph and call.pairs is None:
            reweight.add_affinity_(total, q, k, lse, weights, **options)
            return total
        mean = reweight.affinity_mean(q, k, lse, weights, **options)
        if call.pairs is None:
            return mean if total is None else total + mean
        factors = call.pairs.between(within).rows()[:, 0].exp_()
        return mean.mul_(factors) if total is None else total.addcmul_(mean, factors)


def _with_normaliser(call: AttentionInputs) -> AttentionInputs:
    """Return the call with its normaliser, where torch's kernel has it sooner than a softmax."""
    if call.normaliser is not None or call.bias is not None or not channels_preferred(call.q):
        return call
    return replace(call, normaliser=attend(call.q, call.k, call.k, None, call.scale, -1)[1])


def _mean_one_by_one(call: AttentionInputs) -> Tensor:
    q, k, bias = call.q, call.k, call.bias
    total = q.new_zeros(len(q), q.shape[2], k.shape[2], dtype=at_least_float32(q.dtype))
    for head in range(q.shape[1]):
        only = slice(head, head + 1)
        of_head = bias if bias is None or bias.shape[1] == 1 else bias[:, only]
        total = total + _softmax(q[:, only], k[:, only], call.scale, of_head)[:, 0]
    return total / q.shape[1]


def relevance_hop(
    relevance: Float[Tensor, "b t"],
    call: AttentionInputs,
    v: Float[Tensor, "b a s e"],
    grad_output: Float[Tensor, "b a t e"],
) -> Float[Tensor, "b s"]:
    """Propagate token relevance one block down, along attention weighted by its own gradient.

    Computes ``relevance @ mean over heads of relu(A * dA)`` (Chefer et al. 2021, generic attention
    explainability), with ``grad_output`` the gradient of the class score at ``A @ v``. The gradient
    of the attention map needs no map: dA[i, j] is the product of the output gradient at i with the
    value at j. ``v`` are the values of all tokens.
    """
    call = call.joined()
    q, k = call.q, call.k
    propagated = relevance.new_zeros(len(relevance), k.shape[2])
    for part in query_chunks(q, k):
        attention = _softmax(q, k, call.scale, call.bias, part)
        gradient = grad_output[:, :, part].to(attention.dtype) @ v.mT.to(attention.dtype)
        weighted = (attention * gradient).relu_().mean(1)
        own = relevance[:, part].to(weighted.dtype)
        propagated = propagated + torch.einsum("bi,bij->bj", own, weighted)
    return propagated.to(relevance.dtype)


def operator_inputs(call: AttentionInputs) -> tuple[Normaliser, LogWeights | None] | None:
    """Return the normaliser and the log-weights of the keys that `camkit.ops.reweight` takes.

    Returns None if the normaliser is unknown or the bias differs between queries.
    """
    if call.normaliser is None:
        return None
    weights, bias = None, call.bias
    if bias is not None:
        if bias.shape[-2] != 1 or bias.shape[-1] != call.q.shape[2]:
            return None
        weights = bias[..., 0, :].expand(*call.q.shape[:2], -1)
    return log_normaliser(call), weights


def log_normaliser(call: AttentionInputs) -> Normaliser:
    """Return the log-sum-exp of each query's logits over all keys, in at least float32.

    Pairs are left out unless the call has a normaliser. Unless the bias needs a gradient, the
    memory kept for the backward grows with the number of tokens, not of their pairs. If the call
    has a normaliser, only the backward computes anything.
    """
    q, k, scale, bias, known = call.q, call.k, call.scale, call.bias, call.normaliser
    dtype, has_gradient = at_least_float32(q.dtype), torch.is_grad_enabled()
    if has_gradient and bias is not None and bias.requires_grad:
        return (scale * q.to(dtype) @ k.to(dtype).mT + bias).logsumexp(-1)
    if known is not None and not (has_gradient and (q.requires_grad or k.requires_grad)):
        return known.to(dtype)
    result: Tensor = _LogNormaliser.apply(q.to(dtype), k.to(dtype), scale, bias, known)
    return result


class _LogNormaliser(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: float, bias: Tensor | None, known: Tensor | None
    ) -> Tensor:
        lse = row_logsumexp(q, k, scale, bias) if known is None else known.to(q.dtype).clone()
        ctx.save_for_backward(q, k, bias, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, bias, lse = ctx.saved_tensors
        to_q, to_k = torch.zeros_like(q), torch.zeros_like(k)
        with torch.autocast(q.device.type, enabled=False):
            for part in query_chunks(q, k):
                # a query that may attend to no key has a normaliser of -inf and no gradient
                level = lse[:, :, part, None].clamp_min(torch.finfo(q.dtype).min)
                weights = logits_of(q, k, ctx.scale, bias, part).sub_(level).exp_()
                weights.mul_(grad_output[:, :, part, None])
                to_k += weights.mT @ q[:, :, part]
                to_q[:, :, part] = weights @ k
        return to_q * ctx.scale, to_k * ctx.scale, None, None, None


def take(tensor: Tensor, places: Sequence[int], axis: int) -> Tensor:
    """Select positions along one axis, negative from the end: a view if they are consecutive.

    Indexing with a list would send an index to the device each time, which waits for the device and
    cannot be part of a CUDA graph.
    """
    size = tensor.shape[axis]
    run = run_of(places, size)
    if run is not None:
        return tensor.narrow(axis, run.start, len(run))
    outside = [place for place in places if not -size <= place < size]
    if outside:
        raise IndexError(f"positions must lie within the {size} tokens, got {outside}")
    index = torch.tensor([place % size for place in places], device=tensor.device)
    return tensor.index_select(axis, index)


def run_of(places: Sequence[int], size: int) -> range | None:
    """Return consecutive positions as a range; None if they are not consecutive."""
    if not places:
        return range(0)
    positions = [place + size if place < 0 else place for place in places]
    run = range(positions[0], positions[0] + len(positions))
    return run if run.start >= 0 and run.stop <= size and positions == list(run) else None


def rows_of(bias: Tensor | None, queries: Sequence[int]) -> Tensor | None:
    """Return the part of a bias that belongs to some queries."""
    return bias if bias is None or bias.shape[-2] == 1 else take(bias, queries, bias.dim() - 2)


def _softmax(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, rows: slice = ALL) -> Tensor:
    """Compute rows of the map; a row without any key is zero, as in torch's kernels."""
    dtype = at_least_float32(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        logits = logits_of(q.to(dtype), k.to(dtype), scale, bias, rows)
        if bias is None:
            return logits.softmax(-1)
        no_key = logits.detach().amax(-1, keepdim=True) == -torch.inf
        return logits.softmax(-1).masked_fill(no_key, 0.0)
