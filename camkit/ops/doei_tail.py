"""The scores DOEI computes between attention and reconstruction, as one operator.

Heads are averaged, cues beside attention joined in, absent classes left out, both directions added,
and confident scores amplified: a dozen small tensors, which as separate steps are about eighty
launches on a GPU. `camkit.edits.doei` says what each step is and where it comes from;
`camkit.ops.confidence.TanhAroundMean` is the only confidence rule the operator supports.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.native.kernels import kernels_ready, run_kernel
from camkit.ops.confidence import TanhAroundMean, gain
from camkit.ops.kernel_ops import NAMESPACES, declare
from camkit.ops.reweight_plain import at_least_float32

SCHEMA = (
    "(Tensor rows, Tensor columns, Tensor? cue_classes, Tensor? cue_rows, Tensor? cue_columns,"
    " Tensor? present, int skip, float share, float class_strength, float class_shift,"
    " float class_temperature, float patch_strength, float patch_shift, float patch_temperature,"
    " bool across_classes) -> (Tensor mutual, Tensor weights, Tensor mutual_gain,"
    " Tensor weight_gain)"
)


class Cues(NamedTuple):
    """Interactions of classes and patches from another source than attention.

    Attributes:
        classes: interactions of classes with each other.
        rows: interactions of classes (rows) with patches.
        columns: interactions of patches (rows) with classes.
        share: weight of the cues in the blend, in [0, 1].
    """

    classes: Float[Tensor, "b c c"]
    rows: Float[Tensor, "b c n"]
    columns: Float[Tensor, "b n c"]
    share: float


class Soft(NamedTuple):
    """How scores are amplified: strength in [0, 1), and the settings of `TanhAroundMean`."""

    strength: float = 0.0
    shift: float = 0.0
    temperature: float = 1.0


def doei_scores(  # noqa: PLR0913 - all that is decided before reconstruction
    rows: Float[Tensor, "b a c t"],
    columns: Float[Tensor, "b a t c"],
    cues: Cues | None = None,
    present: Float[Tensor, "b c"] | None = None,
    *,
    skip: int,
    classes: Soft = Soft(),  # noqa: B008 - immutable
    patches: Soft = Soft(),  # noqa: B008
    across_classes: bool = False,
) -> tuple[Float[Tensor, "b c c"], Float[Tensor, "b n c"]]:
    """Return amplified interactions among classes, and between patches and classes.

    Args:
        rows: attention of the class tokens, which come first among the tokens.
        columns: attention of all tokens to them.
        cues: blended into the attention averaged over heads.
        present: 1 for classes in the image, 0 for others; None keeps all.
        skip: number of tokens before the patches.
        classes: how scores among classes are amplified.
        patches: how scores between patches and classes are amplified.
        across_classes: compare classes for each patch, not patches for each class.

    Returns:
        Scores in at least float32; no gradient flows through the confidence.
    """
    joined = (None, None, None) if cues is None else cues[:3]
    share = 0.0 if cues is None else cues.share
    single = rows.is_cuda and rows.dtype != torch.float64
    # any head width for which there are kernels: this operator does not depend on it
    compiled = single and kernels_ready(rows.device, torch.float32, 64)
    inputs = (rows, columns, *joined, present, skip, share)
    mutual, weights, *_ = run_kernel(
        "doei_scores", compiled, *inputs, *classes, *patches, across_classes
    )
    return mutual, weights


def plain_scores(  # noqa: PLR0913 - as declared
    rows: Tensor,
    columns: Tensor,
    cue_classes: Tensor | None,
    cue_rows: Tensor | None,
    cue_columns: Tensor | None,
    present: Tensor | None,
    skip: int,
    share: float,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the scores in plain torch, and the factor each was amplified by."""
    count, dtype = rows.shape[2], at_least_float32(rows.dtype)
    from_classes = rows.to(dtype).mean(1)
    among, to_patches = from_classes[..., :count], from_classes[..., skip:]
    to_classes = columns[:, :, skip:].to(dtype).mean(1)
    if cue_classes is not None and cue_rows is not None and cue_columns is not None:
        among = torch.lerp(among, cue_classes.to(dtype), share)
        to_patches = torch.lerp(to_patches, cue_rows.to(dtype), share)
        to_classes = torch.lerp(to_classes, cue_columns.to(dtype), share)
    mutual, weights = among + among.mT, to_classes + to_patches.mT
    if present is not None:
        kept = present.to(dtype)
        mutual, weights = mutual * kept[:, :, None] * kept[:, None], weights * kept[:, None]
    classes, patches, across_classes = settings[:3], settings[3:6], settings[6]
    mutual_gain = _gain(mutual, *classes)
    if across_classes:
        weight_gain = _gain(weights, *patches)
    else:
        weight_gain = _gain(weights.mT, *patches).mT.contiguous()
    return mutual * mutual_gain, weights * weight_gain, mutual_gain, weight_gain


def _gain(scores: Tensor, strength: float, shift: float, temperature: float) -> Tensor:
    if strength == 0.0:
        return torch.ones_like(scores, memory_format=torch.contiguous_format)
    factors, scale = gain(scores, TanhAroundMean(shift, temperature), strength)
    return factors * scale


def _shapes(rows: Tensor, columns: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    images, _, count, _ = rows.shape
    patches = columns.shape[2] - rest[4]
    shapes = [(images, count, count), (images, patches, count)] * 2
    return tuple(rows.new_empty(shape, dtype=at_least_float32(rows.dtype)) for shape in shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, *cues, present, ctx.skip, ctx.share = inputs[:8]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(present, *output)
    ctx.across, ctx.dtypes = inputs[-1], (rows.dtype, columns.dtype)
    ctx.shape, ctx.cues = rows.shape, [None if cue is None else cue.dtype for cue in cues]


def _backward(ctx: Any, to_mutual: Tensor, to_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    present, mutual, weights, mutual_gain, weight_gain = ctx.saved_tensors
    _, heads, count, _ = ctx.shape
    among = _amplify_backward(to_mutual, mutual, mutual_gain, -1)
    between = _amplify_backward(to_weights, weights, weight_gain, -1 if ctx.across else 1)
    if present is not None:
        kept = present.to(among.dtype)
        among, between = among * kept[:, :, None] * kept[:, None], between * kept[:, None]
    among = among + among.mT
    cues = [among, between.mT, between]
    to_cues = [
        None if dtype is None else (cue * ctx.share).to(dtype)
        for cue, dtype in zip(cues, ctx.cues, strict=True)
    ]
    share = (1.0 - ctx.share) / heads if any(d is not None for d in ctx.cues) else 1.0 / heads
    gap = between.new_zeros(len(between), count, ctx.skip - count)
    before = between.new_zeros(len(between), ctx.skip, count)
    to_rows = torch.cat([among, gap, between.mT], -1) * share
    to_columns = torch.cat([before, between], 1) * share
    to_attention = [
        gradient.to(dtype)[:, None].expand(-1, heads, -1, -1)
        for gradient, dtype in zip((to_rows, to_columns), ctx.dtypes, strict=True)
    ]
    return (*to_attention, *to_cues, *(None,) * 10)


def _amplify_backward(gradient: Tensor, amplified: Tensor, gains: Tensor, axis: int) -> Tensor:
    """Return g (d - m) + m, for gains g, gradient d, and m the mean of d weighted by the scores."""
    total = amplified.sum(axis, keepdim=True)
    mean = (gradient * amplified).sum(axis, keepdim=True) / total.masked_fill(total == 0.0, 1.0)
    return gains * (gradient - mean) + mean


for _namespace in NAMESPACES:
    declare(f"{_namespace}::doei_scores", SCHEMA, plain_scores, _shapes, _keep, _backward)
