"""What a host returns: the tensors in any structure, read or replaced."""

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# they may refer to anything, and hold no part of an output
_CLOSED = (
    *(str, bytes, int, float, complex, type(None), type, ModuleType, FunctionType, MethodType),
    *(nn.Module, nn.Parameter, torch.dtype, torch.device, torch.Size, torch.Generator),
)


def replace_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """Replace the tensors in a structure, and return the structure.

    Lists, dictionaries and objects stay the same objects, with new contents; their own setters are
    not called. Tuples are made anew if something in them changes. A tensor that occurs twice is
    replaced by one tensor. Parameters and modules are left alone.

    Args:
        value: a tensor, or tuples, lists, dictionaries, dataclasses and other objects of them.
        replace: returns the new tensor; or the same, which changes nothing.
    """
    return _Replacement(replace)(value)


class _Replacement:
    """One walk through a structure, which may refer to itself."""

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        self._replace = replace
        self._done: dict[int, tuple[Any, Any]] = {}  # by id; the values are kept alive

    def __call__(self, value: Any) -> Any:
        if isinstance(value, _CLOSED):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = value, value
            self._done[id(value)] = value, self._changed(value)
        return self._done[id(value)][1]

    def _changed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._replace(value)
        if isinstance(value, list):
            for place, part in enumerate(list(value)):
                self._put(part, partial(list.__setitem__, value, place))
        elif isinstance(value, dict):
            for key, part in list(value.items()):
                self._put(part, partial(dict.__setitem__, value, key))
        for name, part in list(_attributes(value)):
            self._put(part, partial(object.__setattr__, value, name))
        return self._changed_tuple(value) if isinstance(value, tuple) else value

    def _put(self, part: Any, put: Callable[..., None]) -> None:
        new = self(part)
        if new is not part:
            put(new)

    def _changed_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = [self(part) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        kind = type(value)
        if hasattr(kind, "n_fields"):  # torch.return_types, which only their type can make
            made: tuple[Any, ...] = kind(parts)
            return made
        new_tuple = tuple.__new__(kind, parts)  # not the type's own constructor
        for name, attribute in _attributes(value):
            object.__setattr__(new_tuple, name, attribute)
        return new_tuple


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that an object itself holds, by name."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in a structure once each, in order; see `replace_tensors`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    replace_tensors(value, note)
    return found
