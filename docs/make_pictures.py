"""Make the images of README and docs: photographs of scikit-image, and the flow of camkit.

    python docs/make_pictures.py

Writes docs/images/photos_to_masks.jpg, prompts.jpg, regions.jpg and flow.svg. The model ships
with camkit, so nothing is downloaded, and README's lines give the same masks.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import camkit
from camkit.capture import Capture
from camkit.method import WITHOUT_EDGES
from camkit.paint import contact_sheet, overlay_cam, overlay_mask
from camkit.refiners import Regions, Segments
from camkit.segmenters import Prompt

IMAGES = Path(__file__).parent / "images"
SHOWN = {"chelsea": ("cat",), "coffee": ("cup",), "camera": ("person", "tripod")}  # free of rights
TITLES = ("photo", "first map", "refined map", "mask", "mask without a class given")

PROMPTED = {"chelsea": 1, "astronaut": 2, "coffee": 3}  # values of their masks
NAMES = {1: "cat", 2: "person", 3: "cup"}

BOXES = {  # name: column, row, label of its outgoing arrow
    "Photo": (0, 1, "pixels"),
    "your model": (1, 1, "recorded"),
    "Capture": (2, 1, ""),
    "Seed": (3, 1, "first maps"),
    "Refiner, Refiner, ...": (4, 1, "refined maps"),
    "to_mask": (5, 1, "mask"),
    "scores": (6, 1, ""),
    "Edit": (1, 0, ""),
    "classes": (3, 0, ""),
    "background score": (5, 0, ""),
}
WIDTH, HEIGHT, STEP, LIFT = 128, 40, 168, 92


def photos_to_masks(width: int = 260) -> Image.Image:
    """Show photos with the maps of their first class, their mask, and that of the first guess."""
    refined = camkit.wrap(camkit.data.demo_model())
    rows, captions = [], []
    for photo, names in SHOWN.items():
        result, guess = (
            refined(getattr(skimage.data, photo)(), classes=classes) for classes in (names, None)
        )
        picture = result.picture()
        seed = camkit.resize_cam(result.seed, result.photo.size)[0, 0].clamp(0, 1)
        maps = overlay_cam(picture, seed), overlay_cam(picture, result.cam[0, 0])
        masks = (overlay_mask(picture, _numbered(found.mask)) for found in (result, guess))
        rows.append((picture, *maps, *masks))
        captions.append(f"given: {' and '.join(names)}; first guess: {guess.names[0]}")
    return Image.fromarray(contact_sheet(rows, titles=TITLES, captions=captions, cell=width))


class Shown:
    """Draws the true mask if the first point lies on it, and keeps the prompts."""

    def __init__(self, truth: np.ndarray) -> None:
        self.truth, self.prompts = truth, list[Prompt]()

    def embed(self, picture: np.ndarray) -> np.ndarray:
        size = picture.shape[1], picture.shape[0]
        return np.array(Image.fromarray(self.truth).resize(size, Image.Resampling.NEAREST))

    def masks(self, embedding: np.ndarray, prompts: list[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        self.prompts += prompts
        places = [prompt.points[0].astype(int) for prompt in prompts]
        masks = np.array([[embedding == embedding[row, col]] for col, row in places])
        return masks, np.ones((len(prompts), 1))


def prompts(width: int = 260) -> Image.Image:
    """Show maps, the prompts that each rule makes of them, and what a segmenter makes of these."""
    model, rows, captions = camkit.data.demo_model(), [], []
    folder = Path(camkit.data.__file__).parent / "embedded" / "masks"
    for photo, value in PROMPTED.items():
        shown = [Shown(np.array(Image.open(folder / f"{photo}.png")) == value) for _ in range(2)]
        rules = zip(shown, ("peaks", "samrefiner"), strict=True)
        stages = [
            camkit.refiners.PromptedRefine(each, rule=rule, min_agreement=0.1)
            for each, rule in rules
        ]
        before, first, _ = (
            camkit.wrap(model, refine=[*camkit.method.DEFAULT_REFINE, *stage])(
                getattr(skimage.data, photo)(), classes=[NAMES[value]]
            )
            for stage in ((), stages[:1], stages[1:])
        )
        picture = before.picture()
        scale = picture.shape[0] / first.photo.rgb.shape[-2]
        drawn = (_drawn(picture, each.prompts, scale) for each in shown)
        masks = (overlay_mask(picture, _numbered(each.mask)) for each in (before, first))
        map_, mask, refined = overlay_cam(picture, before.cam[0, 0]), *masks
        rows.append((map_, mask, *drawn, refined))
        captions.append(f"given: {NAMES[value]}")
    titles = ("refined map", "its mask", 'prompts, "peaks"', 'prompts, "samrefiner"', "mask drawn")
    return Image.fromarray(contact_sheet(rows, titles=titles, captions=captions, cell=width))


def _drawn(picture: np.ndarray, asked: list[Prompt], scale: float) -> np.ndarray:
    """Draw boxes, points and mask prompts over a picture."""
    canvas = Image.fromarray(picture)
    for prompt in asked:
        if prompt.mask is not None:
            logits = np.clip(prompt.mask / prompt.mask.max(), 0, 1) * 190
            plane = Image.fromarray(logits.astype(np.uint8)).resize(canvas.size)
            canvas.paste((255, 255, 120), mask=plane)
        pen = ImageDraw.Draw(canvas)
        if prompt.box is not None:
            pen.rectangle([scale * side for side in prompt.box], outline=(0, 200, 255), width=4)
        for (col, row), positive in zip(scale * prompt.points, prompt.positive, strict=True):
            colour = (30, 220, 60) if positive else (20, 20, 20)
            disc = (col - 9, row - 9, col + 9, row + 9)
            pen.ellipse(disc, fill=colour, outline=(255, 255, 255), width=3)
    return np.array(canvas)


def regions(width: int = 260) -> Image.Image:
    """Show a photo, regions, and the map and mask that each rule makes of them."""
    photo = skimage.data.coffee()
    found = camkit.wrap(camkit.data.demo_model(), refine=WITHOUT_EDGES)(photo, classes=["cup"])
    capture = Capture.of_picture(torch.from_numpy(photo).permute(2, 0, 1)[None] / 255)
    segments = Segments("felzenszwalb", (100, 400))
    settings: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "mean: every region gets the mean of the map": (segments, {}),
        "vote: the share of its pixels that are labelled cup": (segments, {"rule": "vote"}),
        "sepl: regions that are labelled for more than half": (segments, {"rule": "sepl"}),
        "sepl with the whole object and its parts, drawn by hand": (_parts, {"rule": "sepl"}),
        "the same, and what no mask covers as a mask of its own": (
            lambda picture: [*_parts(picture), ~_parts(picture).any(0)],
            {"rule": "sepl"},
        ),
    }
    rows = []
    for propose, chosen in settings.values():
        refiner = Regions(propose, background_score=0.45, **chosen)
        masks = refiner.masks(capture)
        outlined = photo
        for mask in masks.dense():
            outlined = skimage.segmentation.mark_boundaries(outlined, mask.astype(int))
        outlined = (outlined * 255).round().astype(np.uint8)
        cam = refiner(found.cam, capture)
        mask = camkit.to_mask(cam, None, background_score=0.45 if not chosen else 0.5)[0]
        before = overlay_cam(photo, found.cam[0, 0])
        rows.append((before, outlined, overlay_cam(photo, cam[0, 0]), overlay_mask(photo, mask)))
    titles = ("map before", "regions", "map behind", "mask")
    return Image.fromarray(contact_sheet(rows, titles=titles, captions=[*settings], cell=width))


def _parts(picture: np.ndarray) -> np.ndarray:
    """Cup on a saucer, cup, coffee and spoon, as ellipses: the levels that a segmenter proposes."""
    rows, cols = np.mgrid[: picture.shape[0], : picture.shape[1]]
    ellipses = [(220, 278, 174, 202), (145, 286, 132, 118), (126, 287, 72, 84), (284, 362, 40, 38)]
    return np.stack([((rows - y) / h) ** 2 + ((cols - x) / w) ** 2 < 1 for y, x, h, w in ellipses])


def _numbered(mask: Tensor) -> Tensor:
    """Values 1, 2, ... in place of those of the classes, so that all rows have the same colours."""
    return mask.unique(return_inverse=True)[1].byte()


def flow() -> str:
    """Draw the stages from photo to scores as SVG."""
    parts = []
    for name, (column, row, out) in BOXES.items():
        left, top = 8 + column * STEP, 8 + row * LIFT
        middle = top + HEIGHT // 2
        parts.append(f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
        centre = left + WIDTH // 2
        parts.append(f'<text x="{centre}" y="{middle + 5}">{escape(name)}</text>')
        if row == 0:
            parts.append(f'<path d="M{centre} {top + HEIGHT} V{8 + LIFT - 7}"/>')
        elif name != "scores":
            parts.append(f'<path d="M{left + WIDTH} {middle} H{left + STEP - 7}"/>')
            label = left + (WIDTH + STEP) // 2
            parts.append(
                f'<text class="on" x="{label}" y="{top + HEIGHT + 18}">{escape(out)}</text>'
            )
    size = f'viewBox="0 0 {6 * STEP + WIDTH + 16} {LIFT + HEIGHT + 36}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">
<title>From photo to scores: model, capture, seed, refiners, mask; an edit acts in the model</title>
<style>
rect {{ fill: #e0f2f1; stroke: #00796b }}
text {{ font: 13px sans-serif; text-anchor: middle; fill: #102a27 }}
.on {{ font-size: 11px; fill: #00796b }}
path {{ stroke: #00796b; fill: none; marker-end: url(#tip) }}
</style>
<marker id="tip" markerWidth="8" markerHeight="8" refX="1" refY="4" orient="auto">
<path d="M0 0 L8 4 L0 8 z" style="fill: #00796b; stroke: none; marker-end: none"/></marker>
{chr(10).join(parts)}
</svg>
"""


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "flow.svg").write_text(flow(), encoding="utf-8")
    regions().save(IMAGES / "regions.jpg", quality=85)
    photos_to_masks().save(IMAGES / "photos_to_masks.jpg", quality=85)
    prompts().save(IMAGES / "prompts.jpg", quality=80)
