"""CVAT's exports, in a folder or in archives: masks in colours, or an XML file of shapes."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from camkit.data.colours import read_labelmap
from camkit.data.cvatxml import (
    XML_NAME,
    CvatXml,
    is_cvat_xml,
    open_cvat_xml,
    refuse_other_xml,
)
from camkit.data.files import files_in, in_short
from camkit.data.names import check_split
from camkit.data.sample import Sample, all_usable
from camkit.data.unpacked import unpacked
from camkit.data.voc import VOCFolder, voc_splits
from camkit.errors import DataError
from camkit.printing import several

_LABELMAP = "labelmap.txt"
_LISTS = "ImageSets/Segmentation/"
_FEW = 12  # archives that are looked into, to recognise the layout
_MOST_BYTES = 64 * 2**30  # of an archive once it is unpacked


@dataclass(frozen=True)
class CvatArchives:
    """Archives of CVAT's masks, of which each is a split; `open_cvat` unpacks them.

    Photos are in the archive (CVAT's "save images"), or in ``images/<split>`` or ``images`` beside
    it, as `camkit.data.export` writes them.
    """

    root: Path
    classes: tuple[str, ...]
    parts: tuple[tuple[str, VOCFolder], ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    def split(self, name: str) -> tuple[Sample, ...]:
        """List the samples of a split."""
        return all_usable(self.entries(name))

    def entries(self, name: str) -> Iterator[Sample | DataError]:
        """Yield the samples of a split, and an error in place of each that cannot be used."""
        check_split(name, self.splits)
        folder = dict(self.parts)[name]
        return (entry for split in folder.splits for entry in folder.entries(split))

    def describe(self) -> tuple[str, ...]:
        """Say what each file was taken for."""
        names = in_short(self.classes)
        return tuple(
            f"{name}.zip: masks of CVAT, {several(len(self.classes), 'class')} of {_LABELMAP} "
            f"({names}), "
            f"unpacked in {folder.root}"
            for name, folder in self.parts
        )


def is_cvat(root: Path) -> bool:
    """Return whether a folder or a file holds masks or an XML file of CVAT."""
    if root.is_file():
        return _archived(root, _LABELMAP, XML_NAME) or is_cvat_xml(root)
    if is_cvat_xml(root / XML_NAME):
        return True
    folder = (root / _LABELMAP).is_file() and (root / "SegmentationClass").is_dir()
    return folder or bool(_archives(root))


def open_cvat(root: str | Path) -> VOCFolder | CvatArchives | CvatXml:
    """Open what CVAT exports: "Segmentation mask 1.1" or "CVAT for images 1.1".

    Args:
        root: a folder with ``labelmap.txt`` and ``SegmentationClass``, an archive that holds these,
            or a folder of such archives; or ``annotations.xml``, its folder or its archive.
            Archives are unpacked into the cache, once.

    Raises:
        DataError: there are no such files, or archives that disagree.
    """
    root = Path(root).absolute()
    if (shapes := _xml(root)) is not None:
        return shapes
    if root.is_dir() and (root / _LABELMAP).is_file():
        return _folder(root, (root / "JPEGImages", root / "images", root))
    archives = (root,) if root.is_file() else _archives(root)
    if not archives:
        raise DataError(f"{root} holds no {_LABELMAP} and no archive with one")
    top = root.parent if root.is_file() else root
    parts = []
    for path in archives:
        place = unpacked([path], partial(_extract, path), "cvat 2")
        beside = (top / "images" / path.stem, top / "images", top)
        photos = tuple(p for p in (place / "JPEGImages", *beside) if p.is_dir())
        parts.append((path.stem, _folder(place, photos)))
    classes = parts[0][1].classes
    for name, folder in parts:
        if folder.classes != classes:
            raise DataError(
                f"{top / name}.zip has the classes {in_short(folder.classes)}, but "
                f"{parts[0][0]}.zip has {in_short(classes)}; open them one by one"
            )
    return CvatArchives(top, classes, tuple(parts))


def _xml(root: Path) -> CvatXml | None:
    """Open an XML file, its folder or its archive; None for anything else."""
    path = root / XML_NAME if root.is_dir() else root
    top = path.parent
    if path.suffix.lower() == ".zip" and not _archived(path) and _archived(path, XML_NAME):
        path = unpacked([path], partial(_extract, path), "cvat 2") / XML_NAME
    elif path.suffix.lower() != ".xml" or (root.is_dir() and not is_cvat_xml(path)):
        return None
    near = (path.parent / "images", top / "images", path.parent, top)
    return open_cvat_xml(path, tuple(dict.fromkeys(near)))


def refuse_xml_of_others(root: Path) -> None:
    """Raise DataError if a folder holds XML files of PASCAL VOC or of LabelMe's old tool."""
    for folder in (root, root / "Annotations"):
        for path in files_in(folder, ".xml")[:1]:
            refuse_other_xml(path)


def _folder(root: Path, photos: tuple[Path, ...]) -> VOCFolder:
    classes, form = read_labelmap(root / _LABELMAP)
    folders = tuple(folder for folder in photos if folder.is_dir())
    return VOCFolder(root, classes, voc_splits(root), colours=form, photos=folders)


def _archives(root: Path) -> tuple[Path, ...]:
    paths = files_in(root, ".zip")
    return tuple(path for path in paths if _archived(path)) if len(paths) <= _FEW else ()


def _archived(path: Path, *names: str) -> bool:
    """Return whether an archive holds a file of one of these names; that of masks by default."""
    if path.suffix.lower() != ".zip":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return not {*(names or (_LABELMAP,))}.isdisjoint(archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def _extract(path: Path, out: Path) -> None:
    """Unpack the files of the layout, and no others."""
    folders = ("SegmentationClass", "JPEGImages", "images")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MOST_BYTES:
                raise DataError(f"{path} would unpack to more than 64 GB; unpack it by hand")
            for member in archive.infolist():
                name = PurePosixPath(member.filename)
                safe = not name.is_absolute() and ".." not in name.parts
                wanted = name.parts[:1] and name.parts[0] in folders
                listed = member.filename in (_LABELMAP, XML_NAME)
                if listed or member.filename.startswith(_LISTS) or wanted:
                    if not safe:
                        raise DataError(f"{path} holds {name}, which leaves its folder")
                    archive.extract(member, out)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); export it again") from error
