"""Class tokens for hosts that have one for all classes, or none."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.search import find_attention
from camkit.edit.interaction import Interaction
from camkit.errors import UnsupportedModelError
from camkit.tensors import Tokens


@dataclass(frozen=True, eq=False)
class VirtualClassTokens:
    """Class embeddings that patches are compared with: classifier rows, or text (our extension).

    Class-to-patch is the softmax over patches of their cosines over ``temperature``,
    patch-to-class that over classes; classes have nothing to do with each other. The tokens
    compared are those the attention module was given; its norm stands for the host's last one.

    Attributes:
        embeddings: one row a class, as wide as the tokens; get no gradient.
        temperature: divides the cosines.
    """

    embeddings: Float[Tensor, "c d"]
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}")

    @classmethod
    def from_classifier(cls, model: nn.Module, *, temperature: float = 0.1) -> "VirtualClassTokens":
        """The rows of a model's last linear layer.

        Raises:
            UnsupportedModelError: it has none behind its blocks.
        """
        inside = tuple(find_attention(model))
        blocks = {name.rpartition(".")[0] for name in inside}
        found = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not any(name.startswith(b) for b in blocks if b)
        ]
        if not found:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no linear classifier; give `embeddings` of the classes"
            )
        return cls(found[-1].weight.detach(), temperature)

    def interaction(self, tokens: Tokens, patches: list[int]) -> Interaction:
        """What the embeddings have to do with the patches of a block."""
        if self.embeddings.shape[1] != tokens.shape[2]:
            raise ValueError(
                f"`embeddings` are {self.embeddings.shape[1]} wide, but the tokens have "
                f"{tokens.shape[2]} channels; project them to the tokens first"
            )
        classes = F.normalize(self.embeddings.detach().to(tokens), dim=-1)
        logits = F.normalize(tokens[:, patches], dim=-1) @ classes.T / self.temperature
        own = torch.eye(len(classes)).to(logits).expand(len(tokens), -1, -1)
        return Interaction(own, logits.softmax(1).mT, logits.softmax(2))
