"""DOEI inside the forward, a documented reconstruction: interaction, decoupling, reconstruction.

"DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps"
(Zhu et al. 2025, https://arxiv.org/abs/2502.15885) came without code, and its equations were not at
hand; this is built from its abstract and the figure in its repository. Where both are silent it is
ours, and none of the paper's numbers are claimed for it. docs/doei.md says line by line what comes
from where.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.edits.alignment import HybridAlignment
from camkit.edits.interaction import Interaction, VirtualClassTokens
from camkit.edits.protocol import BlockContext
from camkit.errors import UnsupportedModelError
from camkit.ops.attention import run_of, take
from camkit.ops.confidence import Confidence, TanhAroundMean, amplify
from camkit.ops.doei_tail import Cues, Soft, doei_scores
from camkit.ops.paired import PairBias
from camkit.tensors import Tokens


@dataclass(frozen=True)
class ClassDecoupling:
    """Class-wise: raises and lowers the interactions of each class token with classes (CPDO).

    From the figure: in each row, two groups by confidence, the high one raised and the low one
    lowered by unequal amounts. Ours: rule, strength, and that the sum of a row is kept.

    Attributes:
        strength: how far scores are raised and lowered at the last block, in [0, 1).
        rule: which scores are confident.
    """

    strength: float = 0.5
    rule: Confidence = field(default_factory=TanhAroundMean)

    def __post_init__(self) -> None:
        _check(self.strength)

    def __call__(
        self, weights: Float[Tensor, "b c c"], depth: float = 1.0
    ) -> Float[Tensor, "b c c"]:
        return amplify(weights, self.rule, self.strength * depth)


@dataclass(frozen=True)
class PatchDecoupling:
    """Patch-wise: raises and lowers the interactions of patches with each class (PPDO).

    Attributes:
        strength: how far scores are raised and lowered at the last block, in [0, 1).
        rule: which scores are confident.
        axis: "patches" compares patches for each class, because the paper amplifies tokens;
            "classes" compares classes for each patch, a row of the figure's N x C matrix, and
            changes nothing if there is one class.
    """

    strength: float = 0.5
    rule: Confidence = field(default_factory=TanhAroundMean)
    axis: Literal["patches", "classes"] = "patches"

    def __post_init__(self) -> None:
        _check(self.strength)
        if self.axis not in ("patches", "classes"):
            raise ValueError(f'`axis` must be "patches" or "classes", got {self.axis!r}')

    def __call__(
        self, weights: Float[Tensor, "b n c"], depth: float = 1.0
    ) -> Float[Tensor, "b n c"]:
        strength = self.strength * depth
        if self.axis == "classes":
            return amplify(weights, self.rule, strength)
        return amplify(weights.mT, self.rule, strength).mT


def _check(strength: float) -> None:
    if not 0.0 <= strength < 1.0:
        raise ValueError(f"`strength` must lie in [0, 1), got {strength}")


# -- Reconstruction. The figure multiplies an N x C matrix with N patch tokens, which is impossible
# as drawn. Each function resolves that in another way. What it returns is added to the patches;
# `centred` leaves out what all of them would get alike, which tells no patch from another (ours).

Reading: TypeAlias = Literal["proto", "class", "affinity", "gate"]
ClassReading: TypeAlias = Literal["none", "rebuild", "apart"]

Patches = Float[Tensor, "b n d"]
ClassTokens = Float[Tensor, "b k d"]
Mutual = Float[Tensor, "b c c"]
Weights = Float[Tensor, "b n c"]


def prototypes(
    weights: Weights, patches: Patches, _: ClassTokens, *, centred: bool = False
) -> Patches:
    """Rebuild patches from prototypes of their classes, and these from confident patches."""
    means = _stochastic(weights, 1).to(patches.dtype).mT @ patches
    return _shares(_stochastic(weights, -1), patches, centred) @ means


def from_classes(
    weights: Weights, patches: Patches, classes: ClassTokens, *, centred: bool = False
) -> Patches:
    """Rebuild patches from the class tokens they belong to."""
    return _shares(_stochastic(weights, -1), patches, centred) @ classes


def affinity(
    weights: Weights, patches: Patches, _: ClassTokens, *, centred: bool = False
) -> Patches:
    """Rebuild patches from patches of the same classes, without the map of all pairs."""
    total = weights.sum(1, keepdim=True)
    mass = (weights * total).sum(-1, keepdim=True)
    shares = _shares(weights / mass.clamp_min(1e-12), patches, centred)
    return shares @ (weights.to(patches.dtype).mT @ patches)


def gate(weights: Weights, patches: Patches, _: ClassTokens, *, centred: bool = False) -> Patches:
    """Scale each patch by how confident it is of a class, by 1 on average.

    Centred, it is less 1, so that adding it lowers patches below the average: those are suppressed.
    """
    confidence = weights.amax(-1, keepdim=True)
    gates = confidence / confidence.mean(1, keepdim=True).clamp_min(1e-12)
    return patches * (gates - 1.0 if centred else gates).to(patches.dtype)


def rebuild_classes(weights: Mutual, classes: ClassTokens) -> ClassTokens:
    """Rebuild class tokens from those they interact with, themselves among them (figure)."""
    return _stochastic(weights, -1).to(classes.dtype) @ classes


def tell_apart(weights: Mutual, classes: ClassTokens) -> ClassTokens:
    """Return what each class token does not share with the others it interacts with (ours).

    A token that interacts with no other, because it is alone or its class is absent, gets zero.
    """
    others = weights - torch.diag_embed(weights.diagonal(dim1=1, dim2=2))
    shares = _stochastic(others, -1)
    own = shares.sum(-1, keepdim=True).to(classes.dtype)  # 1, or 0 without others
    return own * classes - shares.to(classes.dtype) @ classes


READINGS: dict[Reading, Callable[..., Patches]] = {
    "proto": prototypes,
    "class": from_classes,
    "affinity": affinity,
    "gate": gate,
}
CLASS_READINGS: dict[ClassReading, Callable[[Mutual, ClassTokens], ClassTokens]] = {
    "rebuild": rebuild_classes,
    "apart": tell_apart,
}


def _stochastic(weights: Tensor, dim: int) -> Tensor:
    """Scale to a sum of one; rows of absent classes stay zero."""
    return weights / weights.sum(dim, keepdim=True).clamp_min(1e-12)


def _shares(weights: Weights, patches: Patches, centred: bool) -> Weights:
    """Return the shares of the classes in each patch, or how far they are from the average."""
    shares = weights - weights.mean(1, keepdim=True) if centred else weights
    return shares.to(patches.dtype)


@dataclass(frozen=True)
class DOEI:
    """Joins attention with the likeness of tokens; optionally adds tokens rebuilt by confidence.

    Four steps: attention is joined with the similarity of embeddings and colours
    (`HybridAlignment`); confident interactions are amplified and others suppressed, among classes
    (`ClassDecoupling`) and among patches (`PatchDecoupling`); tokens are rebuilt from them; the
    result is added to the output that the block adds to its tokens. It has no parameters and no
    loss.

    The default is the first step alone, as a product in the logits of the last three blocks (ours):
    the host's own attention is the hybrid one, and every seed and refiner reads it. The other steps
    take part from a ``strength`` above 0. `DOEI.as_drawn` is the reading of the figure.

    Nothing at all changes if ``strength`` is 0 and ``alignment`` is None, has no weights, or joins
    by "mean", which only the reconstruction reads. The strength of a handle multiplies ``strength``
    and the weights of the alignment.

    Attributes:
        alignment: None leaves colours and embeddings out.
        classes: None changes nothing among classes.
        patches: None changes nothing among patches.
        reading: how an N x C matrix acts on N tokens. "auto" is "proto" for several class tokens
            and "gate" for one, because prototypes of one class are the same for all patches. See
            `camkit.edits.doei`.
        class_reading: how a C x C matrix acts on C class tokens (see there): "rebuild" is the
            figure's and brings them nearer to each other; "apart" raises what a token does not
            share with the others (ours); "none" leaves them as they are, and then ``classes`` has
            no effect. One class token is left as it is, but "rebuild" doubles it.
        centred: whether what all patches would get alike is left out, so that gates multiply by 1
            on average, and others add nothing to the mean patch (ours).
        strength: of the reconstruction; 1 is the figure's, 0 leaves outputs as they are. Above 1,
            a centred gate may turn the least confident patches around.
        progressive: "depth" lets decoupling grow with the block's place (our reading of the
            paper's word); "none" keeps it the same everywhere.
        virtual: class embeddings to rebuild tokens by, for hosts with one class token or none
            (ours).
    """

    alignment: HybridAlignment | None = field(default_factory=HybridAlignment)
    classes: ClassDecoupling | None = None
    patches: PatchDecoupling | None = None
    reading: Reading | Literal["auto"] = "auto"
    class_reading: ClassReading = "none"
    centred: bool = True
    strength: float = 0.0
    progressive: Literal["depth", "none"] = "depth"
    virtual: VirtualClassTokens | None = None

    default_blocks: ClassVar[int] = 3
    checks_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.reading not in ("auto", *READINGS):
            known = ", ".join(("auto", *READINGS))
            raise ValueError(f"`reading` must be one of {known}, got {self.reading!r}")
        if self.class_reading not in ("none", *CLASS_READINGS):
            known = ", ".join(("none", *CLASS_READINGS))
            raise ValueError(f"`class_reading` must be one of {known}, got {self.class_reading!r}")
        if not 0.0 <= self.strength < math.inf:
            raise ValueError(f"`strength` must be at least 0, got {self.strength}")
        if self.progressive not in ("depth", "none"):
            raise ValueError(f'`progressive` must be "depth" or "none", got {self.progressive!r}')
        if self.virtual is not None and self.reading == "class":
            raise ValueError('`reading="class"` needs class tokens of the host, not virtual ones')

    @classmethod
    def as_drawn(cls, **changes: Any) -> "DOEI":
        """Return the reading of the paper's figure: all four steps at full strength.

        Attention is averaged with the other cues, both decouplings act, and all that is rebuilt is
        added. The figure draws it in every block, ``camkit.attach(model, edit, blocks="all")``. Its
        harm without training, and what each step does, is measured in docs/doei.md.

        Args:
            changes: settings to replace, as in `DOEI`.
        """
        drawn: dict[str, Any] = {
            "alignment": HybridAlignment("mean"),
            "classes": ClassDecoupling(),
            "patches": PatchDecoupling(),
            "class_reading": "rebuild",
            "centred": False,
            "strength": 1.0,
        }
        return cls(**(drawn | changes))

    @property
    def changes_output(self) -> bool:
        """Whether what blocks add to their tokens is edited."""
        return self.strength > 0

    @property
    def changes_logits(self) -> bool:
        """Whether the attention of blocks is edited."""
        return self.alignment is not None and self.alignment.join == "product"

    def pair_bias(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> PairBias | None:
        """Return what the alignment adds to the logits, if it joins by "product"."""
        del attention
        return None if self.alignment is None else self.alignment.pair_bias(tokens, site)

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        """Add the reconstruction to the block's output; other special tokens are untouched."""
        strength = self.strength * site.strength
        if strength == 0:
            return output
        own = [] if self.virtual is not None else list(site.anatomy.class_tokens)
        changed = site.anatomy.patches(output.shape[1])
        mutual, weights = self._scores(tokens, attention, site)
        rebuild = READINGS[self._reading(weights.shape[-1])]
        patches, classes = take(output, changed, 1), take(output, own, 1)
        added = rebuild(weights, patches, classes, centred=self.centred)
        if own and self.class_reading != "none":
            rebuilt = CLASS_READINGS[self.class_reading](mutual, classes)
            added, changed = torch.cat([rebuilt, added], 1), [*own, *changed]
        run = run_of(changed, output.shape[1])
        if run is not None:
            added = torch.add(output[:, run.start : run.stop], added, alpha=strength)
            return torch.cat([output[:, : run.start], added, output[:, run.stop :]], 1)
        index = torch.tensor(changed, device=output.device) % output.shape[1]
        return output.index_add(1, index, added.to(output.dtype), alpha=strength)

    def _scores(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> tuple[Float[Tensor, "b c c"], Float[Tensor, "b n c"]]:
        """Return the decoupled interactions among classes, and between patches and classes."""
        depth = site.depth if self.progressive == "depth" else 1.0
        soft = self._soft(depth)
        if soft is not None and self.virtual is None and _in_order(site, attention):
            return self._fused_scores(tokens, attention, site, *soft)
        interaction = self.interaction(tokens, attention, site)
        mutual, weights = interaction.between_classes(), interaction.between_patches_and_classes()
        return (
            mutual if self.classes is None else self.classes(mutual, depth),
            weights if self.patches is None else self.patches(weights, depth),
        )

    def _fused_scores(
        self, tokens: Tokens, attention: Attention, site: BlockContext, classes: Soft, patches: Soft
    ) -> tuple[Tensor, Tensor]:
        """Return the same from one operator (`camkit.ops.doei_tail`)."""
        own = list(site.anatomy.class_tokens)
        rows, columns = attention.rows_and_columns(own)
        cues = None
        if self.alignment is not None and self.alignment.blends:
            cue, weight = self.alignment.cues(tokens, site), self.alignment.token_weight
            parts = (cue.class_to_class, cue.class_to_patch, cue.patch_to_class)
            cues = Cues(*parts, weight / (1.0 + weight))
        labels = self._labels(site, len(own))
        return doei_scores(
            rows,
            columns,
            cues,
            None if labels is None else labels.to(rows),
            skip=site.anatomy.patches(tokens.shape[1])[0],
            classes=classes,
            patches=patches,
            across_classes=self.patches is not None and self.patches.axis == "classes",
        )

    def _soft(self, depth: float) -> tuple[Soft, Soft] | None:
        """Return both decouplings as numbers; None if a rule is not the soft one."""
        soft = []
        for part in (self.classes, self.patches):
            if part is None:
                soft.append(Soft())
            elif type(part.rule) is TanhAroundMean:
                soft.append(Soft(part.strength * depth, part.rule.shift, part.rule.temperature))
            else:
                return None
        return soft[0], soft[1]

    def interaction(self, tokens: Tokens, attention: Attention, site: BlockContext) -> Interaction:
        """Return the block's interaction, with other cues joined and absent classes removed.

        Cues that are joined as a product are in the attention already.
        """
        patches = site.anatomy.patches(tokens.shape[1])
        if self.virtual is not None:
            interaction = self.virtual.interaction(tokens, patches)
            if self.alignment is not None:
                interaction = self.alignment.colours_only(interaction, site)
        elif site.anatomy.class_tokens:
            interaction = Interaction.of(attention, site.anatomy)
            if self.alignment is not None:
                interaction = self.alignment(interaction, tokens, site)
        else:
            raise UnsupportedModelError(
                "this model has no class token, but a reconstruction needs one; give DOEI class "
                "embeddings, virtual=camkit.edits.VirtualClassTokens.from_classifier(model)"
            )
        return interaction.among(self._labels(site, interaction.class_to_class.shape[1]))

    def _labels(self, site: BlockContext, classes: int) -> Tensor | None:
        """Return the labels if every class has a token; a single token stands for all classes."""
        if site.labels is None or classes == 1:
            return None
        if site.labels.shape[1] != classes:
            raise ValueError(
                f"`handle.labels` must have a column for each of the {classes} classes that have a "
                f"token, got {site.labels.shape[1]}"
            )
        return site.labels

    def _reading(self, classes: int) -> Reading:
        if self.reading == "auto":
            return "gate" if classes == 1 else "proto"
        if classes == 1 and self.reading in ("proto", "class"):
            raise UnsupportedModelError(
                f'`reading="{self.reading}"` gives every patch the same vector if there is one '
                'class token; use "gate" or "affinity", or camkit.edits.VirtualClassTokens'
            )
        return self.reading


def _in_order(site: BlockContext, attention: Attention) -> bool:
    """Whether class tokens come first and patches last, with any others between them."""
    tokens, own = attention.shape[2], list(site.anatomy.class_tokens)
    places = site.anatomy.patches(tokens)
    first = bool(own) and own == list(range(len(own)))
    return first and bool(places) and places == list(range(places[0], tokens))
