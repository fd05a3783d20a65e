"""What classes and patches have to do with each other: the three blocks of attention DOEI reads."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import Attention
from camkit.ops.places import take
from camkit.tensors import Labels


@dataclass(frozen=True, eq=False)
class Interaction:
    """Attention between class tokens and patches, heads averaged; patch-to-patch is never read.

    Attributes:
        class_to_class: what class tokens take from each other.
        class_to_patch: what class tokens take from patches.
        patch_to_class: what patches take from class tokens.
    """

    class_to_class: Float[Tensor, "b c c"]
    class_to_patch: Float[Tensor, "b c n"]
    patch_to_class: Float[Tensor, "b n c"]

    @classmethod
    def of(cls, attention: Attention, anatomy: Anatomy) -> "Interaction":
        """Read from an attention call; its class rows and class columns are all that is computed.

        The mean over heads is our reading: the figure shows one matrix.
        """
        tokens = list(anatomy.class_tokens)
        patches = anatomy.patches(attention.shape[2])
        rows = attention.rows(tokens).mean(1)
        columns = attention.columns(tokens).mean(1)
        return cls(take(rows, tokens, 2), take(rows, patches, 2), take(columns, patches, 1))

    def blend(self, other: "Interaction", weight: float) -> "Interaction":
        """The mean of two, the other one counting ``weight``; rows that sum to one still do."""
        parts = (
            torch.lerp(mine, theirs.to(mine.dtype), weight / (1.0 + weight))
            for mine, theirs in (
                (self.class_to_class, other.class_to_class),
                (self.class_to_patch, other.class_to_patch),
                (self.patch_to_class, other.patch_to_class),
            )
        )
        return Interaction(*parts)

    def among(self, labels: Labels | None) -> "Interaction":
        """Nothing to or from classes that are absent; all of it where nothing is known."""
        if labels is None:
            return self
        present = labels.to(self.class_to_class)
        return replace(
            self,
            class_to_class=self.class_to_class * present[:, :, None] * present[:, None],
            class_to_patch=self.class_to_patch * present[:, :, None],
            patch_to_class=self.patch_to_class * present[:, None],
        )

    def between_classes(self) -> Float[Tensor, "b c c"]:
        """The class block and its transpose, added (figure)."""
        return self.class_to_class + self.class_to_class.mT

    def between_patches_and_classes(self) -> Float[Tensor, "b n c"]:
        """Patch-to-class and class-to-patch, added (figure)."""
        return self.patch_to_class + self.class_to_patch.mT
