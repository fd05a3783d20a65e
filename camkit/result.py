"""Result: the maps and the mask of one photo, shown or saved to files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from torch import Tensor

from camkit.display import (
    PREVIEW,
    Entry,
    draw_panel,
    in_words,
    legend_entries,
    new_axes,
    open_window,
    shrink,
    shrink_mask,
    to_html,
)
from camkit.errors import DataError
from camkit.manifest import unfinished
from camkit.ops.images import resize_cam
from camkit.paint import contact_sheet, overlay_cam, overlay_mask, save_mask, save_picture
from camkit.photo import Photo, read_picture
from camkit.screen import in_notebook
from camkit.tensors import IGNORE

_SHEET = 100  # results on one sheet: below 30,000 pixels high, which viewers still open


@dataclass(frozen=True, eq=False)
class Result:
    """Maps and mask of one photo; a notebook shows it as a picture with a legend.

    Attributes:
        photo: the photo that was segmented.
        classes: indices of the K classes.
        names: their names.
        seed: the first maps, on the patch grid, in [0, 1].
        cam: the refined maps at the photo's own size, in [0, 1].
        mask: 0 background, else the value that ``legend`` names; uint8, or int32 if the value of
            one of its classes exceeds 254. A class has the same value in every result.
        legend: name of each mask value.
        logits: outputs of the classifier; none if the model returned no class scores.
        settings: every setting that led to the result, JSON-ready.
        passed_over: the presets that were tried before the method in use, each with the reason why
            the model does not support it.
        unfitted: classes that the read-out does not know, if there is one: their maps are unfitted.
    """

    photo: Photo
    classes: tuple[int, ...]
    names: tuple[str, ...]
    seed: Float[Tensor, "1 k h w"]
    cam: Float[Tensor, "1 k H W"]
    mask: Integer[Tensor, "H W"]
    legend: dict[int, str]
    logits: Float[Tensor, "1 o"]
    settings: dict[str, Any]
    passed_over: tuple[str, ...] = ()
    unfitted: tuple[str, ...] = ()

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return the photo at its own size, read from its file if it has one."""
        if self.photo.path is not None:
            return read_picture(self.photo.path)
        if self.photo.original is not None:
            return self.photo.original
        return self._seen()

    def image(self, side: int | None = None) -> Image.Image:
        """Return the photo with the mask painted over it (`camkit.paint.overlay_mask`).

        Args:
            side: the long side is at most this many pixels; None keeps the photo's own size.
        """
        return Image.fromarray(self._painted(shrink(self._present(), side)))

    def show(self) -> None:
        """Show picture and legend: below the cell of a notebook, else in the system's viewer.

        Raises:
            CamkitError: this machine has no viewer.
        """
        if in_notebook():
            from IPython.display import display

            display(self)
            return
        legends = [[(entry.colour, entry.text) for entry in self._legend]]
        sheet = contact_sheet(
            [[np.array(self.image(side=640))]], titles=[self._title], legends=legends, cell=640
        )
        open_window(Image.fromarray(sheet))

    def plot(self, ax: Any = None) -> Any:
        """Draw the result with matplotlib.

        Args:
            ax: axes that get the mask and its legend; None makes a figure with a row for each
                class, which holds its seed and its refined map, after the photo and before the
                mask.

        Returns:
            ``ax``, or the axes of the figure, ``(K, 4)``.

        Raises:
            CamkitError: matplotlib is not installed.
        """
        photo = shrink(self._present(), 640)
        if ax is not None:
            draw_panel(ax, self._painted(photo), self._title, self._legend)
            return ax
        rows, cols = self.photo.size
        axes = new_axes(max(1, len(self.names)), 4, rows / cols)
        for each in axes.flat:
            each.set_axis_off()
        draw_panel(axes[0, 0], photo, self._title)
        for slot, name in enumerate(self.names):
            for place, (title, cam) in enumerate((("seed", self.seed), ("refined", self.cam)), 1):
                map_ = _over(photo, cam[:, slot : slot + 1])
                draw_panel(axes[slot, place], map_, f"{title}: {name.split(',')[0]}")
        draw_panel(axes[0, 3], self._painted(photo), "mask", self._legend)
        return axes

    def _repr_html_(self) -> str:
        return to_html(self.image(side=PREVIEW), self._title, self._legend)

    def __repr__(self) -> str:
        return f"Result({self._title}: {in_words(self._legend)})"

    @property
    def _title(self) -> str:
        size = "{}x{}".format(*self.photo.size)
        return size if self.photo.path is None else f"{self.photo.path.name} {size}"

    @property
    def _legend(self) -> tuple[Entry, ...]:
        return legend_entries(self.mask.cpu(), self.legend)

    def _seen(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return what the model saw, at the photo's size."""
        colours = resize_cam(self.photo.rgb, self.photo.size)[0].clamp(0, 1)
        return (colours.permute(1, 2, 0) * 255).round().byte().cpu().numpy()

    def _present(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return the photo, also if its file is gone or has another size by now."""
        try:
            picture = self.picture()
        except DataError:
            return self._seen()
        return picture if picture.shape[:2] == self.photo.size else self._seen()

    def _painted(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        height, width, _ = picture.shape
        return overlay_mask(picture, shrink_mask(self.mask.cpu().numpy(), (height, width)))

    def save(self, folder: str | Path) -> Path:
        """Write ``mask.png``, ``overlay.png``, ``cam.npy`` (float32, K maps) and ``manifest.json``.

        The mask is a palette PNG in the colours of VOC, or a grey one of 16 bits if a class has a
        value above 254. Each file appears complete or not at all, and the manifest last: if it
        exists, so do the others.

        Returns:
            The folder, created if needed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_mask(self.mask.cpu(), folder / "mask.png", bits=mask_bits(self.legend))
        save_picture(overlay_mask(self.picture(), self.mask.cpu()), folder / "overlay.png")
        with unfinished(folder / "cam.npy") as draft, draft.open("wb") as file:
            np.save(file, self.cam[0].float().cpu().numpy())
        with unfinished(folder / "manifest.json") as draft:
            text = json.dumps(self.manifest(), indent=2, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")
        return folder

    def manifest(self) -> dict[str, Any]:
        """Return everything but the pixels, JSON-ready."""
        scores = self.logits[0].float()
        return {
            "photo": None if self.photo.path is None else str(self.photo.path),
            "size": list(self.photo.size),
            "model_size": list(self.photo.pixels.shape[-2:]),
            "classes": [
                {"index": index, "name": name}
                for index, name in zip(self.classes, self.names, strict=True)
            ],
            "legend": {str(value): name for value, name in self.legend.items()},
            "most_probable_output": int(scores.argmax()) if len(scores) else None,
            "passed_over": list(self.passed_over),
            "unfitted": list(self.unfitted),
            **self.settings,
        }


def show(results: Result | Sequence[Result], *, cell: int = 260) -> Image.Image:
    """Return a sheet with photo, strongest refined map and mask of each result, one in a row.

    A notebook displays the sheet by itself; elsewhere call its ``show()`` or ``save(path)``.

    Args:
        results: one, or up to 100.
        cell: long side of each picture in pixels.

    Raises:
        TypeError: something else than results was given.
        ValueError: there is no result, or more than a picture can show.
    """
    listed = [results] if isinstance(results, Result) else list(results)
    for each in listed:
        if not isinstance(each, Result):
            raise TypeError(
                f"`results` must hold what a pipeline returns, camkit.Result, got "
                f"{type(each).__name__}"
            )
    if not 1 <= len(listed) <= _SHEET:
        raise ValueError(
            f"`results` must hold 1 to {_SHEET} results, got {len(listed)}; show a part of them, "
            f"such as results[:{_SHEET}]"
        )
    rows = []
    for result in listed:
        photo = shrink(result._present(), cell)
        rows.append([photo, _over(photo, result.cam), result._painted(photo)])
    sheet = contact_sheet(
        rows,
        titles=("photo", "refined map", "mask"),
        captions=[result._title for result in listed],
        legends=[[(entry.colour, entry.text) for entry in result._legend] for result in listed],
        cell=cell,
    )
    return Image.fromarray(sheet)


def _over(
    picture: UInt8[np.ndarray, "h w 3"], cam: Float[Tensor, "1 k _ _"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Paint the strongest of some maps over a picture."""
    height, width, _ = picture.shape
    if cam.shape[1] == 0:
        return picture
    evidence = resize_cam(cam.detach().float(), (height, width))[0].amax(dim=0)
    return overlay_cam(picture, evidence.clamp(0, 1))


def mask_bits(values: Iterable[int]) -> Literal[8, 16]:
    """Return the bits of a mask that holds these values and the one for ignored pixels.

    >>> mask_bits([1, 254]), mask_bits([1, 1281])
    (8, 16)
    """
    return 8 if max(values, default=0) < IGNORE else 16
