"""Images in tar shards, and the proof that a shard was read to its end."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from camkit.bulk.items import Failure, Item, TarPlace, printable, safe_key
from camkit.errors import DataError, one_line
from camkit.formats import is_image
from camkit.printing import several
from camkit.untrusted import read_json

_MAX_LABEL_BYTES = 65536  # of a label file in a tar file
_MAX_HEADER_BYTES = 1 << 20  # of a long name or of pax records
_MAX_PADDING = 8 << 20  # programs fill the last record with zeros: 10 KiB, or 1 MiB for tapes
_BLOCK, _READ = 512, 1 << 20
_UNREADABLE = (OSError, tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError)
COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".lz4")

Members = dict[str, tarfile.TarInfo]


@dataclass(frozen=True)
class TarShards:
    """WebDataset: tar files in which the files of an image follow each other, with equal stems.

    The key of an image is ``shard/path without suffixes``. Classes come from ``.cls`` (numbers
    separated by spaces or commas), else from ``.json``: ``{"classes": [numbers]}``,
    ``{"cls": number}``. A shard that does not end as a tar file does is a failure, after the images
    that stand before the damage.

    Attributes:
        paths: uncompressed tar files.
        skipped_files: how many files belonged to no image when the shards were last read to their
            end, by suffix.
    """

    paths: tuple[Path, ...]
    classes: None = None
    skipped_files: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    def __iter__(self) -> Iterator[Item | Failure]:
        common = Path(os.path.commonpath([path.resolve().parent for path in self.paths]))
        skipped = Counter[str]()
        for path in self.paths:
            yield from _images(path, str(path.resolve().relative_to(common)), skipped)
        self.skipped_files.clear()
        self.skipped_files.update(skipped)

    def __str__(self) -> str:
        return f"shards in {common_folder(self.paths)}"


def common_folder(paths: Sequence[Path]) -> str:
    """Return the folder that contains all files, as text."""
    return printable(os.path.commonpath([path.resolve().parent for path in paths]))


def _images(path: Path, origin: str, skipped: Counter[str]) -> Iterator[Item | Failure]:
    """Yield the images of a shard; ``origin`` identifies the shard in its source."""
    shard = printable(path.name.removesuffix(".tar"))
    count, seen = 0, Counter[str]()
    try:
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for name, members in _samples(tar, file, skipped):
                try:
                    place, classes = _tar_item(path, tar, members)
                    key = safe_key(name)
                except DataError as error:  # its name has a suffix, so it is the key of no image
                    failed = _counted(next(iter(members.values())).name, seen)
                    yield Failure(printable(f"{shard}/{failed}"), "list", f"{path}: {error}")
                    continue
                count += 1
                which = printable(f"{origin}:{_counted(place.member, seen)}")
                yield Item(f"{shard}/{key}", place, classes, which)
            _check_rest(tar.offset, file)
    except _UNREADABLE as error:
        packed = file_is_compressed(path)
        way_out = "unpack compressed files first (gunzip)" if packed else "copy or pack it again"
        reason = one_line(str(error).removeprefix(f"{path} "))
        yield Failure(
            shard,
            "list",
            f"{path} is not a whole tar file: {reason}; {several(count, 'image')} found before "
            f"that, so {way_out} and run again with --retry",
        )


def _counted(name: str, seen: Counter[str]) -> str:
    """Return a name, with a number if it was seen before."""
    seen[name] += 1
    return name if seen[name] == 1 else f"{name} ({seen[name]})"


def file_is_compressed(path: Path) -> bool:
    """Return whether a file begins as gzip, bzip2, xz, Zstandard or LZ4 files do."""
    marks = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
    try:
        with path.open("rb") as file:
            return file.read(6).startswith(marks)
    except OSError:
        return False


class _Headers(BufferedReader):
    """A tar file of which headers are read; what a header claims does not decide on the memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _check_end(offset: int, file: BufferedReader) -> None:
    """Refuse an end without two blocks of zeros; ``tarfile`` takes any bad header for the end."""
    file.seek(offset)
    end = file.read(2 * _BLOCK)
    if any(end[:_BLOCK]):
        what = "a damaged header" if len(end) >= _BLOCK else f"a header of {len(end)} bytes"
        raise tarfile.ReadError(f"{what} at byte {offset}")
    if len(end) < 2 * _BLOCK or any(end):
        what = "the file ends" if len(end) < 2 * _BLOCK else "there is only one block of zeros"
        raise tarfile.ReadError(f"{what} at byte {offset}, without the two blocks of an end")


def _check_rest(offset: int, file: BufferedReader) -> None:
    """Refuse anything but zeros behind the end."""
    file.seek(offset)
    while block := file.read(_READ):
        if block.count(0) != len(block):
            raise tarfile.ReadError(
                f"behind the end at byte {offset} there is more: several tar files in one, or a "
                "part that was filled with zeros"
            )
    zeros = file.tell() - offset
    if zeros > _MAX_PADDING:
        raise tarfile.ReadError(
            f"behind the end at byte {offset} {zeros} bytes of zeros follow: was the file copied "
            "whole?"
        )


def _samples(
    tar: tarfile.TarFile, file: BufferedReader, skipped: Counter[str]
) -> Iterator[tuple[str, Members]]:
    """Yield the files of each image: the name up to the first dot, and the files by suffix.

    The last files before damage are not yielded, because the labels of their image may be lost.
    """
    name, members = "", Members()
    for member in _files_in(tar):
        folder, slash, file_name = member.name.rpartition("/")
        stem, _, suffix = file_name.partition(".")
        sample = folder + slash + stem
        if members and (sample != name or suffix.lower() in members):
            yield from _with_an_image(name, members, skipped)
            members = {}
        name = sample
        members[suffix.lower()] = member
    _check_end(tar.offset, file)
    if members:
        yield from _with_an_image(name, members, skipped)


def _files_in(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield files and links; refuse headers that no program writes and that may never end."""
    last = -1
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # it would keep every member
        if member.offset <= last or member.size < 0 or "\0" in member.name:
            raise tarfile.ReadError(f"a damaged header at byte {member.offset}")
        last = member.offset
        if member.isfile() or member.islnk() or member.issym():
            yield member


def _with_an_image(
    name: str, members: Members, skipped: Counter[str]
) -> Iterator[tuple[str, Members]]:
    """Yield the sample if it has an image; else count its files as skipped, by their suffixes."""
    if any(is_image(f"a.{suffix}") for suffix in members):
        yield name, members
    else:
        skipped.update(
            f".{printable(suffix)}" if suffix else "without suffix" for suffix in members
        )


def _tar_item(
    path: Path, tar: tarfile.TarFile, members: Members
) -> tuple[TarPlace, tuple[int, ...] | None]:
    """Return the place and the classes of the image among the files of a sample."""
    photos = [member for suffix, member in members.items() if is_image(f"a.{suffix}")]
    if len(photos) > 1:
        names = ", ".join(photo.name for photo in photos)
        raise DataError(f"one name has {len(photos)} images: {one_line(names)}")
    photo = photos[0]
    if not photo.isfile() or photo.issparse():
        kind = "is sparse" if photo.issparse() else f"is a link to {printable(photo.linkname)}"
        name = printable(photo.name)
        raise DataError(f"{name} {kind}; pack it whole (tar --dereference --hard-dereference)")
    classes = None
    label = members.get("cls") or members.get("json")
    if label is not None:
        classes = _classes_of(label, tar)
    return TarPlace(path, photo.name, photo.offset_data, photo.size), classes


def _classes_of(member: tarfile.TarInfo, tar: tarfile.TarFile) -> tuple[int, ...] | None:
    file = tar.extractfile(member) if member.isfile() else None
    if file is None or member.size > _MAX_LABEL_BYTES:
        raise DataError(f"{member.name} is no plain file or too large, {member.size} bytes")
    text, labels = file.read(), None
    try:
        if member.name.lower().endswith(".cls"):
            labels = text.decode("utf-8", "replace").replace(",", " ").split()
        else:
            labels = read_json(text, member.name)
            if isinstance(labels, dict):
                labels = labels.get("classes", labels.get("cls"))
        return class_indices(labels)
    except (DataError, ValueError) as error:
        raise DataError(f"{member.name} holds no class indices ({error})") from error


def class_indices(labels: Any) -> tuple[int, ...] | None:
    """Return the sorted indices of a whole number, or of a sequence of whole numbers or digits."""
    if labels is None:
        return None
    row = labels if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    return tuple(sorted({_class_index(label) for label in row}))


def _class_index(label: Any) -> int:
    whole = type(label) is int or (isinstance(label, float) and label.is_integer())
    if not whole and not (isinstance(label, str) and label.strip().isdecimal()):
        raise ValueError(f"expected whole numbers from 0, got {one_line(repr(label))}")
    if int(label) < 0:
        raise ValueError(f"expected indices from 0, got {label}")
    return int(label)
