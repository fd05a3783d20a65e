"""Where an edit acts: the block, its tokens' roles, the picture they were made of."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.anatomy import Anatomy
from camkit.capture.forward import grid_of_aspect
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.ops.colour import Normalisation, to_rgb
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
class Site:
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
