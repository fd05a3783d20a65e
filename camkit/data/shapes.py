"""Drawn images with exact masks: a data set for tests and demos that needs no download."""

import json
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image

from camkit.data.voc import VOCFolder
from camkit.mask import voc_palette

SHAPE_CLASSES = ("circle", "square", "triangle")
"""The classes of the drawn images; circles are red, squares blue, triangles yellow."""

_COLOURS = ((214, 48, 49), (41, 98, 200), (243, 190, 38))
_SMALLEST = 16  # pixels; smaller shapes have too few pixels to tell them apart


def draw_shapes(
    count: int, *, size: tuple[int, int] = (64, 96), rng_seed: int = 0
) -> list[tuple[UInt8[np.ndarray, "H W 3"], Int64[np.ndarray, "H W"]]]:
    """Draw images of one or two shapes on a noisy ground.

    Nothing is antialiased, so the masks are exact. The first shape of an image takes the classes in
    turn; a second one has another class and another half of the image.

    Args:
        count: number of images.
        size: rows and columns; 64 x 96 is 4 x 6 patches of 16, the least that a map can resolve.
        rng_seed: seed of the draw; the same seed always draws the same images.

    Returns:
        Pictures with their masks: 0 background, 1 circle, 2 square, 3 triangle.

    Raises:
        ValueError: ``count`` is below 1, or a side is below 16.
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    if min(size) < _SMALLEST:
        raise ValueError(f"`size` must be at least {_SMALLEST} on both sides, got {size}")
    rng = np.random.default_rng(rng_seed)
    return [_draw(rng, size, index % len(SHAPE_CLASSES)) for index in range(count)]


def write_shapes(
    folder: str | Path, count: int, *, size: tuple[int, int] = (64, 96), rng_seed: int = 0
) -> VOCFolder:
    """Write drawn images as a folder in the layout of PASCAL VOC.

    Args:
        folder: is created if it does not exist.
        count: number of images; the last quarter, at least one, is "val", the rest is "train".
        size: as in `draw_shapes`.
        rng_seed: as in `draw_shapes`.

    Returns:
        The data set, as `open_voc` opens it.

    Raises:
        ValueError: there are too few images for two splits, or a side is below 16.
    """
    if count < 2:
        raise ValueError(f"`count` must be at least 2, one image for each split, got {count}")
    root = Path(folder).absolute()
    lists = root / "ImageSets" / "Segmentation"
    for path in (root / "JPEGImages", root / "SegmentationClass", lists):
        path.mkdir(parents=True, exist_ok=True)
    labels: dict[str, list[str]] = {}
    for index, (rgb, mask) in enumerate(draw_shapes(count, size=size, rng_seed=rng_seed)):
        name = f"shapes_{index:04d}"
        labels[name] = [SHAPE_CLASSES[value - 1] for value in np.unique(mask).tolist() if value]
        photo = root / "JPEGImages" / f"{name}.jpg"  # subsampled colours would cross mask edges
        Image.fromarray(rgb).save(photo, quality=95, subsampling=0)
        ids = Image.fromarray(mask.astype(np.uint8))
        ids.putpalette(voc_palette())
        ids.save(root / "SegmentationClass" / f"{name}.png")
    names = list(labels)
    last = max(1, count // 4)
    for split, members in (("train", names[:-last]), ("val", names[-last:])):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in members), "utf-8")
    content = {"classes": SHAPE_CLASSES, "labels": labels}
    (root / "labels.json").write_text(json.dumps(content, indent=1), "utf-8")
    return VOCFolder(root, SHAPE_CLASSES, ("train", "val"))


def _draw(
    rng: np.random.Generator, size: tuple[int, int], first: int
) -> tuple[UInt8[np.ndarray, "H W 3"], Int64[np.ndarray, "H W"]]:
    rows, cols = size
    picture = _ground(rng, size)
    mask = np.zeros(size, dtype=np.int64)
    boxes = [(0, 0, rows, cols)]  # top, left, bottom, right
    classes = [first]
    if rng.random() < 0.5:
        boxes = [(0, 0, rows, cols // 2), (0, cols // 2, rows, cols)]
        if cols < rows:
            boxes = [(0, 0, rows // 2, cols), (rows // 2, 0, rows, cols)]
        rng.shuffle(boxes)
        classes.append((first + int(rng.integers(1, len(SHAPE_CLASSES)))) % len(SHAPE_CLASSES))
    for index, box in zip(classes, boxes, strict=False):
        inside = _shape(rng, size, index, box)
        shade = rng.uniform(0.85, 1.1) * np.array(_COLOURS[index])
        picture[inside] = shade + 0.25 * (picture[inside] - picture[inside].mean())
        mask[inside] = index + 1
    return picture.clip(0, 255).round().astype(np.uint8), mask


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> Float[np.ndarray, "H W 3"]:
    rows, cols = size
    ground = np.full((rows, cols, 3), rng.uniform(90, 165, 3))
    for cell, strength in ((16, 14.0), (4, 9.0), (1, 6.0)):  # clouds, blotches, grain
        coarse = rng.normal(0, strength, (rows // cell + 2, cols // cell + 2, 1))
        ground += cv2.resize(coarse, (cols, rows), interpolation=cv2.INTER_CUBIC)[:, :, None]
    return ground


def _shape(
    rng: np.random.Generator, size: tuple[int, int], index: int, box: tuple[int, int, int, int]
) -> Bool[np.ndarray, "H W"]:
    top, left, bottom, right = box
    radius = rng.uniform(0.55, 0.9) * (min(bottom - top, right - left) / 2)
    y = rng.uniform(top + radius, bottom - radius)
    x = rng.uniform(left + radius, right - radius)
    down, across = np.mgrid[: size[0], : size[1]] + 0.5  # pixel centres
    down, across = (down - y) / radius, (across - x) / radius
    if SHAPE_CLASSES[index] == "circle":
        return down**2 + across**2 <= 1
    if SHAPE_CLASSES[index] == "square":
        return np.maximum(abs(down), abs(across)) <= 0.85
    return (down <= 0.8) & (2 * abs(across) <= down + 1)  # apex up, as wide as it is high
