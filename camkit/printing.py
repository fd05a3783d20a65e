"""What users read: the repr of objects that hold tensors in one short line, and counts."""

import reprlib
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor, nn


class _Shapes(reprlib.Repr):
    """Print tensors and arrays as dtype and shape, modules as their class, and cut what is long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = 3
        self.maxstring, self.maxother = 100, 160

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor):
            where = "" if x.device.type == "cpu" else f" on {x.device}"
            return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{where}"
        if isinstance(x, np.ndarray):
            return f"{x.dtype}{list(x.shape)}"
        if isinstance(x, nn.Module):
            return f"{type(x).__name__}(...)"
        return super().repr1(x, level)


_shapes = _Shapes()


@reprlib.recursive_repr()
def short_repr(thing: Any) -> str:
    """Return the repr of a dataclass that holds tensors; fields at their default are left out.

    Settings keep the repr that dataclasses have, as runs compare it to tell settings apart.
    """
    shown = [
        f"{field.name}={_shapes.repr(getattr(thing, field.name))}"
        for field in fields(thing)
        # a field may be unset while an error in `__init__` is reported
        if field.repr and getattr(thing, field.name, field.default) is not field.default
    ]
    return f"{type(thing).__qualname__}({', '.join(shown)})"


def several(number: int, noun: str) -> str:
    """Return a count and its noun, such as "1 box" or "2 categories".

    >>> several(1, "polygon"), several(2, "category"), several(0, "mask")
    ('1 polygon', '2 categories', '0 masks')
    """
    if number == 1:
        return f"1 {noun}"
    plural = (
        f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun[-1] in "sx" else f"{noun}s"
    )
    return f"{number} {plural}"
