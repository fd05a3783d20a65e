"""Views of a photo, the model run on each, and the maps of all of them joined."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from camkit.capture.host import find_patch_embeddings
from camkit.capture.record import ATTENTION, Capture, WatchSpec
from camkit.capture.watcher import watch
from camkit.edits.handle import attach
from camkit.edits.protocol import Edit, KeyEdit
from camkit.errors import UnsupportedModelError
from camkit.ops.images import resize_cam
from camkit.tensors import RGB, Cam, Classes, Pixels
from camkit.vocabulary import Vocabulary

Join: TypeAlias = Literal["sum", "max"]
Size: TypeAlias = tuple[int, int]

_TINY = 1e-8  # a map without evidence stays zero


@dataclass(frozen=True)
class Views:
    """Which views of a photo a seed is read from, and how their maps are joined.

    Multi-scale and mirrored inference as the field does it; docs/views.md lists who does what. The
    photo as it is given is always among the views, and it is its capture that refiners see: its
    attention lies on the grid of the joined map and its colours are those of the picture. Views
    are made from the pixels that the model gets, as ToCo does, not read again from the file.

    Attributes:
        scales: of rows and columns, 1.0 among them. Sizes are rounded to whole patches of the host,
            and scales that round to one size count once.
        flip: look at each size mirrored as well.
        tiles: above 1, the photo is also cut into so many rows and columns of tiles, each looked at
            alone, and their maps laid side by side, so that no tile knows of the others. After PPL
            (Li et al. 2022), which cuts inner feature maps and trains for it; cutting the photo
            itself, without training, is ours.
        join: how the maps of sizes are joined, and of tiles with them.
        join_flip: how a map and its mirrored twin are; None is as ``join``.
        normalize: "after" joins maps as the seed makes them, so that strong views count more, as
            MCTformer, ToCo and IRN do; "before" scales each map of each view to a maximum of 1
            first, which is ours.
        paired: look at a size and its mirror image in one forward; faster where a device is not
            filled by one image, at twice the memory. The photo as it is given is always looked at
            alone.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    tiles: int = 1
    join: Join = "sum"
    join_flip: Join | None = None
    normalize: Literal["after", "before"] = "after"
    paired: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if 1.0 not in self.scales or not all(0.0 < scale < float("inf") for scale in self.scales):
            raise ValueError(
                "`scales` must be positive and hold 1.0, as refiners see the photo as it is given, "
                f"got {self.scales}"
            )
        if self.tiles < 1:
            raise ValueError(f"`tiles` must be at least 1, got {self.tiles}")
        if self.join not in ("sum", "max") or self.join_flip not in ("sum", "max", None):
            raise ValueError(
                '`join` must be "sum" or "max" (and `join_flip`, which may be None), got '
                f"{self.join!r} and {self.join_flip!r}"
            )
        if self.normalize not in ("after", "before"):
            raise ValueError(f'`normalize` must be "after" or "before", got {self.normalize!r}')

    @property
    def single(self) -> bool:
        """Whether there is nothing to look at but the photo as it is given."""
        return self.scales == (1.0,) and not self.flip and self.tiles == 1

    def sizes(self, size: Size, patch: Size) -> tuple[Size, ...]:
        """Rows and columns of every view, each once, those of the photo first.

        >>> Views(scales=(0.5, 1.0, 1.01)).sizes((64, 96), (16, 16))
        ((64, 96), (32, 48))
        """
        others = (
            tuple(
                max(1, round(side * scale / step)) * step
                for side, step in zip(size, patch, strict=True)
            )
            for scale in self.scales
            if scale != 1.0
        )
        return tuple(dict.fromkeys((size, *((rows, cols) for rows, cols in others))))

    def levelled(self, cam: Cam) -> Cam:
        """The map of one view as it takes part in the join."""
        if self.normalize == "after":
            return cam
        top = cam.amax((-2, -1), keepdim=True)
        return cam / top.clamp_min(_TINY) * (top > _TINY)


def join_maps(how: Join, one: Cam, other: Cam) -> Cam:
    """The sum or the maximum of two maps."""
    return one + other if how == "sum" else torch.maximum(one, other)


def tile_spans(patches: int, tiles: int) -> list[tuple[int, int]]:
    """First and last row (or column) of patches of each tile; as equal as they can be.

    >>> tile_spans(7, 2)
    [(0, 4), (4, 7)]
    """
    edges = [-(-patches * place // tiles) for place in range(tiles + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


@dataclass(frozen=True, eq=False)
class ModelRunner:
    """Runs a model under one edit and keeps what it showed.

    Attributes:
        model: borrowed, in evaluation mode.
        requires: what seeds and refiners will read from the captures. If nothing reads patches
            behind the last block and no edit acts, that block runs for the class token only.
        edit: changes attention blocks during the forward, and only then.
        edit_blocks: which, as in `camkit.attach`.
        vocabulary: joins classifier outputs.
        scores: makes ``(b, classes)`` scores of what the model returns, as in `camkit.watch`.
    """

    model: nn.Module
    requires: WatchSpec = ATTENTION
    edit: Edit | KeyEdit | None = None
    edit_blocks: int | tuple[int, ...] | None = None
    vocabulary: Vocabulary | None = None
    scores: Callable[[Any], Tensor] | None = None

    def __call__(self, pixels: Pixels, rgb: RGB | None = None) -> Capture:
        """Look at a batch.

        Args:
            pixels: normalised images of one size.
            rgb: the same pictures in [0, 1], for edits and refiners that look at colours.
        """
        seen = watch(
            self.model,
            rgb=rgb,
            vocabulary=self.vocabulary,
            scores=self.scores,
            requires=self.requires,
            skip_unused_patches=self.edit is None,
        )
        with torch.no_grad(), ExitStack() as edited, seen:
            if self.edit is not None:
                handle = attach(self.model, self.edit, blocks=self.edit_blocks)
                edited.enter_context(handle).rgb = rgb
            try:
                self.model(pixels.clone() if pixels.is_inference() else pixels)
            except Exception as error:
                rows, cols = pixels.shape[-2:]
                error.add_note(
                    f"camkit was showing the model a view of {rows}x{cols} pixels; a host of one "
                    "fixed size takes no other (timm: create it with dynamic_img_size=True)"
                )
                raise
        return seen.capture

    @property
    def patch(self) -> tuple[int, int] | None:
        """Rows and columns of a patch in pixels; None where no patch embedding shows them."""
        embedding = next(iter(find_patch_embeddings(self.model).values()), None)
        return None if embedding is None else (embedding.stride[0], embedding.stride[-1])


def check_size(model: nn.Module, pixels: Pixels) -> None:
    """Refuse pictures that cannot be cut into the model's patches.

    Raises:
        ValueError: a side is no multiple of a patch's.
    """
    patch = ModelRunner(model).patch
    height, width = pixels.shape[-2:]
    if patch and (height % patch[0] or width % patch[1]):
        raise ValueError(
            f"an image of {height}x{width} cannot be cut into patches of {patch[0]}x{patch[1]}; "
            f"use camkit.load_photo(path, multiple={patch[0]})"
        )


Reading: TypeAlias = Callable[[Capture, Classes], Cam]
"""A seed, or a function like one."""


@dataclass(frozen=True, eq=False)
class MultiViewReader:
    """A batch and the first look at it, from which all its views are made.

    Attributes:
        look: runs the model.
        pixels: as the model got them.
        rgb: the same pictures in [0, 1], where they are known.
        capture: what the model showed.
    """

    look: ModelRunner
    pixels: Pixels
    rgb: RGB | None
    capture: Capture

    def seeds(
        self, classes: Classes, wanted: Sequence[tuple[Reading, Views]]
    ) -> dict[tuple[Reading, Views], Cam]:
        """Seeds, each joined over its views; one forward for each view, whoever wants it.

        Only one view's capture is held at a time, besides that of the photo as it is given.

        Args:
            classes: asked of each image, padded with -1.
            wanted: seeds and the views they are read from.

        Returns:
            Maps on the grid of the photo as it is given, at least 0, not normalised.
        """
        base: Size = (self.pixels.shape[-2], self.pixels.shape[-1])
        sizes = {views: self._sizes(views, base) for _, views in wanted}
        joined: dict[tuple[Reading, Views], Cam] = {}
        for size in dict.fromkeys(size for found in sizes.values() for size in found):
            here = [pair for pair in dict.fromkeys(wanted) if size in sizes[pair[1]]]
            for (reading, views), cam in self._of_size(size, classes, here).items():
                before = joined.get((reading, views))
                joined[reading, views] = (
                    cam if before is None else join_maps(views.join, before, cam)
                )
        for tiles in dict.fromkeys(views.tiles for _, views in wanted if views.tiles > 1):
            here = [pair for pair in dict.fromkeys(wanted) if pair[1].tiles == tiles]
            readings = tuple(dict.fromkeys(reading for reading, _ in here))
            laid = self._of_tiles(tiles, classes, readings)
            for reading, views in here:
                cam = views.levelled(laid[reading])
                joined[reading, views] = join_maps(views.join, joined[reading, views], cam)
        return joined

    def _sizes(self, views: Views, base: Size) -> tuple[Size, ...]:
        if views.scales == (1.0,):
            return (base,)
        return views.sizes(base, self._patch())

    def _patch(self) -> Size:
        patch = self.look.patch
        if patch is None:
            raise UnsupportedModelError(
                "no patch embedding found (a convolution with 3 input channels, stride = kernel "
                ">= 4), so sizes cannot be rounded to whole patches; use Views(flip=True) alone"
            )
        return patch

    def _of_size(
        self, size: Size, classes: Classes, wanted: Sequence[tuple[Reading, Views]]
    ) -> dict[tuple[Reading, Views], Cam]:
        """Maps read at one size, mirrored twins joined."""
        whole = tuple(dict.fromkeys(reading for reading, _ in wanted))
        turned = tuple(dict.fromkeys(reading for reading, views in wanted if views.flip))
        paired = turned == whole and all(views.paired for _, views in wanted)
        if size == (self.pixels.shape[-2], self.pixels.shape[-1]):
            plain = self._read(self.capture, classes, whole)
            mirrored = self._read(self._look(size, (True,)), classes, turned) if turned else {}
        elif paired:
            both = self._read(self._look(size, (False, True)), classes.repeat(2, 1), whole)
            plain = {reading: cam[: len(classes)] for reading, cam in both.items()}
            mirrored = {reading: cam[len(classes) :] for reading, cam in both.items()}
        else:
            plain = self._read(self._look(size, (False,)), classes, whole)
            mirrored = self._read(self._look(size, (True,)), classes, turned) if turned else {}
        found = {}
        for reading, views in wanted:
            cam = views.levelled(plain[reading])
            if views.flip:
                twin = views.levelled(mirrored[reading]).flip(-1)
                cam = join_maps(views.join_flip or views.join, cam, twin)
            found[reading, views] = cam
        return found

    def _of_tiles(
        self, tiles: int, classes: Classes, readings: Sequence[Reading]
    ) -> dict[Reading, Cam]:
        """Maps of the tiles, each looked at alone, side by side."""
        grid, (rows, cols) = self.capture.grid, self._patch()
        laid = {
            reading: self.pixels.new_zeros(*classes.shape, grid.rows, grid.cols).float()
            for reading in readings
        }
        for top, bottom in tile_spans(grid.rows, tiles):
            for left, right in tile_spans(grid.cols, tiles):
                window = (slice(top * rows, bottom * rows), slice(left * cols, right * cols))
                tile = self.pixels[..., window[0], window[1]]
                rgb = None if self.rgb is None else self.rgb[..., window[0], window[1]]
                capture = self.look(tile, rgb)
                for reading, cam in laid.items():
                    cam[..., top:bottom, left:right] = reading(capture, classes).float()
        return laid

    def _look(self, size: Size, mirrored: tuple[bool, ...]) -> Capture:
        rgb = None if self.rgb is None else _seen(self.rgb, size, mirrored)
        return self.look(_seen(self.pixels, size, mirrored), rgb)

    def _read(
        self, capture: Capture, classes: Classes, readings: Sequence[Reading]
    ) -> dict[Reading, Cam]:
        """Maps of one view, brought to the grid of the photo as it is given."""
        grid = (self.capture.grid.rows, self.capture.grid.cols)
        maps = {reading: reading(capture, classes).float() for reading in readings}
        return {
            reading: cam if cam.shape[-2:] == grid else resize_cam(cam, grid)
            for reading, cam in maps.items()
        }


def _seen(images: Tensor, size: Size, mirrored: tuple[bool, ...]) -> Tensor:
    same = (images.shape[-2], images.shape[-1]) == size
    resized = images if same else resize_cam(images, size)
    return torch.cat([resized.flip(-1) if turn else resized for turn in mirrored])
