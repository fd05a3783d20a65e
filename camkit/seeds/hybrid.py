"""Seed from hybrid attention: class-to-patch attention times the likeness of patch and class."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.parameters import linear_weight
from camkit.capture.record import Capture, ClassCall, WatchSpec, required_by
from camkit.capture.tail import classifiers, entering_classifiers, is_classifier
from camkit.edits.interaction import VirtualClassTokens
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.ops.attention import take
from camkit.seeds.patches import PrototypeSeed
from camkit.seeds.protocol import (
    HeadWeights,
    check_classes,
    fold_maps,
    read_head_weights,
    required_by_weights,
)
from camkit.seeds.text import TextClasses
from camkit.tensors import Cam, Classes
from camkit.vocabulary import Vocabulary

Side: TypeAlias = (
    Literal["classifier", "class tokens"]
    | Tensor
    | VirtualClassTokens
    | TextClasses
    | PrototypeSeed
)
"""What stands for a class when patches are compared with it; see `HybridAttentionSeed`."""

Rows: TypeAlias = Float[Tensor, "C d"]
PatchMaps: TypeAlias = Float[Tensor, "b k n"]


@dataclass(frozen=True)
class HybridAttentionSeed:
    """Class-to-patch attention times ``exp(cos(class, patch) / temperature)``; no gradients.

    The map of a class is a product of two cues, and so sharp where both agree: the attention of the
    class to patches, and the likeness of each patch behind the last norm to the class. Up to a
    factor it is the softmax of the attention's logits plus the scaled cosines. Attention and
    cosines as cues of one interaction are DOEI's (read off its figure); joining them by a product,
    reading the map as a seed, and the classifier as a class side are ours.

    Under `camkit.edits.StaticCalibration` the patches are the calibrated ones. A single class
    token, or a pooling query, attends alike for all classes, which the likeness tells apart. A
    model that has neither attends uniformly: its maps are the likeness alone.

    Attributes:
        sides: what patches are compared with, one or several, whose cosines are added up.
            "classifier" is the rows of the model's linear classifier, with each patch as it would
            enter it alone; else those of a layer whose rows score a class token each; else those of
            a convolution that scores patches (MCTformer), summed over its kernel. "class tokens"
            is the final class token of each class, or the single one. A tensor, or a
            `camkit.edits.VirtualClassTokens` (whose temperature is not read), has one row for each
            class or each output, as wide as the patches. `camkit.seeds.TextClasses` are compared
            with patches in the space of texts. A `camkit.seeds.PrototypeSeed` adds its cosines.
            Outputs that a vocabulary joins into a class count by the mean of their rows.
        temperature: divides the sum of cosines, above 0; infinity leaves class attention.
        blocks: attention is averaged over the last n watched blocks; None takes all.
        centred: subtract the mean over all classes (all outputs of a classifier, or all texts with
            those of the background) from the rows of a classifier, given rows and texts, so that
            what all classes share counts for none.
        interaction: "rows" is what class tokens attend to. "sum" adds what patches attend to in
            class tokens, the symmetric sum of DOEI's figure; it needs class tokens.
        head_weights: weighs the heads of each block, as in `camkit.seeds.ClassAttentionSeed`.
    """

    sides: Side | tuple[Side, ...] = "classifier"
    temperature: float = 0.1
    blocks: int | None = 4
    centred: bool = True
    interaction: Literal["rows", "sum"] = "rows"
    head_weights: HeadWeights | None = None

    def __post_init__(self) -> None:
        sides = self.sides if isinstance(self.sides, tuple) else (self.sides,)
        object.__setattr__(self, "sides", tuple(map(_checked_side, sides)))
        if not sides:
            raise ValueError(
                "`sides` must name at least one class side, got none; for attention alone use "
                "ClassAttentionSeed"
            )
        if not self.temperature > 0.0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"`blocks` must be at least 1, or None for all, got {self.blocks}")
        if self.interaction not in ("rows", "sum"):
            raise ValueError(f'`interaction` must be "rows" or "sum", got {self.interaction!r}')

    @property
    def requires(self) -> WatchSpec:
        """What the forward must be watched for."""
        seeds = [side for side in self._sides if isinstance(side, PrototypeSeed)]
        return WatchSpec() | required_by_weights(self.head_weights) | required_by(*seeds)

    def __call__(self, capture: Capture, classes: Classes) -> Cam:
        check_classes(classes, capture.images, capture.class_count)
        with torch.no_grad():
            likeness = self.likeness(capture, classes)
            attended = self.attended(capture, classes).to(likeness)
            # less the maximum of each map, so that no temperature overflows: only the scale differs
            lead = (likeness - likeness.amax(-1, keepdim=True)) / self.temperature
            return fold_maps(capture, attended * lead.exp(), classes)

    def likeness(self, capture: Capture, classes: Classes) -> PatchMaps:
        """Return the sum over the sides of each patch's cosine with each class, detached."""
        with torch.no_grad():
            cosines = [self._cosines(side, capture, classes) for side in self._sides]
            return reduce(torch.add, cosines)

    @property
    def _sides(self) -> tuple[Side, ...]:
        return self.sides if isinstance(self.sides, tuple) else (self.sides,)

    def _cosines(self, side: Side, capture: Capture, classes: Classes) -> PatchMaps:
        if isinstance(side, PrototypeSeed):
            return side.cosines(capture, classes)
        if isinstance(side, TextClasses):
            _check_count(len(side), capture, "texts")
            known = (side.embeddings, side.background)
            rows = self._less_mean(torch.cat([rows for rows in known if rows is not None]))
            return _compare(rows[: len(side)], side.known_space().patches(capture), classes)
        if isinstance(side, VirtualClassTokens):
            return self._to_given_rows(side.embeddings, capture, classes)
        if side == "class tokens":
            tokens, patches = _final_tokens(capture)
            shares = _class_token_shares(capture, classes)
            return _unit(shares.to(tokens) @ tokens) @ _unit(patches).mT
        compared = [
            _compare(self._less_mean(rows), patches, classes, capture.vocabulary)
            for rows, patches in _classifier_sides(capture)
        ]
        return torch.stack(compared).mean(0)

    def _to_given_rows(self, rows: Rows, capture: Capture, classes: Classes) -> PatchMaps:
        patches = capture.patch_embeddings()
        if rows.shape[1] != patches.shape[-1]:
            raise ValueError(
                f"the rows given in `sides` are {rows.shape[1]} wide, but the patches of this "
                f"model have {patches.shape[-1]} channels; project the rows to the patches, or "
                "give texts as camkit.seeds.TextClasses, which knows the projection"
            )
        rows = self._less_mean(rows)
        outputs = None if capture.outputs is None else capture.outputs.shape[1]
        joined = capture.vocabulary if len(rows) == outputs else None
        count = len(rows) if joined is None or joined.members is None else len(joined)
        _check_count(count, capture, "rows given in `sides`")
        return _compare(rows, patches, classes, joined)

    def _less_mean(self, rows: Rows) -> Rows:
        rows = _exact(rows)
        return rows - rows.mean(0) if self.centred and len(rows) > 1 else rows

    def attended(self, capture: Capture, classes: Classes) -> PatchMaps:
        """Return the attention of each class to patches, averaged over heads and blocks."""
        if not capture.anatomy.class_tokens and not capture.pooling:
            if self.interaction == "sum":
                raise CaptureError(_NO_CLASS_TOKENS)
            return torch.ones(*classes.shape, len(capture.patches), device=classes.device)
        calls = capture.class_calls()
        weights: Sequence[Tensor | None] = [None] * len(calls)
        if self.head_weights is not None:
            attention = [call.attention for call in calls]
            weights = read_head_weights(self.head_weights, capture, attention).unbind(1)
        used = slice(-(self.blocks or 0), None)
        read = zip(calls[used], weights[used], strict=True)
        rows = torch.stack([self._interaction(capture, *pair) for pair in read]).mean(0)
        return _class_token_shares(capture, classes).to(rows) @ rows

    def _interaction(
        self, capture: Capture, call: ClassCall, weight: Tensor | None
    ) -> Float[Tensor, "b c n"]:
        if self.interaction == "rows":
            heads = take(call.attention.rows(call.queries), call.patches, 3).detach()
        elif capture.anatomy.class_tokens:
            rows, columns = call.attention.rows_and_columns(call.queries)
            heads = take(rows, call.patches, 3).detach()
            heads = heads + take(columns, call.patches, 2).detach().mT
        else:
            raise CaptureError(_NO_CLASS_TOKENS)
        return (
            heads.mean(1)
            if weight is None
            else (heads * weight[:, :, None, None].to(heads)).mean(1)
        )


_NO_CLASS_TOKENS = (
    "this model has no class token, so neither a final class token nor attention of patches to "
    'one; use `sides="classifier"` and `interaction="rows"`, or name the tokens with '
    "`class_tokens=`"
)


def _checked_side(side: Side) -> Side:
    """Return a side, tensors as `VirtualClassTokens`.

    Raises:
        ValueError: there is no such side, or a tensor is no matrix of finite rows.
    """
    if isinstance(side, Tensor):
        if side.dim() != 2 or not len(side) or not side.isfinite().all():
            raise ValueError(
                "rows given in `sides` must be a finite matrix with one row for each class, got "
                f"shape {tuple(side.shape)}"
            )
        return VirtualClassTokens(side)
    known = isinstance(side, VirtualClassTokens | TextClasses | PrototypeSeed)
    if not known and side not in ("classifier", "class tokens"):
        raise ValueError(
            '`sides` must hold "classifier", "class tokens", a (C, d) tensor, '
            f"camkit.seeds.TextClasses or camkit.seeds.PrototypeSeed, got {side!r}"
        )
    return side


def _check_count(rows: int, capture: Capture, what: str) -> None:
    count = capture.class_count
    if count is not None and rows != count:
        raise ValueError(
            f"the {what} must be one for each of the {count} classes of this model, got {rows}; "
            "state the classes with `vocabulary=`, or score them with `scores=`"
        )


def _classifier_sides(capture: Capture) -> list[tuple[Rows, Float[Tensor, "b n d"]]]:
    """Return the rows of each classifier with the patches that they are compared with.

    Raises:
        UnsupportedModelError: no classifier is known.
    """
    outputs, patches = capture.outputs, capture.patch_embeddings()
    if outputs is not None and classifiers(capture.tail, outputs):
        special = (*capture.anatomy.class_tokens, *capture.anatomy.distillation_tokens)
        heads = entering_classifiers(capture.tail, outputs, special, capture.patches)
        return [(linear_weight(head, like=entering), entering) for head, entering in heads]
    found = _of_class_tokens(capture, patches) or _of_patch_head(capture)
    if not found:
        raise UnsupportedModelError(
            "no linear classifier or head for patches ran behind the last block, so "
            '`sides="classifier"` has no rows; name the classifier with '
            "`sides=camkit.edits.VirtualClassTokens.from_classifier(model, module=...)`, give rows "
            'as a (C, d) tensor, or use `sides="class tokens"`'
        )
    return found


def _of_class_tokens(
    capture: Capture, patches: Float[Tensor, "b n d"]
) -> list[tuple[Rows, Float[Tensor, "b n d"]]]:
    """Find a layer that scores every class token, whose own row gives the score of its class."""
    outputs = capture.outputs
    if outputs is None:
        return []
    for call in reversed(capture.tail):
        square = (*outputs.shape, outputs.shape[1])
        if is_classifier(call.module) and call.output.shape == square:
            own = call.output.diagonal(dim1=1, dim2=2)
            if torch.allclose(own.to(outputs), outputs, rtol=1e-3, atol=1e-3):
                return [(linear_weight(call.module, like=patches), patches)]
    return []


def _of_patch_head(capture: Capture) -> list[tuple[Rows, Float[Tensor, "b n d"]]]:
    """Find a convolution that returns one map on the grid for each output."""
    size = capture.grid.rows, capture.grid.cols
    known = None if capture.outputs is None else capture.outputs.shape[1]
    for call in reversed(capture.tail):
        head, entered, maps = call.module, call.input, call.output
        if not isinstance(head, nn.Conv2d) or head.groups > 1 or maps.dim() != 4:
            continue
        if maps.shape[2:] == size == entered.shape[2:] and known in (None, maps.shape[1]):
            return [(head.weight.detach().sum((2, 3)), entered.flatten(2).mT)]
    return []


def _final_tokens(capture: Capture) -> tuple[Float[Tensor, "b c d"], Float[Tensor, "b n d"]]:
    """Return class tokens and patches behind the last norm.

    Raises:
        CaptureError: there are no class tokens, or they were not recorded with the patches.
    """
    class_tokens, patches = list(capture.anatomy.class_tokens), capture.patch_embeddings()
    if not class_tokens:
        raise CaptureError(_NO_CLASS_TOKENS)
    shape = capture.images, capture.blocks[-1].shape[2]
    outputs = [call.output for call in capture.tail if call.output.shape[:-1] == shape]
    if not outputs or outputs[-1].shape[-1] != patches.shape[-1]:
        raise CaptureError(
            "no module behind the last block returned class tokens and patches together, so they "
            'cannot be compared; use `sides="classifier"`'
        )
    return _exact(outputs[-1][:, class_tokens]), _exact(patches)


def _class_token_shares(capture: Capture, classes: Classes) -> Float[Tensor, "b k c"]:
    return torch.stack([capture.class_token_shares(c) for c in classes.unbind(1)], 1)


def _compare(
    rows: Rows,
    patches: Float[Tensor, "b n d"],
    classes: Classes,
    vocabulary: Vocabulary | None = None,
) -> PatchMaps:
    """Return the cosine of each patch with the rows of ``classes``.

    A vocabulary may join several rows into one class, which then is their mean.
    """
    members = None if vocabulary is None else vocabulary.members
    check_classes(classes, len(patches), len(rows if members is None else members))
    patches = _exact(patches)
    known, slots = classes.clamp_min(0).unique(return_inverse=True)
    if members is None:
        asked = rows[known.to(rows.device)]
    else:  # only of the classes asked for: there may be a thousand
        asked = rows.new_zeros(len(known), rows.shape[1])
        for place, index in enumerate(known.tolist()):
            asked[place] = rows[list(members[index])].mean(0)
    return _unit(asked.to(patches))[slots] @ _unit(patches).mT


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def _exact(tensor: Tensor) -> Tensor:
    """Detach, in float32 or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
