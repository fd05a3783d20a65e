"""CAM files with their photos and labels, matched by name and read."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from camkit.bulk.items import Failure
from camkit.data.camfiles import CamFile, read_cam
from camkit.data.labels import ImageLabels
from camkit.data.names import composed, read_image_names
from camkit.errors import DataError, nearby
from camkit.formats import IMAGE_SUFFIXES
from camkit.ops.images import resize_cam
from camkit.printing import short_repr

CAM_SUFFIXES = (".npy", ".npz", ".safetensors")
MASK_SUFFIXES = (".png",)
EVEN = 0.5
"""Score of a class as strong as the background, in maps read beside a background map."""


def read_list(path: Path) -> tuple[str, ...]:
    """Read image names, one per line, as `camkit.data.names.read_image_names` does.

    Raises:
        DataError: the file cannot be read, is empty, or names an image twice.
    """
    names = read_image_names(path)
    return tuple(name.removesuffix(suffix) for name in names for suffix in [_cam_suffix(name)])


def _cam_suffix(name: str) -> str:
    return next((suffix for suffix in CAM_SUFFIXES if name.lower().endswith(suffix)), "")


@dataclass(frozen=True)
class FileItem:
    """A CAM file or mask, and what belongs to it by name.

    Attributes:
        name: of the files, without suffix.
        path: of the CAM file or mask.
        photo: the image file, if photos are needed.
        truth: the ground truth, if it is scored.
        classes: of the image, if there are labels.
    """

    name: str
    path: Path
    photo: Path | None = None
    truth: Path | None = None
    classes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class CamFolder:
    """A folder of CAM files, and the photos and labels with the same names.

    Attributes:
        cams: folder of the CAM files; other files in it are ignored.
        images: folder of the photos; None if none are needed.
        labels: classes of each image, for files that do not contain them; of files with all
            classes (logits), only these are kept.
        names: the images to use; None uses all CAM files.
        any_aspect: stretch maps onto photos of another aspect ratio, for models that resize photos
            to squares.
    """

    cams: Path
    images: Path | None = None
    labels: ImageLabels | None = None
    names: Collection[str] | None = None
    any_aspect: bool = False

    def items(self) -> tuple[list[FileItem], list[Failure]]:
        """Match the files; return the items, and a failure for each name that has no match.

        Raises:
            DataError: a folder does not exist, or has no file of its kind.
        """
        cams = FilesByName(self.cams, CAM_SUFFIXES, "CAM files")
        photos = None
        if self.images is not None:
            photos = FilesByName(self.images, IMAGE_SUFFIXES, "photos")
        items, failures = [], []
        for name in cams.paths if self.names is None else self.names:
            try:
                cam, photo = cams.only(name), None if photos is None else photos.only(name)
                classes = None if self.labels is None else self.labels.of(name)
            except DataError as error:
                failures.append(Failure(name, "list", str(error)))
            else:
                items.append(FileItem(name, cam, photo, classes=classes))
        return items, failures


class FilesByName:
    """The files of a folder, without sub-folders, by their names without suffix.

    Args:
        folder: must exist and hold such a file.
        suffixes: of the files, in lower case.
        kind: what errors call the files.
    """

    def __init__(self, folder: Path, suffixes: Collection[str], kind: str) -> None:
        self._folder, self._suffixes = folder, ", ".join(suffixes)
        if not folder.is_dir():
            hint = nearby(folder) or f"; give the folder of the {kind}"
            raise DataError(f"{folder} is not a folder{hint}")
        self.paths: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in suffixes and not path.name.startswith("."):
                self.paths.setdefault(composed(path.stem), []).append(path)
        if not self.paths:
            raise DataError(f"{folder} holds no {kind} ({self._suffixes}) directly within it")

    def only(self, name: str) -> Path:
        """Return the file of a name; none, or more than one, is a DataError."""
        paths = self.paths.get(name, [])
        if not paths:
            raise DataError(f"{self._folder} has no file {name} ending in {self._suffixes}")
        if len(paths) > 1:
            files = " and ".join(path.name for path in paths)
            raise DataError(f"{self._folder} has {files}; keep only one of them")
        return paths[0]


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """The maps of an image; ``opposed`` ones are the class's share of class + background."""

    classes: tuple[int, ...]
    cam: Float[Tensor, "1 k H W"]
    opposed: bool

    __repr__ = short_repr


def read_maps(item: FileItem) -> ClassMaps:
    """Read a CAM file; with a background map, scores become shares of class + background.

    A share of 0.5 means that both are equal. So background score 0.5 draws the same mask as the
    highest map of the file. Of a file with all classes (logits), the classes of the item are kept.

    Raises:
        DataError: the file cannot be read, or contradicts the labels.
    """
    try:
        file = read_cam(item.path, classes=item.classes)
    except DataError as error:
        if item.classes is None:
            raise
        try:
            file = read_cam(item.path)
        except DataError:
            raise error from None
        if file.form != "logits" or not {*item.classes} <= {*file.classes}:
            raise
        kept = [file.classes.index(index) for index in item.classes]
        file = CamFile(item.classes, file.cam[kept], file.background, file.form)
    if file.background is None:
        return ClassMaps(file.classes, file.cam[None], opposed=False)
    if file.cam.numel() and min(file.cam.min(), file.background.min()) < 0:
        raise DataError(f"{item.path} holds negative maps beside a background map")
    share = file.cam / (file.cam + file.background).clamp_min(1e-12)  # 0 where both are 0
    return ClassMaps(file.classes, share[None], opposed=True)


def to_photo_size(
    maps: ClassMaps, size: tuple[int, int], item: FileItem, *, any_aspect: bool = False
) -> Float[Tensor, "1 k H W"]:
    """Resize maps to the size of their photo; other aspect ratios are a DataError."""
    if not maps.classes:
        return torch.zeros(1, 0, *size)
    rows, cols = maps.cam.shape[-2:]
    if (rows, cols) == size:
        return maps.cam
    if not any_aspect and not same_aspect((rows, cols), size):
        turned = (
            "; they fit the photo turned by 90 degrees, so the maps may be of the photo without "
            "its EXIF rotation: save the photo upright and compute the maps again"
            if same_aspect((cols, rows), size)
            else "; if the model resized photos to squares, set any_aspect (--any-aspect)"
        )
        raise DataError(
            f"{item.path} holds maps of {rows}x{cols} (rows x columns), which do not fit "
            f"{size[0]}x{size[1]} of {item.photo or 'its photo'}{turned}"
        )
    return resize_cam(maps.cam, size)


def same_aspect(small: tuple[int, int], large: tuple[int, int]) -> bool:
    """Return whether one size is the other scaled, up to the row and column that rounding leaves.

    >>> same_aspect((24, 32), (375, 500)), same_aspect((32, 24), (375, 500))
    (True, False)
    """
    (rows, cols), (high, wide) = small, large
    return (rows - 1) * wide < (cols + 1) * high and (cols - 1) * high < (rows + 1) * wide
