"""Attention with weights on its keys, and what is read from it, in one call each; no map is held.

Multiplying attention weights by ``w`` and scaling every row back to sum to one is the same as
adding ``log w`` to the logits, so reweighted attention is a fused kernel with one number more for
each key. With the normaliser (``lse``) that such a kernel computes anyway, every part of the map
is ``exp(logits - lse)``.

On CUDA these run in compiled kernels where they are built (`camkit.native.kernels`), else, and on
every other device, in plain torch (`camkit.ops.reweight_plain`) with the same results.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.native.kernels import kernels_ready
from camkit.ops import kernel_ops

Heads = Float[Tensor, "b a t d"]
Values = Float[Tensor, "b a t e"]
LogWeights = Float[Tensor, "b t"] | Float[Tensor, "b a t"]
Normaliser = Float[Tensor, "b a t"]


class Reweighted(NamedTuple):
    """Output, normaliser and first rows of one attention call.

    Attributes:
        output: laid out as ``(b, t, a, d)``, so that joining the heads needs no copy.
        lse: log of every row's summed exponentials, weights included, in at least float32.
        rows: what the first tokens attend to, in at least float32.
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

    A row whose keys are all suppressed attends to nothing: its output and row are zero and its
    normaliser is -inf.

    Args:
        q: queries.
        k: keys.
        v: values; of another width than the keys they keep to plain torch.
        log_weights: of every key, for all heads or for each; -inf suppresses it. None tilts
            nothing. `log_of` turns weights into these.
        scale: factor on the dot products; None takes one over the root of the width.
        gated_rows: how many rows, from the first, feel the weights; None all.
        class_rows: how many rows of the map to return, from the first.
    """
    q, k, v = (_dense(x) for x in _in_autocast(q, k, v))
    _check(q, class_rows, "class_rows")
    tilt = _tilt(q, k, log_weights, gated_rows)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return Reweighted(*_ops(q, k, v).reweighted_attention(q, k, v, *tilt(factor), class_rows))


def class_columns(  # noqa: PLR0913 - all of one attention call
    q: Heads,
    k: Heads,
    lse: Normaliser,
    log_weights: LogWeights | None = None,
    *,
    columns: int,
    scale: float | None = None,
    gated_rows: int | None = None,
) -> Float[Tensor, "b a t c"]:
    """How much every token attends to the first ``columns`` tokens, in at least float32.

    Args:
        q: queries.
        k: keys.
        lse: the normaliser that `reweighted_attention` gave for the same tilt.
        log_weights: as there.
        columns: how many columns, from the first.
        scale: as there.
        gated_rows: as there.
    """
    _check(k, columns, "columns")
    return _call("class_columns", (q, k), (lse,), log_weights, scale, gated_rows, columns)


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
    """The map averaged over heads, without its first ``skip`` rows and columns.

    Args:
        q: queries.
        k: keys.
        lse: the normaliser that `reweighted_attention` gave for the same tilt.
        log_weights: as there.
        skip: how many tokens in front are left out.
        scale: as there.
        gated_rows: as there.
    """
    _check(k, skip, "skip")
    return _call("affinity_mean", (q, k), (lse,), log_weights, scale, gated_rows, skip)


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
    """Make ``affinity`` into ``beta * affinity + alpha * affinity_mean(...)``, without gradient.

    So the maps of many blocks add up in one tensor. With ``beta`` 0 what it held is not read.
    """
    _check(k, skip, "skip")
    q, k = _in_autocast(q, k)
    tilt = _tilt(q, k, log_weights, gated_rows)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    given = (_dense(q.detach()), _dense(k.detach()), lse.detach())
    takes = affinity.is_contiguous() and affinity.dtype == torch.float32
    ops = _ops(*given[:2]) if takes else torch.ops.camkit_plain
    with torch.no_grad():
        ops.affinity_mean_(affinity, *given, *tilt(factor), skip, alpha, beta)


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
    """Carry maps along `affinity_mean`, which is never held: ``affinity @ cam`` for each map.

    Args:
        q: queries.
        k: keys.
        lse: the normaliser that `reweighted_attention` gave for the same tilt.
        cam: m maps with one value for each token behind the first ``skip``.
        log_weights: as in `reweighted_attention`.
        skip: how many tokens in front are left out.
        scale: as in `reweighted_attention`.
        gated_rows: as in `reweighted_attention`.
    """
    if cam.shape[-1] != k.shape[2] - skip:
        raise ValueError(
            f"`cam` must hold one value for each of the {k.shape[2] - skip} tokens behind `skip`, "
            f"got {cam.shape[-1]}"
        )
    return _call("propagate_mean", (q, k), (lse, cam), log_weights, scale, gated_rows, skip)


def log_of(weights: Tensor) -> Tensor:
    """Log-weights of weights; a weight of zero suppresses wholly and gets no gradient."""
    nothing = weights <= 0.0
    return weights.masked_fill(nothing, 1.0).log().masked_fill(nothing, -torch.inf)


def _call(  # noqa: PLR0913 - all of one attention call
    name: str,
    heads: tuple[Tensor, Tensor],
    given: tuple[Tensor, ...],
    log_weights: Tensor | None,
    scale: float | None,
    gated_rows: int | None,
    last: int,
) -> Tensor:
    q, k = (_dense(x) for x in _in_autocast(*heads))
    tilt = _tilt(q, k, log_weights, gated_rows)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = getattr(_ops(q, k), name)(q, k, *given, *tilt(factor), last)
    return found


def compiled_for(q: Tensor, *others: Tensor) -> bool:
    """Whether a compiled kernel takes heads like these; keys and values must be as wide."""
    alike = all(x.dtype == q.dtype and x.shape[-1] == q.shape[-1] for x in others)
    filled = all(x.numel() > 0 for x in (q, *others))
    return q.is_cuda and alike and filled and kernels_ready(q.device, q.dtype, q.shape[-1])


def _ops(*heads: Tensor) -> Any:
    return getattr(torch.ops, kernel_ops.NAMESPACES[0 if compiled_for(*heads) else 1])


def _in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As scaled_dot_product_attention would take them where autocast is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)


def _dense(tensor: Tensor) -> Tensor:
    """Channels next to each other, as every kernel reads them; all other strides are free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _tilt(q: Tensor, k: Tensor, log_weights: Tensor | None, gated_rows: int | None) -> Any:
    if k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"`k` must have the images, heads and channels of `q`, {tuple(q.shape)}, got "
            f"{tuple(k.shape)}"
        )
    rows = -1 if gated_rows is None else gated_rows
    if gated_rows is not None:
        _check(q, gated_rows, "gated_rows")
    if log_weights is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        log_weights = _dense(log_weights.to(wide))
    return lambda scale: (log_weights, float(scale), rows)


def _check(tensor: Tensor, count: int, name: str) -> None:
    if not 0 <= count <= tensor.shape[2]:
        raise ValueError(f"`{name}` must lie between 0 and {tensor.shape[2]} tokens, got {count}")
