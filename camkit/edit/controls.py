"""Edits that know nothing of classes: what a real one must beat at equal strength."""

from dataclasses import dataclass

from camkit.capture.attention import Attention
from camkit.edit.site import Site
from camkit.tensors import Tokens


@dataclass(frozen=True)
class ScaleOutput:
    """Multiply what the block adds to its tokens; 1 changes nothing."""

    factor: float = 2.0

    def __call__(self, tokens: Tokens, output: Tokens, attention: Attention, site: Site) -> Tokens:
        del tokens, attention, site
        return output * self.factor
