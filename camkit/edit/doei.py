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
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.edit.alignment import HybridAlignment
from camkit.edit.decoupling import ClassDecoupling, PatchDecoupling
from camkit.edit.interaction import Interaction
from camkit.edit.reconstruction import READINGS, Reading, reconstruct_classes
from camkit.edit.site import Site
from camkit.edit.virtual import VirtualClassTokens
from camkit.errors import UnsupportedModelError
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
        interaction = self.interaction(tokens, attention, site)
        depth = site.depth if self.progressive == "depth" else 1.0
        weights = interaction.between_patches_and_classes()
        weights = weights if self.patches is None else self.patches(weights, depth)
        rebuild = READINGS[self._reading(weights.shape[-1])]
        patches = output[:, places]
        added = rebuild(weights.to(output.dtype), patches, output[:, own])
        if own:
            mutual = interaction.between_classes()
            mutual = mutual if self.classes is None else self.classes(mutual, depth)
            rebuilt = reconstruct_classes(mutual.to(output.dtype), output[:, own])
            added = torch.cat([rebuilt, added], 1)
        index = torch.tensor([*own, *places], device=output.device) % output.shape[1]
        return output.index_add(1, index, added.to(output.dtype), alpha=self.strength)

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
