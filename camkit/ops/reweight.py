"""Attention with weights on its keys, and results read off its map, one call each.

Multiplying attention weights by ``w`` and scaling every row back to sum to one is the same as
adding ``log w`` to the logits, so reweighted attention is a fused kernel with one more number per
key. Such a kernel computes the normaliser (``lse``) anyway, and each part of the map is
``exp(logits - lse)``, so no function here holds the map of all pairs.

Attention itself runs in torch's own kernels. What is read off its map is computed on CUDA in
compiled kernels (`camkit.native.kernels`) where they are built, elsewhere in plain torch
(`camkit.ops.reweight_plain`) with the same results. Arguments that the functions share:

- ``q``, ``k``: queries and keys of one attention call;
- ``lse``: the normaliser `reweighted_attention` returned for the same weights;
- ``log_weights``: log-weight of each key, for all heads or per head; -inf suppresses a key, None
  changes nothing (`log_of` computes them from weights);
- ``scale``: factor on the dot products; None takes one over the root of the width;
- ``gated_rows``: number of rows, from the first, that the weights apply to; None for all.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from camkit.native.kernels import kernels_ready, padded_width, run_kernel
from camkit.ops import kernel_ops as kernel_ops  # declares the operators
from camkit.ops.reweight_plain import at_least_float32, attend

Heads = Float[Tensor, "b a t d"]
Values = Float[Tensor, "b a t e"]
LogWeights = Float[Tensor, "b t"] | Float[Tensor, "b a t"]
Normaliser = Float[Tensor, "b a t"]


class Reweighted(NamedTuple):
    """Output, normaliser and first rows of one attention call.

    Attributes:
        output: stored as ``(b, t, a, d)``, so that joining the heads needs no copy.
        lse: log-sum-exp of every row, weights included, in at least float32.
        rows: attention weights of the first tokens, in at least float32.
    """

    output: Values
    lse: Normaliser
    rows: Float[Tensor, "b a c t"]


def reweighted_attention(  # noqa: PLR0913 - all of one attention call
    q: Heads,
    k: Heads,
    v: Values,
    log_weights: LogWeights | None = None,
    *,
    scale: float | None = None,
    gated_rows: int | None = None,
    class_rows: int = 0,
) -> Reweighted:
    """Attend with every key's weight multiplied by ``exp(log_weights)`` and rows scaled back.

    Torch's own kernel attends; the log-weights are a mask of one row on a CPU, and extra channels
    of queries and keys elsewhere (`camkit.ops.extra_channels`). Also returns the first
    ``class_rows`` rows of the map. If all keys of a row are suppressed, its output and its row are
    zero and its normaliser -inf.
    """
    if has_torch_function_variadic(q, k, v):
        seen: Reweighted = handle_torch_function(
            reweighted_attention,
            (q, k, v),
            *(q, k, v, log_weights),
            scale=scale,
            gated_rows=gated_rows,
            class_rows=class_rows,
        )
        return seen
    q, k, v = _dense_heads(q, k, v)
    _check_count(q, class_rows, "class_rows")
    settings = _settings(q, k, log_weights, scale, gated_rows)
    with torch.autocast(q.device.type, enabled=False):
        output, lse = attend(q, k, v, *settings)
        if torch.is_grad_enabled() and any(
            x.requires_grad for x in (q, k, settings[0]) if x is not None
        ):
            lse = torch.ops.camkit_plain.normaliser(q, k, lse, *settings)
        rows, _ = _rows_and_columns(q, k, lse, *settings, class_rows, 0)
    return Reweighted(output.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous(), rows)


def rows_and_columns(  # noqa: PLR0913 - all of one attention call
    q: Heads,
    k: Heads,
    lse: Normaliser,
    log_weights: LogWeights | None = None,
    *,
    rows: int,
    columns: int,
    scale: float | None = None,
    gated_rows: int | None = None,
) -> tuple[Float[Tensor, "b a r t"], Float[Tensor, "b a t c"]]:
    """Return what the first ``rows`` tokens attend to, and how much all attend to the first.

    Weights are in at least float32. Rows sum to one, whatever the rounding of ``lse``.
    """
    _check_count(q, rows, "rows")
    _check_count(k, columns, "columns")
    q, k = _dense_heads(q, k)
    settings = _settings(q, k, log_weights, scale, gated_rows)
    return _rows_and_columns(q, k, lse, *settings, rows, columns)


def affinity_mean(  # noqa: PLR0913 - all of one attention call
    q: Heads,
    k: Heads,
    lse: Normaliser,
    log_weights: LogWeights | None = None,
    *,
    skip: int = 0,
    scale: float | None = None,
    gated_rows: int | None = None,
) -> Float[Tensor, "b n n"]:
    """Average the map over heads, without its first ``skip`` rows and columns."""
    _check_count(k, skip, "skip")
    return _read("affinity_mean", q, k, (lse,), log_weights, scale, gated_rows, skip)


def add_affinity_(  # noqa: PLR0913 - all of one attention call
    affinity: Float[Tensor, "b n n"],
    q: Heads,
    k: Heads,
    lse: Normaliser,
    log_weights: LogWeights | None = None,
    *,
    skip: int = 0,
    scale: float | None = None,
    gated_rows: int | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> None:
    """Set ``affinity`` to ``beta * affinity + alpha * affinity_mean(...)``, without gradient.

    This sums the maps of many blocks in one tensor. If ``beta`` is 0, ``affinity`` is not read.
    """
    _check_count(k, skip, "skip")
    q, k = _dense_heads(q.detach(), k.detach())
    settings = _settings(q, k, log_weights, scale, gated_rows)
    q, k, compiled = _padded(q, k)
    compiled = compiled and affinity.is_contiguous() and affinity.dtype == torch.float32
    with torch.no_grad():
        values = (affinity, q, k, lse.detach(), *settings, skip, alpha, beta)
        run_kernel("affinity_mean_", compiled, *values)


def propagate_mean(  # noqa: PLR0913 - all of one attention call
    q: Heads,
    k: Heads,
    lse: Normaliser,
    cam: Float[Tensor, "b m n"],
    log_weights: LogWeights | None = None,
    *,
    skip: int = 0,
    scale: float | None = None,
    gated_rows: int | None = None,
) -> Float[Tensor, "b m n"]:
    """Return ``affinity_mean(...) @ cam`` for each of m maps, without holding the affinity.

    ``cam`` has one value for each token behind the first ``skip``.
    """
    if cam.shape[-1] != k.shape[2] - skip:
        raise ValueError(
            f"`cam` must hold one value for each of the {k.shape[2] - skip} tokens behind `skip`, "
            f"got {cam.shape[-1]}"
        )
    return _read("propagate_mean", q, k, (lse, cam), log_weights, scale, gated_rows, skip)


def log_of(weights: Tensor) -> Tensor:
    """Return log-weights; a weight of zero becomes -inf and gets no gradient."""
    suppressed = weights <= 0.0
    return weights.masked_fill(suppressed, 1.0).log().masked_fill(suppressed, -torch.inf)


def compiled_for(q: Tensor, *others: Tensor, width: int | None = None) -> bool:
    """Whether a compiled kernel supports these heads; all must have the width of ``q``.

    ``width`` replaces that width in the question, for kernels that take several.
    """
    alike = all(x.dtype == q.dtype and x.shape[-1] == q.shape[-1] for x in others)
    filled = all(x.numel() > 0 for x in (q, *others))
    return q.is_cuda and alike and filled and kernels_ready(q.device, q.dtype, width or q.shape[-1])


def _rows_and_columns(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # the kernel takes all widths that are rows of 16 bytes
    compiled = q.shape[-1] % 8 == 0 and compiled_for(q, k, width=64)
    found: tuple[Tensor, Tensor] = run_kernel("rows_and_columns", compiled, q, k, *rest)
    return found


def _read(  # noqa: PLR0913 - all of one attention call
    name: str,
    q: Tensor,
    k: Tensor,
    given: tuple[Tensor, ...],
    log_weights: Tensor | None,
    scale: float | None,
    gated_rows: int | None,
    count: int,
) -> Tensor:
    q, k = _dense_heads(q, k)
    settings = _settings(q, k, log_weights, scale, gated_rows)
    q, k, compiled = _padded(q, k)
    result: Tensor = run_kernel(name, compiled, q, k, *given, *settings, count)
    return result


def _padded(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Pad heads to the width of the next compiled kernel, if there is one."""
    width = padded_width(q.shape[-1])
    compiled = compiled_for(q, k, width=width)
    if compiled and width != q.shape[-1]:
        q, k = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k))
    return q, k, compiled


def _dense_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as scaled_dot_product_attention does under autocast, and make channels contiguous."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _settings(
    q: Tensor, k: Tensor, log_weights: Tensor | None, scale: float | None, gated_rows: int | None
) -> tuple[Tensor | None, float, int]:
    if k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"`k` must have the images, heads and channels of `q`, {tuple(q.shape)}, got "
            f"{tuple(k.shape)}"
        )
    if gated_rows is not None:
        _check_count(q, gated_rows, "gated_rows")
    if log_weights is not None:
        log_weights = log_weights.to(at_least_float32(q.dtype))
        log_weights = log_weights if log_weights.stride(-1) == 1 else log_weights.contiguous()
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return log_weights, factor, -1 if gated_rows is None else gated_rows


def _check_count(tensor: Tensor, count: int, name: str) -> None:
    if not 0 <= count <= tensor.shape[2]:
        raise ValueError(f"`{name}` must lie between 0 and {tensor.shape[2]} tokens, got {count}")
