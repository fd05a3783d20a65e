"""What DOEI does between attention and reconstruction, as one operator.

Heads are averaged, the cues beside attention joined in, absent classes left out, both directions
added, and confident scores amplified: a dozen small tensors and some eighty launches on a GPU where
each step is its own. `camkit.edits.doei` says what the steps are and whose; the soft rule
`camkit.ops.confidence.TanhAroundMean` is the only one the operator knows.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.native.kernels import kernels_ready
from camkit.ops.confidence import TanhAroundMean

ANY_WIDTH = 64  # a head width that kernels are always compiled for; this one does not depend on it
SCHEMA = (
    "(Tensor rows, Tensor columns, Tensor? cue_classes, Tensor? cue_rows, Tensor? cue_columns,"
    " Tensor? present, int skip, float share, float class_strength, float class_shift,"
    " float class_temperature, float patch_strength, float patch_shift, float patch_temperature,"
    " bool across_classes) -> (Tensor mutual, Tensor weights, Tensor mutual_gain,"
    " Tensor weight_gain)"
)


class Cues(NamedTuple):
    """What is known of classes and patches beside attention.

    Attributes:
        classes: of classes among each other.
        rows: of patches for classes.
        columns: of classes for patches.
        share: of the cues in the blend, in [0, 1].
    """

    classes: Float[Tensor, "b c c"]
    rows: Float[Tensor, "b c n"]
    columns: Float[Tensor, "b n c"]
    share: float


class Soft(NamedTuple):
    """How scores are amplified: strength in [0, 1), and the numbers of `TanhAroundMean`."""

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
    """Amplified interactions among classes, and between patches and classes.

    Args:
        rows: attention of the class tokens, which come first among the tokens.
        columns: attention of all tokens to them.
        cues: joined with the attention, heads averaged.
        present: 1 for classes in the image, 0 for others; None keeps all.
        skip: how many tokens come before the patches.
        classes: how scores among classes are amplified.
        patches: how scores between patches and classes are.
        across_classes: compare classes for each patch, not patches for each class.

    Returns:
        In at least float32; no gradient flows through what is confident.
    """
    joined = (None, None, None) if cues is None else cues[:3]
    share = 0.0 if cues is None else cues.share
    single = rows.is_cuda and rows.dtype != torch.float64
    compiled = single and kernels_ready(rows.device, torch.float32, ANY_WIDTH)
    namespace = torch.ops.camkit if compiled else torch.ops.camkit_plain
    mutual, weights, *_ = namespace.doei_scores(
        *(rows, columns, *joined, present, skip, share, *classes, *patches, across_classes)
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
    """The same in plain torch."""
    count, dtype = rows.shape[2], torch.promote_types(rows.dtype, torch.float32)
    seen = rows.to(dtype).mean(1)
    among, to_patches = seen[..., :count], seen[..., skip:]
    to_classes = columns[:, :, skip:].to(dtype).mean(1)
    if cue_classes is not None and cue_rows is not None and cue_columns is not None:
        among = torch.lerp(among, cue_classes.to(dtype), share)
        to_patches = torch.lerp(to_patches, cue_rows.to(dtype), share)
        to_classes = torch.lerp(to_classes, cue_columns.to(dtype), share)
    mutual, weights = among + among.mT, to_classes + to_patches.mT
    if present is not None:
        kept = present.to(dtype)
        mutual, weights = mutual * kept[:, :, None] * kept[:, None], weights * kept[:, None]
    mutual_gain = _gain(mutual, Soft(*settings[:3]))
    weight_gain = (
        _gain(weights, Soft(*settings[3:6]))
        if settings[6]
        else _gain(weights.mT, Soft(*settings[3:6])).mT.contiguous()
    )
    return mutual * mutual_gain, weights * weight_gain, mutual_gain, weight_gain


def _gain(scores: Tensor, soft: Soft) -> Tensor:
    """What every score is multiplied by, so that its row keeps its sum."""
    if soft.strength == 0.0:
        return torch.ones_like(scores, memory_format=torch.contiguous_format)
    confidence = TanhAroundMean(soft.shift, soft.temperature)(scores)
    changed = scores * (gain := 1.0 + soft.strength * confidence)
    before, after = (x.sum(-1, keepdim=True) for x in (scores, changed))
    empty = after == 0.0  # a row of zeros has no sum to be scaled to
    return gain * (before.masked_fill(empty, 1.0) / after.masked_fill(empty, 1.0))


def _shapes(rows: Tensor, columns: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    images, _, count, _ = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    patches = columns.shape[2] - rest[4]
    shapes = [(images, count, count), (images, patches, count)] * 2
    return tuple(rows.new_empty(shape, dtype=dtype) for shape in shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, *cues, present, ctx.skip, ctx.share = inputs[:8]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(present, *output)
    ctx.across, ctx.dtypes = inputs[-1], (rows.dtype, columns.dtype)
    ctx.shape, ctx.cues = rows.shape, [None if cue is None else cue.dtype for cue in cues]


def _backward(ctx: Any, to_mutual: Tensor, to_weights: Tensor, *_: Any) -> tuple[Any, ...]:
    present, mutual, weights, mutual_gain, weight_gain = ctx.saved_tensors
    _, heads, count, _ = ctx.shape
    among = _through_amplify(to_mutual, mutual, mutual_gain, -1)
    between = _through_amplify(to_weights, weights, weight_gain, -1 if ctx.across else 1)
    if present is not None:
        kept = present.to(among.dtype)
        among, between = among * kept[:, :, None] * kept[:, None], between * kept[:, None]
    among = among + among.mT
    cues = [among, between.mT, between]
    to_cues = [
        None if dtype is None else (cue * ctx.share).to(dtype)
        for cue, dtype in zip(cues, ctx.cues, strict=True)
    ]
    mine = (1.0 - ctx.share) / heads if any(d is not None for d in ctx.cues) else 1.0 / heads
    gap = between.new_zeros(len(between), count, ctx.skip - count)
    to_rows = torch.cat([among, gap, between.mT], -1) * mine
    before = between.new_zeros(len(between), ctx.skip, count)
    to_columns = torch.cat([before, between], 1) * mine
    to_rows, to_columns = (
        x.to(dtype)[:, None].expand(-1, heads, -1, -1)
        for x, dtype in zip((to_rows, to_columns), ctx.dtypes, strict=True)
    )
    return (to_rows, to_columns, *to_cues, *(None,) * 10)


def _through_amplify(gradient: Tensor, found: Tensor, gain: Tensor, axis: int) -> Tensor:
    """With scores s, gains g and their products y: g (d - m) + m, m the mean of d by y."""
    total = found.sum(axis, keepdim=True)
    mean = (gradient * found).sum(axis, keepdim=True) / total.masked_fill(total == 0.0, 1.0)
    return gain * (gradient - mean) + mean


for _namespace in ("camkit", "camkit_plain"):
    _op = f"{_namespace}::doei_scores"
    torch.library.define(_op, SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(_op, "CompositeExplicitAutograd", plain_scores)
    torch.library.register_fake(_op, _shapes)
    torch.library.register_autograd(_op, _backward, setup_context=_keep)
