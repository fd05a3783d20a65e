"""Mask proposals in files: what segment-anything writes, COCO encodings, masks, label images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from camkit.data.arrays import read_arrays
from camkit.data.sample import mask_values
from camkit.errors import DataError, nearby
from camkit.ops.mask_runs import MaskRuns
from camkit.photo import decode
from camkit.untrusted import read_json

SUFFIXES = (".json", ".png", ".npy", ".npz")


@dataclass(frozen=True)
class ProposalFolder:
    """Mask proposals of photos in a folder, found by the names of the photos.

    The proposals of ``NAME.jpg`` are one of these:

    - ``NAME.json``: the list of dicts of segment-anything's automatic generator, or of COCO
      encodings of masks; in a dict they may stand under ``annotations``, as in SA-1B.
    - ``NAME/``: PNG files, one mask each, with 0 outside and one other value inside.
    - ``NAME.png``: a label image, grey or with a palette; each value is a mask.
    - ``NAME.npy``, or ``NAME.npz`` with one array: bool masks ``(n, H, W)``, or label images ``(H,
      W)`` or ``(n, H, W)`` of whole numbers, where negative values are under no mask.

    The script ``amg.py`` of segment-anything writes the second, or the first with its option
    ``--convert-to-rle``. Pickles are never opened.

    Attributes:
        folder: of all proposals, made absolute. The names of bulk runs may hold sub-folders.
        unlabelled: value of label images that is under no mask; None takes each value as a mask.
    """

    folder: str | Path
    unlabelled: int | None = None

    def __post_init__(self) -> None:
        folder = Path(self.folder).absolute()
        object.__setattr__(self, "folder", folder)
        if not folder.is_dir():
            raise DataError(
                f"{folder} is not a folder{nearby(folder) or '; give that of proposals'}"
            )

    def of_photo(self, key: str) -> MaskRuns:
        """Read the masks of a photo.

        Args:
            key: name of the photo without ending, not empty.

        Raises:
            DataError: there is no file of this name, more than one, or one that cannot be used.
        """
        base = Path(self.folder) / key
        candidates = [base.with_name(base.name + suffix) for suffix in SUFFIXES]
        found = [path for path in candidates if path.is_file()]
        # beside a file, a folder without masks is that of other photos: NAME/other.jpg
        if base.is_dir() and (not found or _masks_in(base)):
            found.insert(0, base)
        if len(found) != 1:
            listed = " and ".join(path.name for path in found)
            raise DataError(
                f"{base.parent} has {listed}; keep only one of them"
                if found
                else f"{base.parent} has no proposals of {base.name}: neither a folder of that "
                f"name nor a file ending in {', '.join(SUFFIXES)}{nearby(base)}"
            )
        return read_proposals(found[0], unlabelled=self.unlabelled)


def read_proposals(path: str | Path, *, unlabelled: int | None = None) -> MaskRuns:
    """Read the masks of one photo from any of the files of `ProposalFolder`.

    Args:
        path: a file, or a folder of PNG masks.
        unlabelled: as in `ProposalFolder`.

    Raises:
        DataError: the file cannot be read, would need a pickle, or holds no masks.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    content: Any
    if path.suffix == ".json":
        content = _of_json(path)
    elif path.suffix == ".png":
        content = _without(mask_values(path), unlabelled)
    elif path.suffix in (".npy", ".npz"):
        content = _of_numpy(path)
        if isinstance(content, np.ndarray) and content.dtype.kind in "iu":
            content = _without(content, unlabelled)
    else:
        raise DataError(f"{path} must be a folder of PNG masks or end in {', '.join(SUFFIXES)}")
    try:
        return MaskRuns.of(content, (0, 0))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from error


def _without(labels: np.ndarray, unlabelled: int | None) -> np.ndarray:
    labels = labels.astype(np.int64)
    return labels if unlabelled is None else np.where(labels == unlabelled, -1, labels)


def _of_json(path: Path) -> list[Any]:
    content = read_json(path)
    if isinstance(content, dict):
        content = content.get("annotations", [content] if "counts" in content else None)
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise DataError(
            f"{path} must hold a list of masks: dicts with a COCO encoding (size, counts), or with "
            "it as segmentation, as segment-anything's automatic generator writes them"
        )
    return content


def _of_numpy(path: Path) -> Any:
    content = read_arrays(path, pickles=False)
    if isinstance(content, dict):
        if len(content) != 1:
            listed = ", ".join(content) or "nothing"
            raise DataError(f"{path} must hold one array of masks or labels, got {listed}")
        content = next(iter(content.values()))
    return content


def _masks_in(path: Path) -> list[Path]:
    """List the PNG files of a folder in the order of their numbers; hidden files are none."""
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    masks = [file for file in files if file.suffix.lower() == ".png"]
    return sorted(masks, key=lambda each: (len(each.name), each.name))


def _of_folder(path: Path) -> MaskRuns:
    """Read a folder of masks; their order settles equal scores."""
    files = _masks_in(path)
    # amg.py writes metadata.csv, also beside no masks
    others = {file.name for file in path.iterdir() if file.name[0] != "."} - {"metadata.csv"}
    if others and not files:
        raise DataError(f"{path} holds {min(others)}, but no masks as PNG files; convert them")
    parts = []
    for file in files:
        values = _grey(file)
        held = np.unique(values)
        if len(held) > 2 or (len(held) == 2 and held[0] != 0):
            raise DataError(
                f"{file} must be a mask, with 0 outside and one other value inside, got "
                f"{len(held)} values; a label image of all masks is {path}.png"
            )
        parts.append(MaskRuns.of_mask(values != 0))
    try:
        return MaskRuns.joined(parts, (0, 0))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _grey(file: Path) -> np.ndarray:
    image: Image.Image = decode(file)
    if image.mode not in ("1", "L", "P", "I;16"):
        raise DataError(f"{file} is of mode {image.mode}; expected a grey mask")
    return np.array(image)
