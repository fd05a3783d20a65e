"""DOEI inside the forward: a documented reconstruction.

"DOEI: Dual Optimization of Embedding Information for Attention-Enhanced Class Activation Maps"
(Zhu et al. 2025, https://arxiv.org/abs/2502.15885) released neither code nor equations that could
be read; this is built from its abstract and the figure in its repository. It is ours where they
are silent, and none of the paper's numbers are claimed for it. docs/methods.md says line by line
what comes from where.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.edit.alignment import HybridAlignment
from camkit.edit.decoupling import ClassDecoupling, PatchDecoupling
from camkit.edit.interaction import Interaction
from camkit.edit.reconstruction import READINGS, Reading, reconstruct_classes
from camkit.edit.site import Site
from camkit.edit.virtual import VirtualClassTokens
from camkit.errors import UnsupportedModelError
from camkit.ops.confidence import TanhAroundMean
from camkit.ops.doei_tail import Cues, Soft, doei_scores
from camkit.ops.places import run_of, take
from camkit.tensors import Tokens


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
            same for all patches. See `camkit.edit.reconstruction`.
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

    def __call__(self, tokens: Tokens, output: Tokens, attention: Attention, site: Site) -> Tokens:
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
        self, tokens: Tokens, attention: Attention, site: Site
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
        self, tokens: Tokens, attention: Attention, site: Site, classes: Soft, patches: Soft
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

    def interaction(self, tokens: Tokens, attention: Attention, site: Site) -> Interaction:
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
                "camkit.DOEI(virtual=camkit.VirtualClassTokens.from_classifier(model))"
            )
        return found.among(self._labels(site, found.class_to_class.shape[1]))

    def _labels(self, site: Site, classes: int) -> Tensor | None:
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
                'class token; use "gate" or "affinity", or camkit.VirtualClassTokens'
            )
        return self.reading


def _in_order(site: Site, attention: Attention) -> bool:
    """Whether class tokens come first and patches last, with whatever else between them."""
    tokens, own = attention.shape[2], list(site.anatomy.class_tokens)
    places = site.anatomy.patches(tokens)
    first = bool(own) and own == list(range(len(own)))
    return first and bool(places) and places == list(range(places[0], tokens))
