"""Image formats: which files are pictures, and how one is opened without more than its decoder."""

import os
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from io import BufferedReader, BytesIO
from pathlib import Path, PurePath

from PIL import Image, ImageFile, TiffImagePlugin

from camkit.errors import DataError
from camkit.jxl import jxl_size

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm"),
    ".pnm",
)
"""Suffixes of pictures, in lower case, the most frequent first."""

FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM", "HEIF"),
    "JXL",
)
"""What files may contain, whatever their names say. No other decoder of PIL runs: that of EPS would
start Ghostscript."""

_UPPER = tuple(suffix.upper() for suffix in IMAGE_SUFFIXES)
_PLUGINS = {"AVIF": "PIL._avif", "HEIF": "pillow_heif", "JXL": "pillow_jxl"}
_SUFFIXES_OF = {"HEIF": (".heic", ".heif", ".hif"), "JXL": (".jxl",), "AVIF": (".avif",)}
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")
_JXL_STARTS = (b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n")
_SUBFILE = 254  # tag of TIFF: 0 for a page, other for a smaller copy or a mask
_PAGES = 32  # of a TIFF that are looked at; pyramids have fewer
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, RuntimeError, MemoryError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Warning),  # a warning where Python raises them
)
"""The exceptions of PIL and its plug-ins for a broken file, depending on where it breaks."""


def is_image(name: str | PurePath) -> bool:
    """Return whether a file name has the suffix of a picture."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - for millions


def find_image(folder: Path | None, name: str) -> Path | None:
    """Return the picture of this name, given without or with its suffix, if the folder has one.

    Names are equal if their letters are, however Unicode writes them.
    """
    if folder is None:
        return None
    names = [name]
    if not name.isascii():
        names = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    suffixes = (*IMAGE_SUFFIXES, *_UPPER, "")
    paths = (folder / f"{each}{suffix}" for each in dict.fromkeys(names) for suffix in suffixes)
    return next((path for path in paths if path.is_file()), None)


def missing_plugin(name: str | PurePath) -> str | None:
    """Return the format of a picture that nothing here decodes, by its suffix; None if it is read.

    >>> missing_plugin("a.jpg") is None
    True
    """
    suffix = PurePath(name).suffix.lower()
    kind = next((kind for kind, suffixes in _SUFFIXES_OF.items() if suffix in suffixes), None)
    return None if kind is None or _can_decode(kind) else kind


@cache
def _can_decode(kind: str) -> bool:
    """Return whether a format has a decoder here, which its first picture brings in."""
    try:
        plugin = import_module(_PLUGINS[kind])
    except ImportError:
        return False
    if kind == "HEIF":
        plugin.register_heif_opener()
    return True


def open_image(
    file: BufferedReader | BytesIO, source: str | Path, *, max_pixels: int | None = None
) -> ImageFile.ImageFile:
    """Read the header of an open image file; errors call it ``source``.

    Args:
        file: at its start; it must stay open until the picture is loaded.
        source: its name.
        max_pixels: larger pictures are refused, because a small file may unpack to fill the memory;
            None takes ``PIL.Image.MAX_IMAGE_PIXELS``.

    Raises:
        DataError: the format is unknown or has no decoder here, or the picture is too large.
    """
    with decoding(source):
        start = file.read(32)
        file.seek(0)
        kind = _kind_of(start)
        if kind is not None and not _can_decode(kind):
            raise DataError(
                f"{source} holds {kind}, which needs a plug-in; pip install 'camkit[formats]'"
            )
        limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
        if kind == "JXL":  # its plug-in decodes the picture when it opens the file
            _check_pixels(jxl_size(file.read()), limit, source, told=max_pixels is not None)
            file.seek(0)
        image = _identified(file, start)
        if image is None:
            raise DataError(
                f"{source} cannot be read as an image (it is none of {', '.join(FORMATS)}); copy "
                "it again, or convert it to 8-bit RGB PNG or JPEG"
            )
        _check_pixels(image.size, limit, source, told=max_pixels is not None)
    return image


def _kind_of(start: bytes) -> str | None:
    """Return the format of a file if it may need a plug-in."""
    if start[4:8] == b"ftyp":
        brands = [start[at : at + 4] for at in range(8, 32, 4) if at != 12]
        if any(brand in _AVIF_BRANDS for brand in brands):
            return "AVIF"
        return "HEIF" if any(brand in _HEIF_BRANDS for brand in brands) else None
    return "JXL" if start.startswith(_JXL_STARTS) else None


def _identified(file: BufferedReader | BytesIO, start: bytes) -> ImageFile.ImageFile | None:
    """Open a file by the first decoder that takes it.

    `PIL.Image.open` is not used, because its limit of pixels can be set for the whole process only.
    """
    for load_decoders in (Image.preinit, Image.init):  # the most frequent, and all others
        load_decoders()
        for kind in FORMATS:
            factory, accept = Image.OPEN.get(kind, (None, None))
            if factory is None or (accept is not None and accept(start[:16]) is not True):
                continue
            file.seek(0)
            image: ImageFile.ImageFile = factory(file, "")
            return image
    return None


def _check_pixels(
    size: tuple[int, int], limit: int | None, source: str | Path, *, told: bool
) -> None:
    if limit is not None and size[0] * size[1] > limit:
        way = "the limit (--max-pixels)" if told else "PIL.Image.MAX_IMAGE_PIXELS"
        raise DataError(
            f"{source} has {size[1]}x{size[0]} pixels (rows x columns), more than the {limit} "
            f"pixels allowed; raise {way} if you trust its origin"
        )


@contextmanager
def decoding(source: str | Path) -> Iterator[None]:
    """Turn the errors of decoders into a DataError that names the file."""
    try:
        yield
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{source} cannot be read as an image ({reason}); "
            "copy it again, or convert it to 8-bit RGB PNG or JPEG"
        ) from error


def has_more_pages(image: ImageFile.ImageFile) -> bool:
    """Return whether a file that is open but not loaded holds pictures after its first.

    The second picture of a phone's JPEG (MPO) and the smaller copies in a TIFF do not count.
    """
    if image.format in ("MPO", "HEIF", "JXL") or not getattr(image, "is_animated", False):
        return False
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return True
    try:
        for page in range(1, _PAGES):
            image.seek(page)
            if not image.tag_v2.get(_SUBFILE, 0):
                return True
    except EOFError:
        return False
    except _BROKEN:
        return True  # a damaged page is a page
    finally:
        image.seek(0)
    return True
