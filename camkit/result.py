"""Result: the maps and the mask of one photo, saved to files."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from camkit.manifest import unfinished
from camkit.ops.images import resize_cam
from camkit.paint import overlay_mask, save_mask, save_picture
from camkit.photo import Photo, read_picture
from camkit.tensors import IGNORE


@dataclass(frozen=True, eq=False)
class Result:
    """Maps and mask of one photo.

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

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        """Return the photo at its own size, read from its file if it has one."""
        if self.photo.path is not None:
            return read_picture(self.photo.path)
        if self.photo.original is not None:
            return self.photo.original
        colours = resize_cam(self.photo.rgb, self.photo.size)[0].clamp(0, 1)
        return (colours.permute(1, 2, 0) * 255).round().byte().cpu().numpy()

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
            **self.settings,
        }


def mask_bits(values: Iterable[int]) -> Literal[8, 16]:
    """Return the bits of a mask that holds these values and the one for ignored pixels.

    >>> mask_bits([1, 254]), mask_bits([1, 1281])
    (8, 16)
    """
    return 8 if max(values, default=0) < IGNORE else 16
