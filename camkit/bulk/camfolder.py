"""A folder of CAM files, each found its photo and its labels by name."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from camkit.bulk.jobs import Failure
from camkit.bulk.labels import ImageLabels
from camkit.data.names import read_text
from camkit.errors import DataError

CAM_ENDINGS = (".npy", ".npz", ".safetensors")
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MASK_ENDINGS = (".png",)


@dataclass(frozen=True)
class CamItem:
    """One CAM file, and what belongs to it.

    Attributes:
        name: the file name without its ending.
        cam: the CAM file.
        photo: the image file, where photos are needed.
        classes: of the image, where labels are given.
    """

    name: str
    cam: Path
    photo: Path | None = None
    classes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class CamFolder:
    """CAM files, with the photos and labels that belong to them by name.

    Attributes:
        cams: folder of the CAM files; other files in it are left alone.
        images: folder of the photos; None where none are needed.
        labels: the classes of each image, for files that do not say them, and of files that hold
            all classes (logits) those to keep.
        names: the images wanted; None takes all CAM files.
        any_aspect: stretch maps onto photos of another aspect ratio, for models that squash photos
            into squares.
    """

    cams: Path
    images: Path | None = None
    labels: ImageLabels | None = None
    names: Collection[str] | None = None
    any_aspect: bool = False

    def items(self) -> tuple[list[CamItem], list[Failure]]:
        """Pair the files; what cannot be paired is told.

        Raises:
            DataError: a folder is not there, or holds no file of its kind.
        """
        cams = files_by_name(self.cams, CAM_ENDINGS, "CAM files")
        photos = None
        if self.images is not None:
            photos = files_by_name(self.images, PHOTO_ENDINGS, "photos")
        items, failures = [], []
        for name in cams if self.names is None else self.names:
            try:
                items.append(self._item(name, cams, photos))
            except DataError as error:
                failures.append(Failure(name, str(error)))
        return items, failures

    def _item(
        self, name: str, cams: Mapping[str, list[Path]], photos: Mapping[str, list[Path]] | None
    ) -> CamItem:
        return CamItem(
            name,
            only_file(name, cams, self.cams, CAM_ENDINGS),
            None
            if photos is None or self.images is None
            else only_file(name, photos, self.images, PHOTO_ENDINGS),
            None if self.labels is None else self.labels.of(name),
        )


def files_by_name(folder: Path, endings: Collection[str], kind: str) -> dict[str, list[Path]]:
    """List the files of a folder by their names without endings, sorted.

    Args:
        folder: where to look; its sub-folders are left out.
        endings: that count, in lower case.
        kind: what to call the files in an error.

    Raises:
        DataError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name the one that holds the {kind}")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in endings and not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    if not found:
        raise DataError(f"{folder} holds no {kind} ({', '.join(endings)}) directly within it")
    return found


def only_file(
    name: str, files: Mapping[str, list[Path]], folder: Path, endings: Collection[str]
) -> Path:
    """The one file of a name.

    Raises:
        DataError: there is none, or more than one.
    """
    found = files.get(name, [])
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"{folder} has no file {name} ending in {', '.join(endings)}")
    raise DataError(
        f"{folder} has {' and '.join(path.name for path in found)}; leave one, to say which counts"
    )


def read_list(path: Path) -> tuple[str, ...]:
    """Read image names, one a line, in any way the lists of the field spell them.

    A name alone; a name with class indices behind it; or paths of a photo and of its mask.

    Raises:
        DataError: the file cannot be read, is empty, or names an image twice.
    """
    names: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name = _listed_name(line.strip())
        if name in names:
            raise DataError(f"{path}: {name!r} stands on lines {names[name]} and {number}")
        names[name] = number
    if not names:
        raise DataError(f"{path} is empty; expected one image name a line")
    return tuple(names)


def _listed_name(line: str) -> str:
    first, *others = line.split()
    if not all(other.isdigit() for other in others) and Path(first).suffix not in PHOTO_ENDINGS:
        first = line  # a name with spaces in it
    path = Path(first)
    return path.stem if path.suffix.lower() in (*PHOTO_ENDINGS, *CAM_ENDINGS) else path.name
