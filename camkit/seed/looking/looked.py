"""Seeds read from many views of a batch: one forward for each view, whoever wants it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from camkit.capture.record import Capture
from camkit.errors import UnsupportedModelError
from camkit.ops.resampling import resize_cam
from camkit.seed.looking.look import Look
from camkit.seed.looking.views import Size, Views, join_maps, tile_spans
from camkit.tensors import RGB, Cam, Classes, Pixels

Reading: TypeAlias = Callable[[Capture, Classes], Cam]
"""A seed, or a function like one."""


@dataclass(frozen=True, eq=False)
class Looked:
    """A batch and the first look at it, from which all its views are made.

    Attributes:
        look: runs the model.
        pixels: as the model got them.
        rgb: the same pictures in [0, 1], where they are known.
        capture: what the model showed.
    """

    look: Look
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
