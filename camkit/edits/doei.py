"""DOEI inside the forward, a documented reconstruction: interaction, decoupling, reconstruction.

"DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps"
(Zhu et al. 2025, https://arxiv.org/abs/2502.15885) came without code, and its equations were not at
hand; this is built from its abstract and the figure in its repository. Where both are silent it is
ours, and none of the paper's numbers are claimed for it. docs/doei.md says line by line what comes
from where.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

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
# as drawn. Each function resolves that in another way.

Reading: TypeAlias = Literal["proto", "class", "affinity", "gate"]

Patches = Float[Tensor, "b n d"]
ClassTokens = Float[Tensor, "b k d"]
Weights = Float[Tensor, "b n c"]


def prototypes(weights: Weights, patches: Patches, _: ClassTokens) -> Patches:
    """Rebuild patches from prototypes of their classes, and these from confident patches."""
    return _stochastic(weights, -1) @ (_stochastic(weights, 1).mT @ patches)


def from_classes(weights: Weights, _: Patches, classes: ClassTokens) -> Patches:
    """Rebuild patches from the class tokens they belong to."""
    return _stochastic(weights, -1) @ classes


def affinity(weights: Weights, patches: Patches, _: ClassTokens) -> Patches:
    """Rebuild patches from patches of the same classes, without the map of all pairs."""
    total = weights.sum(1, keepdim=True)
    mass = (weights * total).sum(-1, keepdim=True)
    return weights @ (weights.mT @ patches) / mass.clamp_min(1e-12)


def gate(weights: Weights, patches: Patches, _: ClassTokens) -> Patches:
    """Scale each patch by how confident it is of a class."""
    confidence = weights.amax(-1, keepdim=True)
    return patches * (confidence / confidence.mean(1, keepdim=True).clamp_min(1e-12))


def reconstruct_classes(weights: Float[Tensor, "b c c"], classes: ClassTokens) -> ClassTokens:
    """Rebuild class tokens from those they interact with."""
    return _stochastic(weights, -1) @ classes


READINGS: dict[Reading, Callable[[Weights, Patches, ClassTokens], Patches]] = {
    "proto": prototypes,
    "class": from_classes,
    "affinity": affinity,
    "gate": gate,
}


def _stochastic(weights: Tensor, dim: int) -> Tensor:
    """Scale to a sum of one; rows of absent classes stay zero."""
    return weights / weights.sum(dim, keepdim=True).clamp_min(1e-12)


@dataclass(frozen=True)
class DOEI:
    """Adds tokens rebuilt from confident class-to-patch interactions to a block's output.

    Four steps: attention is joined with the similarity of embeddings and colours
    (`HybridAlignment`); confident interactions are amplified and others suppressed, among classes
    (`ClassDecoupling`) and among patches (`PatchDecoupling`); tokens are rebuilt from them; the
    result is added to the output that the block adds to its tokens. It has no parameters and no
    loss.

    Attach it to all blocks for training (figure), to the last three without (ours).

    Attributes:
        alignment: None leaves colours and embeddings out.
        classes: None changes nothing among classes.
        patches: None changes nothing among patches.
        reading: how an N x C matrix acts on N tokens. "auto" is "proto" for several class tokens
            and "gate" for one, because prototypes of one class are the same for all patches. See
            `camkit.edits.doei`.
        strength: of the residual; 1 is the figure's, 0 changes nothing.
        progressive: "depth" lets decoupling grow with the block's place (our reading of the
            paper's word); "none" keeps it the same everywhere.
        virtual: class embeddings, for hosts with one class token or none (ours).
    """

    alignment: HybridAlignment | None = field(default_factory=lambda: HybridAlignment("mean"))
    classes: ClassDecoupling | None = field(default_factory=ClassDecoupling)
    patches: PatchDecoupling | None = field(default_factory=PatchDecoupling)
    reading: Reading | Literal["auto"] = "auto"
    strength: float = 1.0
    progressive: Literal["depth", "none"] = "depth"
    virtual: VirtualClassTokens | None = None

    def __post_init__(self) -> None:
        if self.reading not in ("auto", *READINGS):
            known = ", ".join(("auto", *READINGS))
            raise ValueError(f"`reading` must be one of {known}, got {self.reading!r}")
        if self.strength < 0:
            raise ValueError(f"`strength` must be at least 0, got {self.strength}")
        if self.progressive not in ("depth", "none"):
            raise ValueError(f'`progressive` must be "depth" or "none", got {self.progressive!r}')
        if self.virtual is not None and self.reading == "class":
            raise ValueError('`reading="class"` needs class tokens of the host, not virtual ones')

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        """Add the reconstruction to the block's output; other special tokens are untouched."""
        if self.strength == 0:
            return output
        own = [] if self.virtual is not None else list(site.anatomy.class_tokens)
        places = site.anatomy.patches(output.shape[1])
        mutual, weights = self._scores(tokens, attention, site)
        rebuild = READINGS[self._reading(weights.shape[-1])]
        patches, classes = take(output, places, 1), take(output, own, 1)
        added = rebuild(weights.to(output.dtype), patches, classes)
        if own:
            rebuilt = reconstruct_classes(mutual.to(output.dtype), classes)
            added = torch.cat([rebuilt, added], 1)
        changed = run_of([*own, *places], output.shape[1])
        if changed is not None:
            first = changed.start
            added = torch.add(output[:, first : changed.stop], added, alpha=self.strength)
            return torch.cat([output[:, :first], added, output[:, changed.stop :]], 1)
        index = torch.tensor([*own, *places], device=output.device) % output.shape[1]
        return output.index_add(1, index, added.to(output.dtype), alpha=self.strength)

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
        rows, columns = attention.rows(own), attention.columns(own)
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
        """Return the block's interaction, with other cues blended in and absent classes removed."""
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
                "this model has no class token, but DOEI needs one; give it class embeddings, "
                "camkit.DOEI(virtual=camkit.edits.VirtualClassTokens.from_classifier(model))"
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
