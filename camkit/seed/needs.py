"""What the forward must be watched for, so that seeds can be read from it."""

from dataclasses import replace
from typing import Protocol, TypedDict, runtime_checkable

from camkit.capture.tokens import TokenWatch, joined
from camkit.seed.protocol import Seed


class Needs(TypedDict):
    """Settings of `camkit.watch`."""

    gradients: bool
    tokens: TokenWatch | None


@runtime_checkable
class TokenSeed(Seed, Protocol):
    """A seed that reads tokens, and says which."""

    @property
    def tokens(self) -> TokenWatch:
        """What must be kept of them."""


def needs(*seeds: Seed, class_query: bool = False) -> Needs:
    """Settings of `camkit.watch` with which one forward shows what each seed needs.

    Args:
        seeds: to be read from the capture.
        class_query: where every seed is content with it, evaluate the last block of a class-token
            model for the class query only; refiners that read patch embeddings then have none.

    Example:
        >>> seed = camkit.TokenGradientSeed("layercam")  # doctest: +SKIP
        >>> with camkit.watch(model, **camkit.needs(seed)) as seen:  # doctest: +SKIP
        ...     model(pixels)
    """
    gradients = any(seed.gradients for seed in seeds)
    tokens = joined(seed.tokens for seed in seeds if isinstance(seed, TokenSeed))
    if tokens is not None:
        content = class_query and all(isinstance(seed, TokenSeed) for seed in seeds)
        tokens = replace(tokens, class_query=tokens.class_query and content)
    return Needs(gradients=gradients, tokens=tokens)
