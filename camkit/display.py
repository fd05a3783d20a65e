"""How a mask is presented: its legend, a picture in HTML, panels of matplotlib, a window."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image, ImageShow
from torch import Tensor

from camkit.errors import CamkitError, require
from camkit.paint import Colour, Picture, mask_colour

PREVIEW = 512
"""Long side, in pixels, of a picture in a notebook: it fits beside its legend on a laptop."""

_ROWS = 20  # of a legend
_TEXTS = 3  # classes in a line of text

_BOX = "display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start"
_IMAGE = "max-width:100%;height:auto;margin:0"
_CELL = "text-align:left;padding:3px 8px"
_NUMBER = "text-align:right;padding:3px 8px"
_SWATCH = "display:inline-block;width:1em;height:1em;vertical-align:-0.15em;border:1px solid #888"


@dataclass(frozen=True)
class Entry:
    """One line of a legend.

    Attributes:
        value: of the mask.
        name: of the class; the background has none of its own.
        share: of the pixels, in [0, 1].
    """

    value: int
    name: str
    share: float

    @property
    def percent(self) -> str:
        """The share in whole per cent; a class with a few pixels has "<1 %", not 0."""
        return "<1 %" if 0 < self.share < 0.01 else f"{100 * self.share:.0f} %"

    @property
    def text(self) -> str:
        """The first of the name's synonyms, and the share."""
        return f"{' '.join(self.name.split(',')[0].split())} {self.percent}"

    @property
    def colour(self) -> Colour:
        return mask_colour(self.value)


def legend_entries(mask: Integer[Tensor, "H W"], legend: Mapping[int, str]) -> tuple[Entry, ...]:
    """Return an entry for each name of the legend, the largest share first."""
    counts = np.bincount(mask.numpy().ravel(), minlength=max(legend, default=0) + 1)
    shares = (counts / mask.numel()).tolist()
    entries = [Entry(value, name, shares[value]) for value, name in legend.items()]
    return tuple(sorted(entries, key=lambda entry: -entry.share))


def in_words(entries: Sequence[Entry]) -> str:
    """Return names and shares of the first three classes, and the number of the others.

    >>> in_words([Entry(1, "cat, house cat", 0.308), Entry(2, "dog", 0.0001)])
    'cat 31 %, dog <1 %'
    """
    hidden = len(entries) - _TEXTS
    texts = [entry.text for entry in entries[:_TEXTS]] + [f"{hidden} more"] * (hidden > 0)
    return ", ".join(texts) or "no class"


def shrink(picture: UInt8[np.ndarray, "H W 3"], side: int | None) -> UInt8[np.ndarray, "h w 3"]:
    """Return the picture with its long side at most ``side`` pixels; None keeps its size."""
    if side is not None and side < 1:
        raise ValueError(
            f"`side` must be at least 1 pixel, got {side}; None keeps the photo's size"
        )
    if side is None or max(picture.shape[:2]) <= side:
        return picture
    scale = side / max(picture.shape[:2])
    rows, cols = (max(1, round(length * scale)) for length in picture.shape[:2])
    resized = Image.fromarray(picture).resize((cols, rows), Image.Resampling.LANCZOS)
    return np.array(resized)


def shrink_mask(
    mask: Integer[np.ndarray, "H W"], size: tuple[int, int]
) -> Integer[np.ndarray, "h w"]:
    """Return the mask at another size: each new pixel has the value at its middle."""
    rows, cols = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(size, mask.shape, strict=True)
    )
    return mask[rows][:, cols]


def to_html(image: Image.Image, title: str, entries: Sequence[Entry]) -> str:
    """Return a picture and its legend in one line of HTML, without colours of text or paper."""
    data = BytesIO()
    image.save(data, format="JPEG", quality=85)
    encoded = base64.b64encode(data.getvalue()).decode()
    alt = html.escape(f"{title}: {in_words(entries)}")
    clear = 1.0 - sum(entry.share for entry in entries)
    shown = (*entries[:_ROWS], Entry(0, "background", max(0.0, clear)))
    rows = "".join(
        f'<tr><td style="{_CELL}"><span style="{_SWATCH};background:{_css(entry)}"></span> '
        f'{html.escape(entry.name)}</td><td style="{_NUMBER}">{entry.value}</td>'
        f'<td style="{_NUMBER}">{html.escape(entry.percent)}</td></tr>'
        for entry in shown
    )
    hidden = len(entries) - _ROWS
    if hidden > 0:
        rows += f'<tr><td style="{_CELL}" colspan="3">and {hidden} more classes</td></tr>'
    head = "".join(
        f'<th style="{style}">{text}</th>'
        for style, text in ((_CELL, "class"), (_NUMBER, "value"), (_NUMBER, "pixels"))
    )
    return (
        f'<div style="{_BOX}"><img style="{_IMAGE}" width="{image.width}" height="{image.height}" '
        f'alt="{alt}" src="data:image/jpeg;base64,{encoded}"><table style="margin:0">'
        f'<caption style="{_CELL}">{html.escape(title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _css(entry: Entry) -> str:
    return "rgb({},{},{})".format(*entry.colour) if entry.value else "transparent"


def open_window(image: Image.Image) -> None:
    """Open a picture in the system's viewer.

    Raises:
        CamkitError: this machine has none.
    """
    if not ImageShow.show(image):
        raise CamkitError(
            "no program on this machine can show pictures; save it instead: "
            'result.image().save("picture.png")'
        )


def new_axes(rows: int, cols: int, aspect: float) -> Any:
    """Return the axes of a new figure of matplotlib, ``(rows, cols)``, each as wide as a photo.

    Args:
        rows: of panels.
        cols: of panels.
        aspect: height of a photo over its width.

    Raises:
        CamkitError: matplotlib is not installed.
    """
    require("matplotlib", "plots need", "report")
    from matplotlib import pyplot

    size = (3.2 * cols, 3.2 * rows * min(aspect, 2.0) + 0.4)
    return pyplot.subplots(rows, cols, figsize=size, squeeze=False, layout="constrained")[1]


def draw_panel(axes: Any, picture: Picture, title: str, entries: Sequence[Entry] = ()) -> None:
    """Draw a picture and its legend in axes of matplotlib."""
    axes.imshow(picture)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_axis_off()
    if entries:
        from matplotlib.patches import Patch

        patches = [
            # matplotlib hides labels that begin with an underscore
            Patch(color="#{:02x}{:02x}{:02x}".format(*entry.colour), label=f" {entry.text}")
            for entry in entries[:_ROWS]
        ]
        legend = axes.legend(handles=patches, loc="upper left", fontsize=8, framealpha=0.9)
        for text in legend.get_texts():
            text.set_parse_math(False)
