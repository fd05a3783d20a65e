"""A forward while it runs: what has been seen so far, and whether it can be read as patches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from camkit.capture.anatomy import Anatomy
from camkit.capture.entered import Entered
from camkit.capture.record import PoolingCall, scores_of
from camkit.capture.selection import Kept
from camkit.capture.tail import TailCall, is_classifier
from camkit.capture.tokens import Sample, TokenCall
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid


@dataclass
class Forward:
    """What has been seen of the forward that is running."""

    images: int | None = None
    size: Sequence[int] = ()
    anatomy: Anatomy | None = None
    kept: list[Kept] = field(default_factory=list)
    pooling: list[PoolingCall] = field(default_factory=list)
    calls: int = 0
    modules: int = 0
    running: str = ""
    entered: Entered = field(default_factory=Entered)
    grid: Grid | None = None
    tail: list[TailCall] = field(default_factory=list)
    outputs: Tensor | None = None
    entering: list[TokenCall] = field(default_factory=list)
    leaving: list[TokenCall] = field(default_factory=list)
    class_paths: list[TokenCall] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    class_query_only: bool = False

    def known_tail(self) -> tuple[TailCall, ...]:
        """Calls behind the last block, without the tokens that were never evaluated."""
        if not self.class_query_only or self.anatomy is None:
            return tuple(self.tail)
        place = self.anatomy.class_tokens[0]

        def known(tokens: Tensor) -> Tensor:
            return tokens[:, place, None] if tokens.dim() == 3 else tokens

        return tuple(
            TailCall(call.module, known(call.input), known(call.output))
            for call in self.tail
            if call.input.dim() == call.output.dim() < 4
        )

    def read(self, output: Any, scores: Callable[[Any], Tensor] | None, *, at_core: bool) -> None:
        """Find the class scores in what the model returned; a wrapper around it makes none."""
        if scores is not None:
            self.outputs = scores(output)
        elif at_core:
            self.outputs = self.classified(scores_of(output))
        if self.outputs is not None and not torch.is_grad_enabled():
            self.outputs = self.outputs.detach()

    def classified(self, outputs: Tensor | None) -> Tensor | None:
        """The outputs if they are class scores: a classifier made them, or each has a class token.

        Embeddings look the same, and a gradient of their third number means nothing.
        """
        if outputs is None or self.anatomy is None:
            return None
        made = any(
            call.output.flatten(1).shape == outputs.shape
            for call in self.tail
            if is_classifier(call.module)
        )
        owned = 1 < len(self.anatomy.class_tokens) == outputs.shape[-1]
        return outputs if made or owned else None


def checked_grid(forward: Forward, said: Grid | None, kept: Sequence[Kept]) -> tuple[Anatomy, Grid]:
    """Token roles and patch grid of a finished forward, or why it cannot be read by patches."""
    if forward.anatomy is None:
        raise CaptureError("the tokens of this forward were not measured")
    against = next((call.against for call in kept if call.against), "")
    if against:
        raise UnsupportedModelError(against)
    shapes = [call.attention.shape for call in kept]
    lengths = sorted({shape[2] for shape in shapes})
    if len(lengths) > 1:
        raise UnsupportedModelError(
            f"the watched blocks run on {', '.join(map(str, lengths))} tokens, and maps of one "
            "resolution do not fit another; keep blocks of one resolution with `blocks=`"
        )
    tokens = shapes[-1][2]
    patches = len(forward.anatomy.patches(tokens))
    grid = said or forward.grid or grid_of_aspect(forward.size, patches)
    if patches != grid.size:
        raise CaptureError(
            f"{tokens} tokens less {len(forward.anatomy.special_tokens)} special ones leave "
            f"{patches}, but the patch grid is {grid.rows}x{grid.cols}; name what is wrong with "
            "`class_tokens=` or `grid=`"
        )
    return forward.anatomy, grid


def grid_of_aspect(size: Sequence[int], count: int) -> Grid:
    """The one grid that has this number of patches and exactly the image's aspect."""
    if len(size) == 2 and count:
        height, width = size
        rows = round((count * height / width) ** 0.5)
        if rows and count % rows == 0 and rows * width == count // rows * height:
            return Grid(rows, count // rows)
    raise UnsupportedModelError(
        "no patch embedding found (a convolution with 3 input channels, stride = kernel >= 4), "
        "so the patch grid is unknown; name it with `grid=(rows, cols)`"
    )
