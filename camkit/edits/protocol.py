"""What an edit is, and what it is given of the block it acts in."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from camkit.capture.anatomy import Anatomy, grid_of_aspect
from camkit.capture.attention import Attention, FusedAttention
from camkit.capture.passes import same_pictures, small_pictures
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.ops.images import Normalisation, check_rgb, to_rgb
from camkit.ops.paired import PairBias
from camkit.printing import short_repr
from camkit.tensors import Labels, Pixels, Tokens

_NO_IMAGES = (
    "the model was not called with images, so there are no colours; set them with "
    "`handle.rgb = ...`"
)


@dataclass(eq=False)
class Picture:
    """The images of one pass, and their colours once an edit asks for them.

    Attributes:
        pixels: of the pass, as its patch embedding was given them; None if they are unknown.
        rgb: in [0, 1], if the user gave them; otherwise pixels are converted back to colours.
        normalisation: of the pixels, if it is known.
        grid: rows and columns of patches, if a patch embedding showed them.
        whole: the images that the model was called with, which ``rgb`` belongs to; None if it
            belongs to this pass.
        further: whether other passes of the forward came before.
        doubt: why these may be the wrong images; empty if they are right.
    """

    pixels: Pixels | None = None
    rgb: Float[Tensor, "_ 3 _ _"] | None = None
    normalisation: Normalisation | None = None
    grid: Grid | None = None
    whole: Float[Tensor, "_ _ _ _"] | None = None
    further: bool = False
    doubt: str = ""
    _colours: Tensor | None = None
    _histograms: Tensor | None = None

    __repr__ = short_repr

    def shows_colours(self, edit: str) -> bool:
        """Whether colours can be asked for; a warning says that an edit does without them.

        They cannot in a further pass of a forward whose images are unknown, such as crops in a host
        without a known patch embedding.
        """
        unknown = self.further and self.pixels is None and self.rgb is None
        if unknown:
            warnings.warn(
                f"{edit} leaves the colours out in a further pass of the forward, because its "
                "images are unknown; give them as a list with one entry for each pass: "
                "`handle.rgb = [...]`",
                stacklevel=2,
            )
        return not unknown

    def colours(self, patches: int) -> Float[Tensor, "b n 3"]:
        """Return the mean colour of every patch, in [0, 1], without gradient.

        Raises:
            CaptureError: the images are unknown or uncertain.
        """
        if self.doubt or (self.pixels is None and self.rgb is None):
            raise CaptureError(self.doubt or _NO_IMAGES)
        if self._colours is None:
            self._colours = self._of_patches(self._in_colour(), patches)
        return self._checked(self._colours, patches)

    def histograms(self, patches: int) -> Float[Tensor, "b n 64"]:
        """Return the share of each of 4 x 4 x 4 colours among the pixels of every patch.

        A pixel counts for the two nearest of four levels of red, of green and of blue, so that
        shares change smoothly. There is no gradient; raises the errors of `colours`.
        """
        if self.doubt or (self.pixels is None and self.rgb is None):
            raise CaptureError(self.doubt or _NO_IMAGES)
        if self._histograms is None:
            rgb = self._in_colour().detach().float()
            levels = torch.linspace(0.0, 1.0, 4, device=rgb.device).view(1, 1, 4, 1, 1)
            near = (1.0 - 3.0 * (rgb[:, :, None] - levels).abs()).clamp_min(0.0)
            red, green, blue = near.unbind(1)
            joint = red[:, :, None, None] * green[:, None, :, None] * blue[:, None, None]
            self._histograms = self._of_patches(joint.flatten(1, 3), patches)
        return self._checked(self._histograms, patches)

    def _of_patches(self, values: Tensor, patches: int) -> Tensor:
        """Average values of pixels, ``(b, c, rows, cols)``, over each patch."""
        grid = self.grid
        if grid is None or grid.size != patches:  # a stem of several layers shows another
            try:
                grid = grid_of_aspect(values.shape[-2:], patches)
            except UnsupportedModelError:
                if grid is None:
                    raise
        pooled = F.adaptive_avg_pool2d(values.detach().float(), (grid.rows, grid.cols))
        return pooled.flatten(2).mT.contiguous()

    def _checked(self, values: Tensor, patches: int) -> Tensor:
        if values.shape[1] != patches:
            raise CaptureError(
                f"the images were cut into {values.shape[1]} patches, but {patches} tokens "
                "are patches, so their colours are unknown"
            )
        return values

    def _in_colour(self) -> Tensor:
        """Return the pictures of the pass in [0, 1], of any size."""
        whole, pixels, rgb = self.whole, self.pixels, self.rgb
        if pixels is not None and whole is not None and not _one_memory(pixels, whole):
            if same_pictures(small_pictures(pixels), whole):
                pixels = whole  # as the user normalised them, whatever the host did to them
            else:
                rgb = None
        if rgb is not None:
            check_rgb(rgb)
            return rgb
        if pixels is None:
            raise CaptureError(_NO_IMAGES)
        return to_rgb(pixels, self.normalisation)


def _one_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of the same numbers."""
    same_form = one.shape == other.shape and one.stride() == other.stride()
    return one is other or (same_form and one.data_ptr() == other.data_ptr())


@dataclass(frozen=True, eq=False)
class BlockContext:
    """One edited block in one forward.

    Attributes:
        anatomy: roles of the tokens.
        index: place of the block among all of its tower's, from 0.
        count: how many blocks the tower has; a teacher beside the model is a tower of its own.
        picture: the images of the forward.
        labels: classes present in each image, if the user gave them.
        stream: the tokens that entered the block, before its norm; for edits whose class says
            ``reads_stream = True``, if the block is a module that takes them.
        strength: `camkit.edits.Handle.strength`, which edits multiply their own strengths with.
    """

    anatomy: Anatomy
    index: int = 0
    count: int = 1
    picture: Picture = field(default_factory=Picture)
    labels: Labels | None = None
    stream: Tokens | None = None
    strength: float = 1.0

    __repr__ = short_repr

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


@runtime_checkable
class PairEdit(Protocol):
    """Adds to the logits of pairs of tokens, inside the host's own attention.

    What a watch records includes it, so that every seed and refiner reads the edited attention. An
    edit may change outputs too (`Edit`).
    """

    def pair_bias(
        self, tokens: Tokens, attention: Attention, site: BlockContext
    ) -> PairBias | None:
        """Return features of the tokens whose products are added to the logits; None for none.

        Args:
            tokens: what went into the attention module.
            attention: the attention as it is without this edit.
            site: which block it is, the roles of its tokens, and the images.
        """


AnyEdit: TypeAlias = Edit | KeyEdit | PairEdit
"""What `camkit.attach` takes.

A class may say ``default_blocks = n``: `attach` then edits the last n blocks unless it is told
otherwise. ``checks_scores = True`` warns if the class scores of a host move far
(`camkit.edits.effect`). ``changes_output`` and ``changes_logits``, if an edit has them, say whether
its settings change one or the other at all.
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
