"""What an edit is, and what it is given of the block it acts in."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.anatomy import Anatomy, grid_of_aspect
from camkit.capture.attention import Attention, FusedAttention
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.ops.images import Normalisation, check_rgb, to_rgb
from camkit.tensors import RGB, Labels, Pixels, Tokens


@dataclass(eq=False)
class Picture:
    """The images of one forward, and their colours once an edit asks for them.

    Attributes:
        pixels: as the model was called with them; None if it was not called with images.
        rgb: in [0, 1], if the user gave them; otherwise pixels are converted back to colours.
        normalisation: of the pixels, if it is known.
        grid: rows and columns of patches, if a patch embedding showed them.
        doubt: why these may be the wrong images; empty if they are right.
    """

    pixels: Pixels | None = None
    rgb: RGB | None = None
    normalisation: Normalisation | None = None
    grid: Grid | None = None
    doubt: str = ""
    _colours: Tensor | None = None

    def colours(self, patches: int) -> Float[Tensor, "b n 3"]:
        """Return the mean colour of every patch, in [0, 1], without gradient.

        Raises:
            CaptureError: the images are unknown or uncertain.
        """
        if self.doubt or self.pixels is None:
            raise CaptureError(
                self.doubt
                or "the model was not called with images, so there are no colours; set them with "
                "`handle.rgb = ...`"
            )
        if self._colours is None:
            if self.rgb is not None:
                check_rgb(self.rgb)
            rgb = to_rgb(self.pixels, self.normalisation) if self.rgb is None else self.rgb
            grid = self.grid
            if grid is None or grid.size != patches:  # a stem of several layers shows another
                grid = grid_of_aspect(self.pixels.shape[-2:], patches)
            pooled = F.adaptive_avg_pool2d(rgb.detach().float(), (grid.rows, grid.cols))
            self._colours = pooled.flatten(2).mT.contiguous()
        if self._colours.shape[1] != patches:
            raise CaptureError(
                f"the images were cut into {self._colours.shape[1]} patches, but {patches} tokens "
                "are patches, so their colours are unknown"
            )
        return self._colours


@dataclass(frozen=True, eq=False)
class BlockContext:
    """One edited block in one forward.

    Attributes:
        anatomy: roles of the tokens.
        index: place of the block among all of the host's, from 0.
        count: how many blocks the host has.
        picture: the images of the forward.
        labels: classes present in each image, if the user gave them.
        stream: the tokens that entered the block, before its norm; for edits whose class says
            ``reads_stream = True``, if the block is a module that takes them.
    """

    anatomy: Anatomy
    index: int = 0
    count: int = 1
    picture: Picture = field(default_factory=Picture)
    labels: Labels | None = None
    stream: Tokens | None = None

    @property
    def depth(self) -> float:
        """Place of the block in the host, up to 1 for the last."""
        return (self.index + 1) / self.count


@runtime_checkable
class Edit(Protocol):
    """Changes what an attention block adds to its tokens."""

    def __call__(
        self, tokens: Tokens, output: Tokens, attention: Attention, site: BlockContext
    ) -> Tokens:
        """Return a new output of the block.

        Args:
            tokens: what went into the attention module.
            output: what it returns, after its projection and before the residual.
            attention: the attention it used; rows, columns and maps are computed on demand.
            site: which block it is, the roles of its tokens, and the images.
        """


@runtime_checkable
class KeyEdit(Protocol):
    """Weights the keys of attention, inside the host's own kernel."""

    def log_weights(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> Float[Tensor, "b s"] | Float[Tensor, "b a s"]:
        """Return what to add to the logits of every key, for all heads or for each.

        The rows of the map become proportional to ``exp(log_weights)`` times what they were.
        """


@dataclass(frozen=True, eq=False)
class Attended:
    """One block's attention, and the way its host adds it to the tokens.

    Attributes:
        attention: with its queries, keys and values.
        project: returns what the block would add if the attention had returned other values, one
            vector for each head and token: the host's own projection and layer scale.
    """

    attention: FusedAttention
    project: Callable[[Tensor], Tensor]


@runtime_checkable
class StreamEdit(Edit, Protocol):
    """An edit that also carries a second stream of tokens through the chosen blocks.

    Its call may change the host's own stream, or return ``output`` as it is.
    """

    def step(self, side: Tokens, attended: Attended) -> Tokens:
        """Return the second stream behind a block; it begins as the host's tokens."""

    def merge(self, tokens: Tokens, side: Tokens, site: BlockContext) -> Tokens:
        """Return what leaves the last chosen block, given the host's tokens and the stream."""
