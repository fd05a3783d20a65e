"""Values propagated along attention or an affinity: propagation, balancing, random walks, boxes."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from camkit.native.kernels import padded_width
from camkit.ops.attention import AttentionInputs, operator_inputs, rows_of, run_of, take
from camkit.ops.paired import PairBias, paired_attention
from camkit.ops.reweight import compiled_for, propagate_mean
from camkit.ops.similarity import check_positive, check_shape
from camkit.tensors import Cam


def propagate(
    call: AttentionInputs, values: Float[Tensor, "b k n"], patches: Sequence[int]
) -> Float[Tensor, "b k n"]:
    """Average ``values`` over the patches each patch attends to, heads averaged.

    Equals ``A[patches, patches] @ values`` with A the head-mean attention and its patch-to-patch
    rows scaled to sum to one, so results stay within the range of ``values``. The map itself is
    never built: the values take the place of v in a fused attention kernel, together with a column
    of ones that gives each row's sum. With a normaliser, camkit's compiled kernel averages the
    heads, where it is available.

    Args:
        call: whose map it is.
        values: one per patch for each of k maps.
        patches: positions of the patches among the tokens.
    """
    maps = torch.cat([values, torch.ones_like(values[:, :1])], 1)
    q, k = call.q, call.k
    skip = q.shape[2] - len(patches)
    last = run_of(patches, q.shape[2]) == range(skip, q.shape[2])
    inputs = None
    if last and call.pairs is None and compiled_for(q, k, width=padded_width(q.shape[-1])):
        inputs = operator_inputs(call)
    if inputs is not None:
        lse, weights = inputs
        maps = propagate_mean(q, k, lse, maps, weights, skip=skip, scale=call.scale)
    else:
        maps = _attend_to_maps(call, maps, patches)
    return (maps[:, :-1] / maps[:, -1:]).to(values.dtype)


def _attend_to_maps(call: AttentionInputs, maps: Tensor, patches: Sequence[int]) -> Tensor:
    """Run torch's fused attention with maps in place of the values, and average the heads."""
    q, k, pairs, count = call.q, call.k, call.pairs, maps.shape[1]
    width = max(q.shape[-1], count)  # values as wide as the keys get the fast kernels
    values = F.pad(maps.mT.to(q.dtype), (0, width - count))
    skip = k.shape[2] - len(patches)
    if run_of(patches, k.shape[2]) == range(skip, k.shape[2]):
        values = F.pad(values, (0, 0, skip, 0))
    else:
        where = torch.tensor(list(patches), device=q.device)
        values = values.new_zeros(len(q), k.shape[2], width).index_copy(1, where, values)
    inputs = take(q, patches, 2), k, values[:, None].expand(-1, q.shape[1], -1, -1)
    added = rows_of(call.bias, patches)
    if pairs is None:
        output = F.scaled_dot_product_attention(*inputs, attn_mask=added, scale=call.scale)
    else:
        own = take(pairs.queries, patches, pairs.queries.dim() - 2)
        more = PairBias(own, pairs.keys)
        output, _ = paired_attention(*inputs, more, added, scale=call.scale)
    return output.mean(1)[..., :count].mT


def balance(affinity: Float[Tensor, "b n n"], *, rounds: int = 3) -> Float[Tensor, "b n n"]:
    """Sinkhorn-normalise a positive affinity, then make it symmetric.

    Every round divides the columns, then the rows, by their sums, so that patches that everything
    attends to (sinks) do not absorb the scores. Rounds followed by the mean with the transpose are
    the recipe of CLIP-ES (Lin et al. 2023).
    """
    for _ in range(rounds):
        affinity = affinity / affinity.sum(-2, keepdim=True)
        affinity = affinity / affinity.sum(-1, keepdim=True)
    return (affinity + affinity.mT) / 2


def random_walk(
    scores: Float[Tensor, "b k n"], affinity: Float[Tensor, "b n n"], *, beta: float, steps: int
) -> Float[Tensor, "b k n"]:
    """Replace each score by its expectation after a walk from its place.

    Equals ``T^steps`` applied to each map, with T the affinity to the power ``beta``, rows scaled
    to sum to one. Each step is one product with the scores, so the memory is that of one
    ``(b, n, n)`` tensor. Scores keep their range, and constant scores their value. If the affinity
    is symmetric, the sum of scores weighted by the row sums of ``affinity ** beta`` is kept.

    Args:
        scores: one per place, for each of k maps.
        affinity: from each place (row) to each other, at least 0; no row may be all zeros.
        beta: exponent, above 0; large values keep only the strongest affinities.
        steps: of the walk; 0 returns the scores unchanged.
    """
    check_positive("beta", beta)
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps}")
    images, _, places = scores.shape
    needed = f"for {images} images of {places} scores a map"
    check_shape("affinity", affinity, (images, places, places), needed)
    if not (affinity.isfinite() & (affinity >= 0)).all():
        raise ValueError("`affinity` must be finite and at least 0, got NaN, inf or less")
    if not (affinity.sum(-1) > 0).all():
        raise ValueError("`affinity` has a row of zeros: a walk from there leads nowhere")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        values, transition = scores.to(dtype), affinity.to(dtype)
        # high powers of small numbers underflow; the scale of a row has no effect on the result
        transition = (transition / transition.amax(-1, keepdim=True)) ** beta
        transition = transition / transition.sum(-1, keepdim=True)
        for _ in range(steps):
            values = values @ transition.mT
    return values.to(scores.dtype)


BoxRule: TypeAlias = Literal["whole", "clip-es"]


def component_boxes(cam: Cam, share: float, *, rule: BoxRule = "whole") -> Bool[Tensor, "b k h w"]:
    """Mark the bounding boxes of the connected strong regions of each map.

    Regions connect along sides and corners, as in CLIP-ES (Lin et al. 2023), which uses a share of
    0.4, and in ExCEL, which uses 0.79. A map without a positive score has no box.

    Args:
        cam: class scores.
        share: a score above this share of the map's maximum is strong, in [0, 1).
        rule: "whole" boxes hold their whole region. "clip-es" is what the code of CLIP-ES, WeCLIP
            and ExCEL does: no box holds the last row or column of the map, so a region there is
            cut or lost, and scores are compared as bytes, 0 to 255, rounded down.
    """
    check_boxes(share, rule)
    scores = cam.detach()
    top = scores.amax((-2, -1), keepdim=True) if cam.numel() else scores
    if rule == "clip-es":
        if not (scores.isfinite().all() and (scores >= 0).all() and (scores <= 1).all()):
            raise ValueError(
                'boxes of the rule "clip-es" are found in bytes, so `cam` must lie in [0, 1]; use '
                'camkit.normalize_cam first, or the rule "whole"'
            )
        wide = torch.promote_types(scores.dtype, torch.float32)
        levels, highest = ((values.to(wide) * 255).floor() for values in (scores, top))
        marked = levels > (share * highest.double()).floor()
    else:
        marked = (scores > share * top) & (top > 0)
    strong = marked.flatten(0, 1).cpu().numpy()
    boxes = np.zeros_like(strong)
    for plane, box in zip(strong.astype(np.uint8), boxes, strict=True):
        _, _, regions, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
        for left, up, width, height, _ in regions[1:]:  # the first is the background
            box[up : up + height, left : left + width] = True
    if rule == "clip-es":
        boxes[:, -1:], boxes[:, :, -1:] = False, False
    return torch.from_numpy(boxes).view(cam.shape).to(cam.device)


def check_boxes(share: float | None, rule: str) -> None:
    """Raise a ValueError if `component_boxes` does not take these settings; None is no boxes."""
    if share is not None and not 0.0 <= share < 1.0:
        raise ValueError(f"`boxes` must lie in [0, 1), got {share}")
    if rule not in ("whole", "clip-es"):
        raise ValueError(f'`box_rule` must be "whole" or "clip-es", got {rule!r}')
