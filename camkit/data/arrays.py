"""Arrays in .npy, .npz and safetensors files; what a header claims is compared with the file."""

import math
import tokenize
import zipfile
import zlib
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from camkit.data.unpickling import unpickle
from camkit.errors import DataError, one_line
from camkit.untrusted import bounded

MAX_UNPACKED = 1 << 30
"""Bytes that a compressed file may unpack to: 20 classes of 12 megapixels in float32."""

_UNREADABLE = (
    OSError,
    EOFError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,  # zip files of unknown kinds
    tokenize.TokenError,  # numpy parses headers that Python 2 wrote, and damaged ones
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: Path, *, pickles: bool = True) -> object:
    """Read the array in a file, or a dict of its arrays, without running anything.

    Args:
        path: a ``.npy``, ``.npz`` or safetensors file; its content tells which.
        pickles: read a dict of arrays that `numpy.save` has pickled, too, by `unpickle`.

    Raises:
        DataError: the file cannot be read, would run code, or unpacks to more than `MAX_UNPACKED`.
    """
    try:
        with bounded(path), path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            length = path.stat().st_size
            if start.startswith(b"\x93NUMPY"):
                return _read_npy(file, length, path, pickles=pickles)
            if start.startswith(b"PK\x03\x04"):
                return _read_npz(file, path)
            if start[8:] == b"{":
                return load_safetensors(file.read())
    except _UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read ({one_line(error, most=120)}); write it again, as plain arrays"
        ) from error
    raise DataError(f"{path} is no .npy, .npz or safetensors file; expected arrays")


def _read_npz(file: BufferedIOBase, path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > MAX_UNPACKED:
            raise DataError(
                f"{path} unpacks to {unpacked} bytes, more than the {MAX_UNPACKED} allowed; write "
                "smaller maps, or a .npy file"
            )
        arrays = {}
        for member in members:
            with archive.open(member) as content:
                name = member.filename.removesuffix(".npy")
                arrays[name] = _read_npy(
                    content,  # type: ignore[arg-type]  # typed as IO, and a BufferedIOBase
                    member.file_size,
                    path,
                    pickles=False,
                )
    return arrays


def _read_npy(file: BufferedIOBase, length: int, path: Path, *, pickles: bool) -> object:
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise DataError(f"{path} is of .npy version {version}; arrays are of 1.0 or 2.0")
    shape, fortran_order, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        if not pickles:
            raise ValueError("it holds a pickle, which could run code")
        return unpickle(file.read(), path)
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > length:
        raise ValueError(f"it promises {size} bytes and has {length}")
    raw = bytearray(size)
    read = file.readinto(raw)
    if read < size:
        raise ValueError(f"it ends after {read} of {size} bytes")
    array = np.frombuffer(raw, dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")
