"""What a patch or a class attends to: one row, column or step of the recorded attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.capture.attention import Attention
from camkit.capture.record import Capture, ClassCall
from camkit.refiners import Propagate

Kind: TypeAlias = Literal["row", "column", "affinity", "class"]
"""What is shown: what a patch reads, what reads it, where its score spreads, what a class reads."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_CAPTURE = "capture = refined.stages(photo.pixels, rgb=photo.rgb).capture"
_SPREAD = Propagate(steps=1, blocks=6, balance=3)


@dataclass(frozen=True)
class Query:
    """A question about the attention of a photo.

    Attributes:
        kind: see `Kind`.
        row: of the patch, on the grid.
        column: of the patch.
        block: index of the block, from 0; None averages all recorded ones.
        head: index of the head; None averages all.
        token: which class token, for models with several.
    """

    kind: Kind = "row"
    row: int = 0
    column: int = 0
    block: int | None = None
    head: int | None = None
    token: int = 0

    @property
    def code(self) -> str:
        """Python that gives the map; its last line is the expression.

        ``refined`` is the pipeline with the method of the page, ``photo`` a photo that it has
        prepared (`camkit.Pipeline.prepare`).
        """
        if self.kind == "affinity":
            lines = [
                _CAPTURE,
                "one = torch.zeros(1, 1, capture.grid.rows, capture.grid.cols)",
                f"one[0, 0, {self.row}, {self.column}] = 1.0",
                f"camkit.refiners.{_SPREAD!r}(one, capture)[0, 0]",
            ]
            return "\n".join(lines)
        heads = ".mean(1)" if self.head is None else f"[:, {self.head}]"
        if self.kind == "class":
            source = "capture.class_calls()"
            each = f"each.attention.rows(each.queries){heads}[0, {self.token}, each.patches]"
        else:
            source = "capture.blocks"
            each = f"each.rows([patches[place]]){heads}[0, 0, patches]"
            if self.kind == "column":
                each = f"each.columns([patches[place]]){heads}[0, patches, 0]"
        lines = [_CAPTURE]
        if self.kind != "class":
            lines.append("patches = capture.patches")
            lines.append(f"place = {self.row} * capture.grid.cols + {self.column}")
        if self.block is not None:
            lines.append(f"each = {source}[{self.block}]")
        else:
            each = f"torch.stack([{each} for each in {source}]).mean(0)"
        return "\n".join([*lines, f"capture.grid.fold({each}[None, None])[0, 0]"])


def attention_map(capture: Capture, query: Query) -> Float[Tensor, "h w"]:
    """Return an attention map on the patch grid.

    Args:
        capture: of one photo.
        query: what to show.

    Returns:
        Attention as recorded: a row of one head sums to at most 1 over the patches.

    Raises:
        ValueError: there is no such patch, block, head or class token.
        CaptureError: the model has no class token, or its attention has no such form.
    """
    grid = capture.grid
    if not (0 <= query.row < grid.rows and 0 <= query.column < grid.cols):
        raise ValueError(
            f"the patch must lie on the {grid.rows}x{grid.cols} grid, got row {query.row}, "
            f"column {query.column}"
        )
    place = query.row * grid.cols + query.column
    with torch.no_grad():
        if query.kind == "affinity":
            one = torch.zeros(1, 1, grid.rows, grid.cols, device=capture.device)
            one[0, 0, query.row, query.column] = 1.0
            return _SPREAD(one, capture)[0, 0]
        if query.kind == "class":
            calls = capture.class_calls()
            maps = [_class_row(calls[i], query) for i in _blocks(len(calls), query)]
        else:
            blocks, patches = capture.blocks, capture.patches
            maps = [_patch(blocks[i], patches, place, query) for i in _blocks(len(blocks), query)]
        return grid.fold(torch.stack(maps).mean(0)[None, None])[0, 0]


def _blocks(count: int, query: Query) -> range:
    if query.block is None:
        return range(count)
    if not 0 <= query.block < count:
        raise ValueError(f"the block must be 0 to {count - 1}, got {query.block}")
    return range(query.block, query.block + 1)


def _patch(
    block: Attention, patches: Sequence[int], place: int, query: Query
) -> Float[Tensor, " n"]:
    if query.kind == "row":
        return _head(block.rows([patches[place]]), query)[0, 0, patches]
    return _head(block.columns([patches[place]]), query)[0, patches, 0]


def _class_row(call: ClassCall, query: Query) -> Float[Tensor, " n"]:
    count = len(call.queries)
    if not 0 <= query.token < count:
        raise ValueError(f"the class token must be 0 to {count - 1}, got {query.token}")
    return _head(call.attention.rows(call.queries), query)[0, query.token, call.patches]


def _head(maps: Float[Tensor, "1 a t s"], query: Query) -> Float[Tensor, "1 t s"]:
    if query.head is None:
        return maps.mean(1)
    if not 0 <= query.head < maps.shape[1]:
        raise ValueError(f"the head must be 0 to {maps.shape[1] - 1}, got {query.head}")
    return maps[:, query.head]
