"""Photos and masks of a data set, found by their names."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from camkit.data.names import composed, on_disk
from camkit.errors import DataError
from camkit.formats import IMAGE_SUFFIXES
from camkit.levels import upright_size
from camkit.photo import opened

MASK_SUFFIXES = (".png", ".npy", ".tif", ".tiff", ".bmp")

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # Label Studio puts it before the names of uploads
_PHOTO_ENDS = ("_leftimg8bit", "_image", "_img", "_rgb", "_sat", "-image", "-img")
_MASK_ENDS = (
    *("_gtfine_labeltrainids", "_gtfine_labelids", "_gtcoarse_labeltrainids"),
    *("_labeltrainids", "_labelids", "_mask", "_masks", "_seg", "_segmentation", "_gt", "_label"),
    *("_L", "_labels", "_annotation", "-mask", "-masks", "-seg", "-gt", "-label", ".mask", "_lab"),
)


def photos_in(folder: Path, *, deep: bool = False) -> dict[str, Path]:
    """Map the name of each photo of a folder to its path; see `names_of` for the names.

    Args:
        folder: one that does not exist holds nothing.
        deep: look into the folders within it, too.

    Raises:
        DataError: two photos have the same name.
    """
    return names_of(folder, _files(folder, IMAGE_SUFFIXES, deep=deep))


def names_of(folder: Path, paths: Iterable[Path]) -> dict[str, Path]:
    """Map names without suffix to files; a name that several folders share keeps its folders.

    Raises:
        DataError: two files of one folder differ in their suffix only.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in paths:
        by_stem.setdefault(composed(path.stem), []).append(path)
    named: dict[str, Path] = {}
    for stem, same in by_stem.items():
        for path in same:
            name = stem
            if len(same) > 1:
                name = composed(path.relative_to(folder).with_suffix("").as_posix())
            if name in named:
                raise DataError(
                    f"{path.parent} holds both {named[name].name} and {path.name}, which would "
                    "share a mask; rename one"
                )
            named[name] = path
    return named


def masks_of(photos: Mapping[str, Path], top: Path, folder: Path) -> dict[str, Path]:
    """Find the mask of each photo in a folder of masks.

    A mask has the name of its photo, or that name with an ending such as ``_mask`` or
    ``_labelIds``; ``_leftImg8bit`` and the like may be missing in it. It lies in the same folder
    below ``folder`` as its photo below ``top``, or in ``folder`` itself.

    Args:
        photos: the photos by name.
        top: the folder that the photos lie in.
        folder: the folder of the masks.

    Raises:
        DataError: the masks are JPEG files.
    """
    deep = any(path.parent != top for path in photos.values())
    index = _MaskIndex.of(folder, deep=deep)
    found = {}
    for name, photo in photos.items():
        mask = index.find(composed(photo.relative_to(top).with_suffix("").as_posix()))
        if mask is not None:
            found[name] = mask
    if not found and photos:
        refuse_lossy(folder, deep=deep)
    return found


@dataclass(frozen=True)
class _MaskIndex:
    """The masks of a folder: by their own names, and by names without the endings of masks."""

    plain: Mapping[str, Path]
    short: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path, *, deep: bool) -> "_MaskIndex":
        plain: dict[str, Path] = {}
        ranked: dict[str, tuple[int, Path]] = {}
        files = _files(folder, MASK_SUFFIXES, deep=deep)
        for path in sorted(files, key=lambda path: MASK_SUFFIXES.index(path.suffix.lower())):
            name = composed(path.relative_to(folder).with_suffix("").as_posix())
            plain.setdefault(name, path)
            for rank, end in enumerate(_MASK_ENDS):
                if _has_end(name, end):
                    short = name[: -len(end)]
                    best = ranked.get(short)
                    if best is None or rank < best[0]:
                        ranked[short] = (rank, path)
                    break
        return cls(plain, {name: path for name, (_, path) in ranked.items()})

    def find(self, name: str) -> Path | None:
        """Return the mask of a photo, whose name may have folders."""
        last = PurePosixPath(name).name
        for each in dict.fromkeys((name, _photo_key(name), last, _photo_key(last))):
            path = self.plain.get(each) or self.short.get(each)
            if path is not None:
                return path
        return None


def mask_name(name: str) -> str:
    """Return the name of a mask without an ending such as ``_mask`` or ``_labelIds``.

    >>> mask_name("street_gtFine_labelIds"), mask_name("street")
    ('street', 'street')
    """
    ends = (end for end in _MASK_ENDS if _has_end(name, end))
    return name[: -len(end)] if (end := next(ends, "")) else name


def _has_end(name: str, end: str) -> bool:
    """Return whether a name has an ending of masks; ``_L`` of CamVid is a capital."""
    folded = name.lower() if end.islower() else name
    return folded.endswith(end) and len(name) > len(end)


def _photo_key(name: str) -> str:
    """Return the name of a photo without an ending such as ``_leftImg8bit``."""
    for end in _PHOTO_ENDS:
        if name.lower().endswith(end) and len(name) > len(end):
            return name[: -len(end)]
    return name


def folders_in(folder: Path) -> list[Path]:
    """List the folders within a folder, sorted; fast where it holds many thousand files."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(folder / entry.name for entry in entries if entry.is_dir())


def files_in(folder: Path, suffix: str) -> list[Path]:
    """List the files of a folder whose names end so, sorted, without hidden ones."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith(suffix) and e.name[0] != "."]
    return sorted(folder / name for name in names)


def holds(folder: Path, suffixes: tuple[str, ...], *, deep: bool = True) -> bool:
    """Return whether a folder holds a file with one of these suffixes."""
    return next(_walk(folder, suffixes, deep=deep), None) is not None


def _files(folder: Path, suffixes: tuple[str, ...], *, deep: bool) -> list[Path]:
    """List the files with these suffixes, sorted."""
    return sorted(_walk(folder, suffixes, deep=deep))


def _walk(folder: Path, suffixes: tuple[str, ...], *, deep: bool) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        for name in names:
            if name[0] != "." and os.path.splitext(name)[1].lower() in suffixes:  # noqa: PTH122
                yield Path(place, name)
        if not deep:
            return
        folders[:] = sorted(each for each in folders if each[0] != ".")


def refuse_lossy(folder: Path, *, deep: bool = True) -> None:
    """Raise DataError for a folder of masks that are JPEG or WebP files."""
    lossy = next(iter(_walk(folder, (".jpg", ".jpeg", ".webp"), deep=deep)), None)
    if lossy is not None:
        raise DataError(
            f"{lossy} would be a mask, but JPEG and WebP are refused as masks: their compression "
            "changes class ids near every edge; save the masks as PNG from where they were drawn"
        )


class PhotoFinder:
    """Finds photos that files of annotations name, perhaps by paths of another machine.

    Args:
        folders: where photos may be, the likeliest first.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = tuple(dict.fromkeys(folders))
        self._by_name: dict[str, set[Path]] | None = None

    def find(self, name: str) -> Path | None:
        """Return the photo of this path below a folder, else the only one with its file name.

        Raises:
            DataError: several photos have this file name.
        """
        text = composed(unquote(name)).replace("\\", "/").rpartition("?d=")[2]
        relative = PurePosixPath(text)
        if not relative.is_absolute() and ".." not in relative.parts:
            for folder in self._folders:
                path = on_disk(folder / relative)
                if path.is_file():
                    return path
        for each in dict.fromkeys((relative.name, _UPLOAD.sub("", relative.name))):
            found = sorted(self._names().get(each, ()))
            if len(found) > 1:
                raise DataError(
                    f"the photo {name} may be {found[0]} or {found[1]}; write its path from the "
                    "folder of the photos"
                )
            if found:
                return found[0]
        return None

    def _names(self) -> dict[str, set[Path]]:
        if self._by_name is None:
            self._by_name = {}
            for folder in self._folders:
                for path in _walk(folder, IMAGE_SUFFIXES, deep=True):
                    self._by_name.setdefault(composed(path.name), set()).add(path)
        return self._by_name


def picture_size(path: Path) -> tuple[int, int]:
    """Return rows and columns of a photo, upright; only its header is read.

    Raises:
        DataError: it is no picture.
    """
    with opened(path) as image:
        return upright_size(image)


def relative_to(path: Path, root: Path) -> str:
    """Return a path below the folder of a data set, as sentences name it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def in_short(names: Iterable[str] | Mapping[int, str]) -> str:
    """List the first names of classes."""
    listed = [*(names.values() if isinstance(names, Mapping) else names)]
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
