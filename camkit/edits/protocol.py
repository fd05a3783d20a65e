"""What an edit is, and what it is told about the block that it acts in."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.anatomy import Anatomy
from camkit.capture.attention import Attention
from camkit.capture.session import grid_of_aspect
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.ops.images import Normalisation, to_rgb
from camkit.tensors import RGB, Labels, Pixels, Tokens


@dataclass(eq=False)
class Picture:
    """The images of one forward, and their colours once somebody asks for them.

    Attributes:
        pixels: as the model was called with them; none where it was never entered.
        rgb: in [0, 1], where the user gave them; otherwise pixels are brought back to colours.
        normalisation: of the pixels, where it is known.
        grid: rows and columns of patches, where a patch embedding showed them.
        doubt: why these may be the wrong images; empty where they are right.
    """

    pixels: Pixels | None = None
    rgb: RGB | None = None
    normalisation: Normalisation | None = None
    grid: Grid | None = None
    doubt: str = ""
    _colours: Tensor | None = None

    def colours(self, patches: int) -> Float[Tensor, "b n 3"]:
        """Mean colour of every patch, in [0, 1], without gradient.

        Raises:
            CaptureError: the images are not known, or not for sure.
        """
        if self.doubt or self.pixels is None:
            raise CaptureError(
                self.doubt
                or "the model was never called with images, so there are no colours; "
                "set them with `handle.rgb = ...`"
            )
        if self._colours is None:
            rgb = to_rgb(self.pixels, self.normalisation) if self.rgb is None else self.rgb
            grid = self.grid or grid_of_aspect(self.pixels.shape[-2:], patches)
            pooled = F.adaptive_avg_pool2d(rgb.detach().float(), (grid.rows, grid.cols))
            self._colours = pooled.flatten(2).mT.contiguous()
        if self._colours.shape[1] != patches:
            raise CaptureError(
                f"{self._colours.shape[1]} patches were cut from the images, but {patches} are "
                "among the tokens, so their colours are not known"
            )
        return self._colours


@dataclass(frozen=True, eq=False)
class BlockContext:
    """One edited block in one forward.

    Attributes:
        anatomy: roles of the tokens.
        index: place of the block among all of the host's, from 0.
        count: how many blocks the host has.
        picture: what the tokens were made of.
        labels: classes present in each image, where the user gave them.
        stream: the tokens that entered the block, before its norm; for edits whose class says
            ``reads_stream = True``, where the block is a module that takes them.
    """

    anatomy: Anatomy
    index: int = 0
    count: int = 1
    picture: Picture = field(default_factory=Picture)
    labels: Labels | None = None
    stream: Tokens | None = None

    @property
    def depth(self) -> float:
        """How far up the host the block is: 1 for the last."""
        return (self.index + 1) / self.count


@runtime_checkable
class Edit(Protocol):
    """Changes what an attention block adds to its tokens."""

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
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
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> Float[Tensor, "b s"] | Float[Tensor, "b a s"]:
        """What to add to the logits of every key, for all heads or for each.

        The rows of the map become proportional to ``exp(log_weights)`` times what they were.
        """
