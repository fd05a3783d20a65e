"""What is wanted of the tokens in a forward, and what was seen of them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention


@dataclass(frozen=True)
class Noise:
    """More forwards of the same images under Gaussian noise.

    Attributes:
        samples: how many.
        spread: standard deviation, in units of the normalised pixels.
        rng_seed: makes the draws repeatable.
    """

    samples: int = 4
    spread: float = 0.3
    rng_seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"`samples` must be at least 1, got {self.samples}")
        if not self.spread >= 0.0:
            raise ValueError(f"`spread` must be at least 0, got {self.spread}")


@dataclass(frozen=True)
class TokenWatch:
    """What to keep of the tokens.

    Attributes:
        blocks: keep the tokens that enter the attention of so many of the last blocks.
        gradients: keep them in a graph, which begins there if the caller runs without one.
        within_blocks: keep, of every block, the attention and the tokens that leave the block, in a
            graph of their own; between blocks it is cut, unless others need it whole.
        leaving: keep the tokens that leave each block, without a graph.
        class_paths: of every block, follow the class token alone from its row of the attention to
            the block's end, in a graph of its own.
        noise: run the images again under noise, and keep the same of these runs.
        class_query: where the class token alone is pooled, evaluate the last block for its query
            only. Scores stay exact and so do gradients; what the model makes of its patches behind
            that block is then unknown. Used where a trial on the model finds it exact.
    """

    blocks: int = 0
    gradients: bool = False
    within_blocks: bool = False
    leaving: bool = False
    class_paths: bool = False
    noise: Noise | None = None
    class_query: bool = False

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise ValueError(f"`blocks` must be at least 0, got {self.blocks}")
        if self.gradients and not self.blocks:
            raise ValueError("`gradients` of tokens need `blocks` of at least 1, got 0")


@dataclass(frozen=True, eq=False)
class TokenCall:
    """Tokens at one place of the forward.

    Attributes:
        name: the attention that they enter, or that lies in the block that they leave.
        node: the tokens as the host has them; in the graph where gradients were wanted.
        sequence_first: whether the host has them as ``(t, b, d)``.
        attention: of the block that they leave.
    """

    name: str
    node: Float[Tensor, "_ _ d"]
    sequence_first: bool = False
    attention: Attention | None = None

    @property
    def tokens(self) -> Float[Tensor, "b t d"]:
        return self.batch_first(self.node)

    def batch_first(self, tensor: Float[Tensor, "_ _ d"]) -> Float[Tensor, "b t d"]:
        """Turn what has the form of the node."""
        return tensor.transpose(0, 1) if self.sequence_first else tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """One forward under noise.

    Attributes:
        entering: as in `Capture`.
        outputs: what the classifier returned.
    """

    entering: tuple[TokenCall, ...]
    outputs: Float[Tensor, "b o"] | None


def joined(wanted: Iterable[TokenWatch]) -> TokenWatch | None:
    """One watch that shows what each of several wants; None where nothing is wanted."""
    found: TokenWatch | None = None
    for one in wanted:
        if found is None:
            found = one
            continue
        found = replace(
            found,
            noise=_noisier(found.noise, one.noise),
            blocks=max(found.blocks, one.blocks),
            gradients=found.gradients or one.gradients,
            within_blocks=found.within_blocks or one.within_blocks,
            leaving=found.leaving or one.leaving,
            class_paths=found.class_paths or one.class_paths,
            class_query=found.class_query and one.class_query,
        )
    return found


def _noisier(one: Noise | None, other: Noise | None) -> Noise | None:
    """The noise whose first samples are those of the other, too."""
    if one is None or other is None:
        return one or other
    if (one.spread, one.rng_seed) != (other.spread, other.rng_seed):
        raise ValueError(f"one forward cannot hold samples of both {one} and {other}")
    return max(one, other, key=lambda noise: noise.samples)
