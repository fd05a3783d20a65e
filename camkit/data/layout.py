"""Which data set a folder holds, told by its folders."""

from collections.abc import Callable
from pathlib import Path

from camkit.data.coco import coco_splits, open_coco
from camkit.data.folder import open_folder
from camkit.data.imagenet_s import open_imagenet_s
from camkit.data.sample import DataSet
from camkit.data.voc import open_voc
from camkit.errors import DataError

_MOST_SHOWN = 8


def open_dataset(path: str | Path) -> DataSet:
    """Open a folder in the layout of PASCAL VOC, MS COCO or ImageNet-S, or a plain folder.

    Args:
        path: a folder with ``JPEGImages/`` and ``ImageSets/Segmentation/`` (VOC), ``images/`` and
            ``labels.csv`` (plain), ``validation-segmentation/`` or ``train-semi-segmentation/``
            (ImageNet-S), or photos in folders such as ``train2017/`` (COCO). `open_voc`,
            `open_coco` and their like have settings.

    Returns:
        The data set.

    Raises:
        DataError: the folder has none of these layouts, or a file in it cannot be used.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; name the folder that holds the data set")
    opener = find_layout(root)
    if opener is not None:
        return opener(root)
    found = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    shown = ", ".join(found[:_MOST_SHOWN]) or "nothing"
    more = ", ..." if len(found) > _MOST_SHOWN else ""
    raise DataError(
        f"{root} is no known data set: expected JPEGImages/ and ImageSets/Segmentation/ (VOC), or "
        "images/ and labels.csv (plain folder), or train2017/ and the like (COCO), or validation/ "
        "and validation-segmentation/ (ImageNet-S), "
        f"found {shown}{more}; name the folder above these"
    )


def find_layout(root: Path) -> Callable[[Path], DataSet] | None:
    """What opens a folder of a known layout; None for others."""
    if (root / "JPEGImages").is_dir() and (root / "ImageSets" / "Segmentation").is_dir():
        return open_voc
    if (root / "images").is_dir() and (root / "labels.csv").is_file():
        return open_folder
    if any((root / f"{split}-segmentation").is_dir() for split in ("validation", "train-semi")):
        return open_imagenet_s
    return open_coco if coco_splits(root) else None
