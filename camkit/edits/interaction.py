"""The class-to-patch interaction, from attention or from embeddings of classes."""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import Attention
from camkit.capture.host import find_attention, tail_modules
from camkit.capture.parameters import linear_weight
from camkit.capture.tail import is_classifier
from camkit.errors import UnsupportedModelError
from camkit.ops.attention import take
from camkit.printing import short_repr
from camkit.tensors import Labels, Tokens


@dataclass(frozen=True, eq=False)
class Interaction:
    """Attention between class tokens and patches, averaged over heads.

    Attributes:
        class_to_class: what class tokens take from each other.
        class_to_patch: what class tokens take from patches.
        patch_to_class: what patches take from class tokens.
    """

    class_to_class: Float[Tensor, "b c c"]
    class_to_patch: Float[Tensor, "b c n"]
    patch_to_class: Float[Tensor, "b n c"]

    __repr__ = short_repr

    @classmethod
    def of(cls, attention: Attention, anatomy: Anatomy) -> "Interaction":
        """Compute the class rows and class columns of an attention call, and nothing else.

        The mean over heads is ours: the figure shows one matrix.
        """
        tokens = list(anatomy.class_tokens)
        patches = anatomy.patches(attention.shape[2])
        rows, columns = (part.mean(1) for part in attention.rows_and_columns(tokens))
        return cls(take(rows, tokens, 2), take(rows, patches, 2), take(columns, patches, 1))

    def blend(self, other: "Interaction", weight: float) -> "Interaction":
        """Return the mean of both, with weights 1 and ``weight``; rows keep a sum of one."""
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
        """Set what goes to or from absent classes to zero; None changes nothing."""
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
        """Add the class block and its transpose (figure)."""
        return self.class_to_class + self.class_to_class.mT

    def between_patches_and_classes(self) -> Float[Tensor, "b n c"]:
        """Add patch-to-class and class-to-patch (figure)."""
        return self.patch_to_class + self.class_to_patch.mT


@dataclass(frozen=True, eq=False)
class VirtualClassTokens:
    """Class embeddings that patches are compared with: classifier rows, or texts (our extension).

    Class-to-patch is the softmax over patches of their cosines over ``temperature``, patch-to-class
    that over classes; classes do not interact with each other. The tokens compared are those given
    to the attention module; its norm stands in for the host's last norm.

    Attributes:
        embeddings: one row per class, as wide as the tokens; they get no gradient.
        temperature: divides the cosines.
        source: where they come from, for the manifest.
    """

    embeddings: Float[Tensor, "c d"] = field(repr=False)
    temperature: float = 0.1
    source: str = "given"

    def __post_init__(self) -> None:
        rows = self.embeddings
        if rows.dim() != 2 or not len(rows) or not rows.isfinite().all():
            raise ValueError(
                "`embeddings` must be a finite matrix with one row for each class, got shape "
                f"{tuple(rows.shape)}" + ("" if rows.isfinite().all() else " with NaN or inf")
            )
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}")

    @classmethod
    def from_classifier(
        cls, model: nn.Module, *, module: str | None = None, temperature: float = 0.1
    ) -> "VirtualClassTokens":
        """Take the rows of a model's classifier, a linear layer or a 1x1 convolution.

        Args:
            model: the host.
            module: name of its classifier; None takes the layer behind the blocks that is called
                head, classifier or fc, if there is just one.
            temperature: divides the cosines.

        Raises:
            UnsupportedModelError: there is no such layer, or more than one.
        """
        name = _classifier(model) if module is None else module
        layer = model.get_submodule(name)
        if not is_classifier(layer):
            raise UnsupportedModelError(
                f"{name} is a {type(layer).__name__}; expected a linear layer or a 1x1 convolution"
            )
        return cls(linear_weight(layer).detach().clone(), temperature, name)

    def rows_for(self, tokens: Tokens) -> Float[Tensor, "c d"]:
        """Return the embeddings in the dtype and on the device of the tokens; checks the width."""
        if self.embeddings.shape[1] != tokens.shape[2]:
            raise ValueError(
                f"`embeddings` are {self.embeddings.shape[1]} wide, but the tokens have "
                f"{tokens.shape[2]} channels; project them to the tokens first"
            )
        return self.embeddings.detach().to(tokens)

    def interaction(self, tokens: Tokens, patches: list[int]) -> Interaction:
        """Return the interaction of the embeddings with the patches of a block."""
        classes = F.normalize(self.rows_for(tokens), dim=-1)
        logits = F.normalize(tokens[:, patches], dim=-1) @ classes.T / self.temperature
        own = torch.eye(len(classes)).to(logits).expand(len(tokens), -1, -1)
        return Interaction(own, logits.softmax(1).mT, logits.softmax(2))


def _classifier(model: nn.Module) -> str:
    behind = set(tail_modules(model, list(find_attention(model))))
    layers = [name for name, m in model.named_modules() if m in behind and is_classifier(m)]
    called = [
        n for n in layers if set(n.lower().split(".")) & {"head", "heads", "classifier", "fc"}
    ]
    if len(called) != 1:
        candidates = ", ".join(called or layers) or "none"
        raise UnsupportedModelError(
            f"camkit does not know which layer of {type(model).__name__} is its classifier "
            f"(candidates: {candidates}); name it with `module=`, or give `embeddings` of the "
            "classes"
        )
    return called[0]
