"""Views: maps joined over several sizes, mirror images and tiles of a photo."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from math import lcm
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from camkit.capture.facts import NO_FACTS, ModelFacts
from camkit.capture.host import Host, find_patch_embeddings, step_of
from camkit.capture.modes import measurement
from camkit.capture.record import ATTENTION, Capture, WatchSpec
from camkit.capture.watcher import watch_host
from camkit.checks import check_model
from camkit.edits.handle import attach_to
from camkit.edits.protocol import AnyEdit
from camkit.errors import CamkitError, UnsupportedModelError
from camkit.ops.images import resize_cam
from camkit.ops.scaling import scaled_to_max
from camkit.printing import short_repr
from camkit.seeds.protocol import Seed
from camkit.tensors import RGB, Cam, Classes, Pixels
from camkit.torch_internals import count_hooks
from camkit.vocabulary import Vocabulary

Join: TypeAlias = Literal["sum", "max"]
ModelCall: TypeAlias = Callable[[Any, Tensor], Any]
"""``(model, pixels) -> output``: calls a model that takes more than images."""

Size: TypeAlias = tuple[int, int]
Resizing: TypeAlias = tuple[Size, bool]
"""A size to bring the pixels to, and whether those that shrink are smoothed."""


@dataclass(frozen=True)
class Views:
    """The views of a photo that a seed is read from, and how their maps are joined.

    Multi-scale and mirrored inference as is usual in the field; docs/views.md lists the settings of
    published methods. The photo as given is always one of the views, and refiners get its capture.
    Views are made from the model's input pixels, as in ToCo, not read again from the file. Negative
    scores of a map count as zero once it has the size at which it is joined.

    Attributes:
        scales: of rows and columns; 1.0 must be among them. Sizes are rounded to whole patches, and
            scales that round to the same size count once.
        flip: add the mirror image at each size.
        tiles: above 1, the photo is also cut into this many rows and columns of tiles; the model
            runs on each tile separately, and their maps are put side by side. After PPL (Li et al.
            2022), which cuts inner feature maps and trains for it; cutting the photo is ours.
        join: how to join the maps of different sizes, and those of tiles with them.
        join_flip: how to join a map with that of the mirror image; None is the same as ``join``.
        normalize: "after" joins the maps as the seed returns them, so that views with larger scores
            count more, as in MCTformer, ToCo and IRN; "before", which is ours, first scales each
            map to a maximum of 1.
        paired: run a size and its mirror image in one forward: faster on a device that one image
            does not fill, at twice the memory. The photo as given always runs alone.
        join_at: size at which maps are joined: the patch "grid" of the photo as given, or the
            "image", its size in pixels, as in ToCo, AFA, MCTformer and WeakTr. Joined maps have
            this size, so behind "image" no refiner may read attention; let
            `camkit.seeds.RefinedSeed` apply it to each view.
        antialias: smooth pixels that shrink; False samples them, as ToCo's and AFA's code does.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    tiles: int = 1
    join: Join = "sum"
    join_flip: Join | None = None
    normalize: Literal["after", "before"] = "after"
    paired: bool = False
    join_at: Literal["grid", "image"] = "grid"
    antialias: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.scales, Real):
            raise TypeError(f"`scales` must be a list such as (0.5, 1.0), got {self.scales!r}")
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if 1.0 not in self.scales or not all(0.0 < scale < float("inf") for scale in self.scales):
            raise ValueError(
                "`scales` must be positive and hold 1.0, as refiners read the photo as given, got "
                f"{self.scales}"
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
        if self.join_at not in ("grid", "image"):
            raise ValueError(f'`join_at` must be "grid" or "image", got {self.join_at!r}')

    def sizes(self, size: Size, patch: Size) -> tuple[Size, ...]:
        """Return rows and columns of each view, the photo's first.

        >>> Views(scales=(0.5, 1.0, 1.01)).sizes((64, 96), (16, 16))
        ((64, 96), (32, 48))
        """
        rounded = [size]
        for scale in self.scales:
            if scale != 1.0:
                sides = zip(size, patch, strict=True)
                rows, cols = (max(1, round(side * scale / step)) * step for side, step in sides)
                rounded.append((rows, cols))
        return tuple(dict.fromkeys(rounded))


_JOINED: dict[Join, Callable[[Cam, Cam], Cam]] = {"sum": torch.add, "max": torch.maximum}


def tile_spans(patches: int, tiles: int) -> list[tuple[int, int]]:
    """Return the first row (or column) of patches of each tile and the first behind it.

    >>> tile_spans(7, 2)
    [(0, 4), (4, 7)]
    """
    edges = [-(-patches * place // tiles) for place in range(tiles + 1)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


@dataclass(frozen=True, eq=False)
class ModelRunner:
    """Run a model, perhaps under an edit, and return its capture.

    Attributes:
        model: in evaluation mode.
        requires: what seeds and refiners will read from the captures. If this excludes the patches
            behind the last block, and there is no edit, that block runs for the class token only.
        edit: changes attention blocks during the forward.
        edit_blocks: the blocks to change, as in `camkit.attach`.
        vocabulary: as in `camkit.watch`.
        scores: as in `camkit.watch`.
        call: calls the model; None is ``model(pixels)``.
        facts: what the user states about the model.
        host: the model's parts with these facts, if they are known and current.
    """

    model: nn.Module
    requires: WatchSpec = ATTENTION
    edit: AnyEdit | None = None
    edit_blocks: int | tuple[int, ...] | None = None
    vocabulary: Vocabulary | None = None
    scores: Callable[[Any], Tensor] | None = None
    call: ModelCall | None = None
    facts: ModelFacts = NO_FACTS
    host: Host | None = None

    __repr__ = short_repr

    def __call__(self, pixels: Pixels, rgb: RGB | None = None) -> Capture:
        check_model(self.model)
        host = self.host or Host.of(self.model, **self.facts.arguments())
        # others may read all tokens
        skip = self.edit is not None and not (
            self.requires.class_paths or self.requires.within_blocks or count_hooks(self.model)
        )
        seen = watch_host(
            host,
            self.requires,
            rgb=rgb,
            vocabulary=self.vocabulary,
            scores=self.scores,
            skip_unused_patches=self.edit is None,
        )
        try:
            with torch.no_grad(), ExitStack() as edited, seen:
                if self.edit is not None:
                    handle = attach_to(host, self.edit, self.edit_blocks, skip_replaced=skip)
                    edited.enter_context(handle).rgb = rgb
                self._run(pixels.clone() if pixels.is_inference() else pixels)
        except Exception as error:
            note = self._note_on_channels(pixels, error) or self._note_on_size(pixels, error)
            if note:
                error.add_note(note)
            raise
        return seen.scored

    def _run(self, pixels: Pixels) -> Any:
        return self.model(pixels) if self.call is None else self.call(self.model, pixels)

    def _note_on_channels(self, pixels: Pixels, error: Exception) -> str:
        """Say how to give the channels that the model takes, if torch complains about them."""
        taken = {conv.in_channels for conv in find_patch_embeddings(self.model).values()}
        if not taken or pixels.shape[1] in taken or "channels" not in str(error):
            return ""
        how = "a camkit.Photo of your own"
        if taken == {1}:
            how = "camkit.load_photo(path, channels=1)"
        return (
            f"the model takes images of {' or '.join(map(str, taken))} channels, got "
            f"{pixels.shape[1]}; use {how} (`pixels` as the model takes them, `rgb` in colours)"
        )

    def _note_on_size(self, pixels: Pixels, error: Exception) -> str:
        """Say that the image size caused an error, if the model runs at the size it states."""
        size, stated = (pixels.shape[-2], pixels.shape[-1]), stated_size(self.model)
        if stated in (None, size) or isinstance(error, torch.OutOfMemoryError | CamkitError):
            return ""
        try:
            with measurement(pixels.device), torch.no_grad():
                self._run(resize_cam(pixels, stated))
        except Exception:  # noqa: BLE001 - the host may raise anything: then the size is not the cause
            return ""
        hint = f"use photos and views of that size: camkit.load_photo(path, size={stated})"
        if any(hasattr(module, "dynamic_img_size") for module in self.model.modules()):
            hint += ", or create the model with dynamic_img_size=True"
        elif "interpolate_pos_encoding" in signature(self.model.forward).parameters:
            with_sizes = "lambda model, pixels: model(pixels, interpolate_pos_encoding=True)"
            hint += f", or pass `call={with_sizes}`"
        return (
            f"the model takes images of {stated[0]}x{stated[1]}, the size it states, but not of "
            f"{size[0]}x{size[1]}; {hint}"
        )


def stated_size(model: nn.Module) -> Size | None:
    """Return the rows and columns of the images that a model says it takes; None if it does not."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for holder, name in ((module, "img_size"), (module, "image_size"), (config, "image_size")):
            size: Any = getattr(holder, name, None)
            sides = [size, size] if isinstance(size, int) else size
            if isinstance(sides, Sequence) and [type(side) for side in sides] == [int, int]:
                return (sides[0], sides[1])
    return None


def check_size(host: Host, pixels: Pixels) -> None:
    """Check that the sides of pictures are multiples of the patch size."""
    patch = step_of(host.embeddings)
    height, width = pixels.shape[-2:]
    if patch and (height % patch[0] or width % patch[1]):
        raise ValueError(
            f"an image of {height}x{width} cannot be cut into patches of {patch[0]}x{patch[1]}; "
            f"use camkit.load_photo(path, multiple={lcm(*patch)})"
        )


Request: TypeAlias = tuple[Seed, Views]
"""A seed and the views to read it from."""


@dataclass(frozen=True, eq=False)
class MultiViewReader:
    """Read seeds from several views of a batch.

    Attributes:
        runner: runs the model on each view.
        pixels: the batch as given.
        rgb: the same pictures in [0, 1], if known.
        capture: of the batch as given.
    """

    runner: ModelRunner
    pixels: Pixels
    rgb: RGB | None
    capture: Capture

    __repr__ = short_repr

    def seeds(self, classes: Classes, requests: Sequence[Request]) -> dict[Request, Cam]:
        """Return the maps of each seed, joined over its views.

        The model runs once for each view, however many seeds are read from it, and only one view's
        capture is held at a time, besides that of the batch as given. The maps lie on its grid, or
        have the size of its images, are at least 0 and not normalised.
        """
        requests = list(dict.fromkeys(requests))
        made = {views: self._resizings(views) for _, views in requests}
        joined: dict[Request, Cam] = {}
        for resizing in dict.fromkeys(each for several in made.values() for each in several):
            here = [request for request in requests if resizing in made[request[1]]]
            for request, cam in self._at_size(resizing, classes, here).items():
                before = joined.get(request)
                join = _JOINED[request[1].join]
                joined[request] = cam if before is None else join(before, cam)
        for tiles in dict.fromkeys(views.tiles for _, views in requests if views.tiles > 1):
            here = [request for request in requests if request[1].tiles == tiles]
            maps = self._of_tiles(tiles, classes, dict.fromkeys(seed for seed, _ in here))
            for seed, views in here:
                cam = self._placed(maps[seed], views)
                joined[seed, views] = _JOINED[views.join](joined[seed, views], cam)
        return joined

    @property
    def _size(self) -> Size:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def _resizings(self, views: Views) -> tuple[Resizing, ...]:
        """Return how the batch is resized for each view, as given first."""
        size = self._size
        sizes = (size,) if views.scales == (1.0,) else views.sizes(size, self._patch())
        return tuple((each, views.antialias or each == size) for each in sizes)

    def _at_size(
        self, resizing: Resizing, classes: Classes, requests: Sequence[Request]
    ) -> dict[Request, Cam]:
        """Return maps of one size, joined with those of its mirror image where requested."""
        seeds = dict.fromkeys(seed for seed, _ in requests)
        flipped = dict.fromkeys(seed for seed, views in requests if views.flip)
        as_given = resizing[0] == self._size
        if not as_given and flipped == seeds and all(views.paired for _, views in requests):
            capture = self._run(resizing, (False, True))
            both = {seed: seed(capture, classes.repeat(2, 1)).float() for seed in seeds}
            upright = {seed: cam[: len(classes)] for seed, cam in both.items()}
            mirrored = {seed: cam[len(classes) :] for seed, cam in both.items()}
        else:
            capture = self.capture if as_given else self._run(resizing, (False,))
            upright = {seed: seed(capture, classes).float() for seed in seeds}
            del capture  # before the next forward
            mirrored = {}
            if flipped:
                capture = self._run(resizing, (True,))
                mirrored = {seed: seed(capture, classes).float() for seed in flipped}
        joined = {}
        for seed, views in requests:
            cam = self._placed(upright[seed], views)
            if views.flip:
                twin = self._placed(mirrored[seed], views).flip(-1)
                cam = _JOINED[views.join_flip or views.join](cam, twin)
            joined[seed, views] = cam
        return joined

    def _of_tiles(self, tiles: int, classes: Classes, seeds: Iterable[Seed]) -> dict[Seed, Cam]:
        """Return maps of the tiles, put side by side."""
        grid, (rows, cols) = self.capture.grid, self._patch()
        empty = self.pixels.new_zeros(*classes.shape, grid.rows, grid.cols).float()
        maps = {seed: empty.clone() for seed in seeds}
        for top, bottom in tile_spans(grid.rows, tiles):
            for left, right in tile_spans(grid.cols, tiles):
                window = (..., slice(top * rows, bottom * rows), slice(left * cols, right * cols))
                rgb = None if self.rgb is None else self.rgb[window]
                capture = self.runner(self.pixels[window], rgb)
                for seed, cam in maps.items():
                    cam[..., top:bottom, left:right] = seed(capture, classes).float()
        return maps

    def _run(self, resizing: Resizing, mirrored: tuple[bool, ...]) -> Capture:
        """Run the model on the batch at a size, with one copy, mirrored or not, for each flag."""
        size, antialias = resizing

        def view(images: Tensor) -> Tensor:
            same = images.shape[-2:] == size
            resized = images if same else resize_cam(images, size, antialias=antialias)
            return torch.cat([resized.flip(-1) if flag else resized for flag in mirrored])

        return self.runner(view(self.pixels), None if self.rgb is None else view(self.rgb))

    def _placed(self, cam: Cam, views: Views) -> Float[Tensor, "b k H W"]:
        """Bring the maps of one view to the size at which they are joined."""
        grid = self.capture.grid
        size = self._size if views.join_at == "image" else (grid.rows, grid.cols)
        cam = (cam if cam.shape[-2:] == size else resize_cam(cam, size)).clamp_min(0.0)
        return scaled_to_max(cam) if views.normalize == "before" else cam

    def _patch(self) -> Size:
        """Return rows and columns of a patch in pixels, as the grid of the batch shows them."""
        grid, (height, width) = self.capture.grid, self.pixels.shape[-2:]
        if height % grid.rows or width % grid.cols:
            raise UnsupportedModelError(
                f"{grid.rows}x{grid.cols} patches do not divide images of {height}x{width}, so "
                "there are no sizes and tiles of whole patches; use Views(flip=True) alone"
            )
        return height // grid.rows, width // grid.cols
