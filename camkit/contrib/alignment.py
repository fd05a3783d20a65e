"""Other ways to use colours in DOEI, in place of `camkit.edits.HybridAlignment`.

The shapes in the paper's figure do not fit, so these are as plausible as K G. G and K are as there.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from camkit.edits.alignment import HybridAlignment
from camkit.edits.interaction import Interaction
from camkit.edits.protocol import BlockContext
from camkit.ops.similarity import colour_mass, colour_smooth, cosine_smooth
from camkit.tensors import Tokens


@dataclass(frozen=True)
class TwoSidedAlignment(HybridAlignment):
    """Joins attention with K G K', whose rows are scaled back to sum to one (ours).

    So what classes take from patches is averaged over similar colours, too.
    """

    join: Literal["product", "mean"] = "mean"

    def cues(self, tokens: Tokens, site: BlockContext) -> Interaction:
        """Return K G K', or G without colours, between classes and patches."""
        one_sided = super().cues(tokens, site)
        if self.colour_width is None or not site.picture.shows_colours(type(self).__name__):
            return one_sided
        width, classes = self.colour_width, list(site.anatomy.class_tokens)
        patches = site.anatomy.patches(tokens.shape[1])
        colours = site.picture.colours(len(patches)).to(tokens.device)
        rows = colour_smooth(colours, one_sided.class_to_patch.mT, width=width).mT
        # row sums of K': 1 for all tokens but the patches, and for these by colour
        mass = colour_mass(colours, width=width)[..., None]
        sums = tokens.new_ones(*tokens.shape[:2], 1)
        by_colour = mass * colour_smooth(colours, 1 / mass, width=width)
        index = torch.tensor(patches, device=tokens.device)
        sums = sums.index_copy(1, index, by_colour.to(sums.dtype))
        total = cosine_smooth(tokens, sums, temperature=self.temperature)
        of_patches = colour_smooth(colours, total[:, patches], width=width)
        of_classes = total[:, classes]
        return Interaction(
            one_sided.class_to_class / of_classes,
            rows / of_classes,
            one_sided.patch_to_class / of_patches,
        )


@dataclass(frozen=True)
class DescriptorAlignment(HybridAlignment):
    """Joins attention with the similarity of gathered colours (ours).

    Every token takes the mean colour of the patches it is similar to, so that class tokens have a
    colour, too; the row-softmax of the distances between these takes the place of K G. It gets no
    gradient.
    """

    join: Literal["product", "mean"] = "mean"

    def cues(self, tokens: Tokens, site: BlockContext) -> Interaction:
        """Return the similarity of gathered colours, or G without colours."""
        if self.colour_width is None or not site.picture.shows_colours(type(self).__name__):
            return super().cues(tokens, site)
        width, classes = self.colour_width, list(site.anatomy.class_tokens)
        patches = site.anatomy.patches(tokens.shape[1])
        with torch.no_grad():
            colours = site.picture.colours(len(patches)).to(tokens.device)
            counted = torch.cat([colours, torch.ones_like(colours[..., :1])], -1)
            everywhere = tokens.new_zeros(*tokens.shape[:2], 4)
            index = torch.tensor(patches, device=tokens.device)
            everywhere = everywhere.index_copy(1, index, counted.to(everywhere.dtype))
            sums = cosine_smooth(tokens, everywhere, temperature=self.temperature)
            gathered = sums[..., :3] / sums[..., 3:].clamp_min(1e-12)
            of_classes = gathered[:, classes]
            distance = (of_classes[:, :, None] - gathered[:, None]).square().sum(-1)
            near = (distance / (-2 * width**2)).exp()
            mass = colour_mass(gathered, width=width)
            rows = near / near.sum(-1, keepdim=True)
            columns = near[..., patches].mT / mass[:, patches, None]
        return Interaction(rows[..., classes], rows[..., patches], columns)
