"""Read pickles of arrays without running anything that they name."""

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from camkit.data.opcodes import check_opcodes
from camkit.errors import DataError, one_line

_DAMAGED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
_NUMBERS = re.compile(r"[biufc]\d{1,2}")
_OBJECTS = "O8"
_TORCH_MAGIC, _TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def unpickle(data: bytes, source: Path) -> object:
    """Read what `numpy.save` pickles: an array of objects, such as one dict of arrays.

    Nothing that the pickle names is imported or called. The few names that such files need are
    mapped to functions of this module, which build numpy arrays from bytes; every other name is an
    error. Errors mention ``source``.

    Returns:
        The single object of a 0-d array, else the pickled object. Arrays and torch tensors in a
        dict become numpy arrays, numpy scalars become Python numbers.

    Raises:
        DataError: the pickle asks for another name, or is damaged.
    """
    try:
        file = io.BytesIO(data)
        content = _to_plain(_load(file, _NAMES))
        if file.read(1):  # a damaged pickle may end early and look like a shorter one
            raise pickle.UnpicklingError("bytes follow its end")
    except _ForbiddenNameError as error:
        raise DataError(
            f"{source} asks for {error}, which no file of class maps needs and which could run "
            "code; it was not run; do not load this file with numpy or pickle either"
        ) from error
    except _DAMAGED as error:
        raise DataError(
            f"{source} holds a damaged pickle or objects other than arrays ({_in_short(error)}); "
            "write it again"
        ) from error
    return content


def _in_short(error: Exception) -> str:
    # a key may be megabytes of the file, which the error would repeat
    return one_line(error, most=120) or type(error).__name__


class _ForbiddenNameError(Exception):
    """A pickle named something other than the few names it may use."""


class _Constructor:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        # without this method, a pickle could set attributes that outlive it
        raise pickle.UnpicklingError("it changes a function")


class _Dtype:
    """A pickled dtype; numpy never receives a state that it would trust blindly."""

    def __init__(self, code: str, *_: object) -> None:
        if code != _OBJECTS and not _NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(f"it holds an array of dtype {code}")
        self.is_object = code == _OBJECTS
        self._code = code
        self._order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def numbers(self) -> np.dtype[Any]:
        if self.is_object:
            raise pickle.UnpicklingError("it takes bytes for objects")
        return np.dtype(self._order + self._code)


class _Array:
    """A pickled array; the pickle sets its content as the state."""

    def __init__(self, array: np.ndarray | None = None) -> None:
        self._array = array

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        if not dtype.is_object:
            self._array = _numbers(content, dtype, shape, "F" if is_fortran else "C")
            return
        objects = np.empty(len(content), dtype=object)
        for index, value in enumerate(content):
            objects[index] = value
        self._array = objects.reshape(shape, order="F" if is_fortran else "C")

    def array(self) -> np.ndarray:
        if self._array is None:
            raise pickle.UnpicklingError("it holds an array without content")
        return self._array


class _Storage(NamedTuple):
    """A pickled tensor's reference to its bytes, which follow after the pickle."""

    dtype: np.dtype[Any]
    key: str
    length: int


class _Reader(pickle.Unpickler):
    """An unpickler that knows only the given names."""

    def __init__(self, file: io.BytesIO, names: Mapping[tuple[str, str], object]) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 wrote the bytes of arrays as text
        self._names = names

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._names[module, name]
        except KeyError:
            raise _ForbiddenNameError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> object:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise pickle.UnpicklingError("its tensors are stored in an unknown way")
        return _Storage(dtype, key, count)


def _load(file: io.BytesIO, names: Mapping[tuple[str, str], object]) -> Any:
    check_opcodes(file, len(file.getbuffer()))
    return _Reader(file, names).load()


def _to_plain(value: object) -> object:
    if isinstance(value, _Array):
        array = value.array()
        value = array.item() if array.dtype == object and array.shape == () else array
    if isinstance(value, dict):
        # class maps need one level; deeper ones may share parts and grow without end
        if not all(isinstance(key, str | int) for key in value):
            raise pickle.UnpicklingError("a key is neither a name nor a number")
        return {key: v.array() if isinstance(v, _Array) else v for key, v in value.items()}
    return value


def _numbers(raw: bytes | bytearray | str, dtype: _Dtype, shape: Any, order: Any) -> np.ndarray:
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    number = dtype.numbers()
    if not all(type(side) is int and side >= 0 for side in shape):
        raise pickle.UnpicklingError("an array has no shape")
    if len(raw) != math.prod(shape) * number.itemsize:
        raise pickle.UnpicklingError(f"{len(raw)} bytes are no array of shape {shape}")
    return np.ndarray(shape, number, buffer=raw, order=order)


def _encode(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes as {codec}")
    return text.encode("latin1")


def _read_storage(data: bytes) -> _Array:
    file = io.BytesIO(data)
    magic, protocol, machine = (_load(file, {}) for _ in range(3))
    if (magic, protocol, machine["little_endian"]) != (_TORCH_MAGIC, _TORCH_PROTOCOL, True):
        raise pickle.UnpicklingError("its tensors are of an unknown format")
    storage = _load(file, _STORAGES)
    keys = _load(file, {})
    count = int.from_bytes(file.read(8), "little")
    raw = file.read()
    if keys != [storage.key] or count != storage.length:
        raise pickle.UnpicklingError("its tensors are not stored one by one")
    if len(raw) != count * storage.dtype.itemsize:
        raise pickle.UnpicklingError(f"{len(raw)} bytes are no {count} numbers of a tensor")
    return _Array(np.ndarray((count,), storage.dtype, buffer=raw))


def _rebuild_tensor(storage: _Array, offset: Any, size: Any, stride: Any, *_: object) -> _Array:
    values = storage.array()
    if not all(type(side) is int for side in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor has no shape")
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if min((offset, *size, *stride)) < 0 or count > values.size:
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    if not count:
        return _Array(np.empty(size, values.dtype))
    if reach >= values.size:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    strides = [step * values.itemsize for step in stride]
    return _Array(np.lib.stride_tricks.as_strided(values[offset:], size, strides))


_TORCH_CODES = {"Half": "<f2", "Float": "<f4", "Double": "<f8", "Byte": "u1", "Char": "i1"}
_TORCH_CODES |= {"Short": "<i2", "Int": "<i4", "Long": "<i8"}
_STORAGES = {("torch", f"{name}Storage"): np.dtype(code) for name, code in _TORCH_CODES.items()}
_NAMES: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Constructor(_Array),
    ("numpy", "dtype"): _Constructor(_Dtype),
    ("_codecs", "encode"): _Constructor(_encode),
    ("__builtin__", "bytes"): _Constructor(lambda: b""),  # old protocols write empty bytes so
    ("collections", "OrderedDict"): _Constructor(dict),
    ("torch.storage", "_load_from_bytes"): _Constructor(_read_storage),
    ("torch._utils", "_rebuild_tensor_v2"): _Constructor(_rebuild_tensor),
}
for _package in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _NAMES[f"{_package}.multiarray", "_reconstruct"] = _Constructor(lambda *_: _Array())
    _NAMES[f"{_package}.multiarray", "scalar"] = _Constructor(
        lambda dtype, raw: _numbers(raw, dtype, (), "C").item()
    )
    _NAMES[f"{_package}.numeric", "_frombuffer"] = _Constructor(
        lambda raw, dtype, shape, order: _Array(_numbers(raw, dtype, shape, order))
    )
