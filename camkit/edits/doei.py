"""DOEI inside the forward, a documented reconstruction: interaction, decoupling, reconstruction.

The figure multiplies an N x C matrix with N patch tokens, which is impossible as drawn. Each
function here resolves it in another way.

"DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps"
(Zhu et al. 2025, https://arxiv.org/abs/2502.15885) released neither code nor equations that could
be read; this is built from its abstract and the figure in its repository. It is ours where they
are silent, and none of the paper's numbers are claimed for it. docs/methods.md says line by line
what comes from where.
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
    """Class-wise: among the classes that each class token interacts with (CPDO).

    Two groups by confidence, the high one raised and the low one lowered by unequal amounts, are
    the figure's, in each row; rule, strength and the kept sum are ours.

    Attributes:
        strength: how far scores are raised and lowered at the last block, in [0, 1).
        rule: what is confident.
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
    """Patch-wise: among the patches that interact with each class (PPDO).

    Attributes:
        strength: how far scores are raised and lowered at the last block, in [0, 1).
        rule: what is confident.
        axis: "patches" compares patches for each class, because the paper amplifies tokens;
            "classes" compares classes for each patch, a row of the figure's N x C matrix, and
            does nothing where there is one class.
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


Reading: TypeAlias = Literal["proto", "class", "affinity", "gate"]

Patches = Float[Tensor, "b n d"]
ClassTokens = Float[Tensor, "b k d"]
Weights = Float[Tensor, "b n c"]


def prototypes(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch from prototypes of its classes, each prototype from the patches sure of it."""
    del classes
    return _stochastic(weights, -1) @ (_stochastic(weights, 1).mT @ patches)


def from_classes(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch from the class tokens it belongs to."""
    del patches
    return _stochastic(weights, -1) @ classes


def affinity(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch from patches that belong to the same classes; the map of pairs is never held."""
    del classes
    total = weights.sum(1, keepdim=True)
    mass = (weights * total).sum(-1, keepdim=True)
    return weights @ (weights.mT @ patches) / mass.clamp_min(1e-12)


def gate(weights: Weights, patches: Patches, classes: ClassTokens) -> Patches:
    """Each patch itself, more of it where it is sure of a class."""
    del classes
    sure = weights.amax(-1, keepdim=True)
    return patches * (sure / sure.mean(1, keepdim=True).clamp_min(1e-12))


def reconstruct_classes(weights: Float[Tensor, "b c c"], classes: ClassTokens) -> ClassTokens:
    """Each class token from those it interacts with."""
    return _stochastic(weights, -1) @ classes


READINGS: dict[Reading, Callable[[Weights, Patches, ClassTokens], Patches]] = {
    "proto": prototypes,
    "class": from_classes,
    "affinity": affinity,
    "gate": gate,
}


def _stochastic(weights: Tensor, dim: int) -> Tensor:
    """Scaled to sum to one; where all is zero (absent classes) zero stays."""
    return weights / weights.sum(dim, keepdim=True).clamp_min(1e-12)


@dataclass(frozen=True)
class FuzzyKeyPruning:
    """Patches that little attention goes to are taken from the keys, by degrees.

    After the fuzzy token pruning of Yun et al. 2023, of which no formulas were at hand: a patch's
    importance is the attention it gets, averaged over heads and queries; a membership function
    makes a weight of it, in place of a hard cut. Ours are the function, a ramp from 0 at one
    quantile of the image's importances to 1 at another; that weights never fall below ``least``;
    that each block judges afresh; that class and register tokens always stay.

    Attributes:
        low: quantile at which a patch is out, in [0, 1).
        high: quantile from which it is wholly in, above ``low``.
        least: what is left of the attention to a patch that is out, in (0, 1].
    """

    low: float = 0.1
    high: float = 0.3
    least: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(
                f"`low` and `high` must be quantiles, 0 <= low < high <= 1, got {self.low} and "
                f"{self.high}"
            )
        if not 0.0 < self.least <= 1.0:
            raise ValueError(f"`least` must lie in (0, 1], got {self.least}")

    def log_weights(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> Float[Tensor, "b s"]:
        """Log of the membership of each patch, 0 for all other tokens."""
        patches = torch.tensor(site.anatomy.patches(attention.shape[3]), device=tokens.device)
        importance = attention.head_mean().mean(1)[:, patches].detach().float()
        bounds = importance.new_tensor([self.low, self.high])
        low, high = importance.quantile(bounds, dim=1, keepdim=True)
        member = ((importance - low) / (high - low).clamp_min(1e-12)).clamp(self.least, 1.0)
        member = torch.where(high > low, member, 1.0)  # all alike: nobody is pruned
        weights = tokens.new_zeros(len(tokens), attention.shape[3])
        return weights.index_copy(1, patches, member.log().to(weights))


@dataclass(frozen=True)
class DOEI:
    """Adds to a block's output what its confident class-to-patch interactions make of it.

    Four steps: attention is joined with likeness of embeddings and colours (`HybridAlignment`);
    confident interactions are amplified and others suppressed, among classes (`ClassDecoupling`)
    and among patches (`PatchDecoupling`); tokens are rebuilt from them; the result is added to the
    output the block adds to its tokens. No parameters, no loss of its own.

    Attach it to all blocks for training (figure), to the last three without (ours).

    Attributes:
        alignment: None leaves colours and embeddings out.
        classes: None changes nothing among classes.
        patches: None changes nothing among patches.
        reading: how an N x C matrix acts on N tokens. "auto" is "proto" where there are several
            class tokens and "gate" where there is one, because prototypes of one class are the
            same for all patches. See `camkit.edits.doei`.
        strength: of the residual; 1 is the figure's, 0 changes nothing.
        progressive: "depth" lets decoupling grow with the block's place (our reading of the
            paper's word); "none" has it the same everywhere.
        virtual: class embeddings, for hosts with one class token or none (ours).
    """

    alignment: HybridAlignment | None = field(default_factory=HybridAlignment)
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
        """The block's output with the reconstruction added; other special tokens are untouched."""
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
        """Decoupled interactions among classes, and between patches and classes."""
        depth = site.depth if self.progressive == "depth" else 1.0
        soft = self._soft(depth)
        if soft is not None and self.virtual is None and _in_order(site, attention):
            return self._in_one(tokens, attention, site, *soft)
        interaction = self.interaction(tokens, attention, site)
        mutual, weights = interaction.between_classes(), interaction.between_patches_and_classes()
        return (
            mutual if self.classes is None else self.classes(mutual, depth),
            weights if self.patches is None else self.patches(weights, depth),
        )

    def _in_one(
        self, tokens: Tokens, attention: Attention, site: BlockContext, classes: Soft, patches: Soft
    ) -> tuple[Tensor, Tensor]:
        """The same by one operator (`camkit.ops.doei_tail`)."""
        own = list(site.anatomy.class_tokens)
        rows, columns = attention.rows(own), attention.columns(own)
        cues = None
        if self.alignment is not None and self.alignment.weight > 0:
            found, weight = self.alignment.cues(tokens, site), self.alignment.weight
            shares = (found.class_to_class, found.class_to_patch, found.patch_to_class)
            cues = Cues(*shares, weight / (1.0 + weight))
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
        """Both decouplings in numbers; None where a rule is another than the soft one."""
        found = []
        for part in (self.classes, self.patches):
            if part is None:
                found.append(Soft())
            elif type(part.rule) is TanhAroundMean:
                rule = part.rule
                found.append(Soft(part.strength * depth, rule.shift, rule.temperature))
            else:
                return None
        return found[0], found[1]

    def interaction(self, tokens: Tokens, attention: Attention, site: BlockContext) -> Interaction:
        """Classes and patches as the block sees them, other cues joined, absent classes removed."""
        patches = site.anatomy.patches(tokens.shape[1])
        if self.virtual is not None:
            found = self.virtual.interaction(tokens, patches)
            if self.alignment is not None:
                found = self.alignment.colours_only(found, site)
        elif site.anatomy.class_tokens:
            found = Interaction.of(attention, site.anatomy)
            if self.alignment is not None:
                found = self.alignment(found, tokens, site)
        else:
            raise UnsupportedModelError(
                "this model has no class token for DOEI to work with; give it class embeddings, "
                "camkit.DOEI(virtual=camkit.edits.VirtualClassTokens.from_classifier(model))"
            )
        return found.among(self._labels(site, found.class_to_class.shape[1]))

    def _labels(self, site: BlockContext, classes: int) -> Tensor | None:
        """Labels where they tell classes apart; one class token speaks for whatever is there."""
        if site.labels is None or classes == 1:
            return None
        if site.labels.shape[1] != classes:
            raise ValueError(
                f"`handle.labels` must tell of the {classes} classes that have a token, got "
                f"{site.labels.shape[1]}"
            )
        return site.labels

    def _reading(self, classes: int) -> Reading:
        if self.reading == "auto":
            return "gate" if classes == 1 else "proto"
        if classes == 1 and self.reading in ("proto", "class"):
            raise UnsupportedModelError(
                f'`reading="{self.reading}"` gives every patch the same vector where there is one '
                'class token; use "gate" or "affinity", or camkit.edits.VirtualClassTokens'
            )
        return self.reading


def _in_order(site: BlockContext, attention: Attention) -> bool:
    """Whether class tokens come first and patches last, with whatever else between them."""
    tokens, own = attention.shape[2], list(site.anatomy.class_tokens)
    places = site.anatomy.patches(tokens)
    first = bool(own) and own == list(range(len(own)))
    return first and bool(places) and places == list(range(places[0], tokens))
