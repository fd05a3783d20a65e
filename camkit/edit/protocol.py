"""What an edit is."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.edit.site import Site
from camkit.tensors import Tokens


@runtime_checkable
class Edit(Protocol):
    """Changes what an attention block adds to its tokens."""

    def __call__(self, tokens: Tokens, output: Tokens, attention: Attention, site: Site) -> Tokens:
        """A new output of the block.

        Args:
            tokens: what went into the attention module.
            output: what it returns, after its projection and before the residual.
            attention: the attention it used; rows, columns and maps are computed when asked.
            site: which block, which tokens are what, and the picture.
        """


@runtime_checkable
class KeyEdit(Protocol):
    """Tilts attention itself: weights on the keys, inside the host's own kernel."""

    def log_weights(
        self, tokens: Tokens, attention: Attention, site: Site
    ) -> Float[Tensor, "b s"] | Float[Tensor, "b a s"]:
        """What to add to the logits of every key, for all heads or for each.

        The rows of the map become proportional to ``exp(log_weights)`` times what they were.
        """
