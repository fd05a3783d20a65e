"""Make the images of README and docs: photographs of scikit-image, and the flow of camkit.

    python docs/make_pictures.py

Writes docs/images/photos_to_masks.jpg and flow.svg. The model is the one that ships with camkit, so
nothing is downloaded, and README's lines give the same masks.
"""

from html import escape
from pathlib import Path

import skimage
from PIL import Image
from torch import Tensor

import camkit
from camkit.paint import contact_sheet, overlay_cam, overlay_mask

IMAGES = Path(__file__).parent / "images"
SHOWN = {"chelsea": ("cat",), "coffee": ("cup",), "camera": ("person", "tripod")}  # free of rights
TITLES = ("photo", "first map", "refined map", "mask", "mask without a class given")

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
    photos_to_masks().save(IMAGES / "photos_to_masks.jpg", quality=85)
