"""Arguments checked where they enter: what was expected, what came, and what to write instead."""

import operator
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import nn

Kind: TypeAlias = Literal["seed", "edit", "refiner", "views"]

_HOMES: dict[str, Kind] = {
    "camkit.seeds": "seed",
    "camkit.edits": "edit",
    "camkit.refiners": "refiner",
}
_ARGUMENT: dict[Kind, str] = {
    "seed": "seed=...",
    "edit": "edit=...",
    "refiner": "refine=[...]",
    "views": "views=...",
}
_EXAMPLE: dict[Kind, str] = {
    "seed": "camkit.GradientSeed()",
    "edit": "camkit.DOEI()",
    "refiner": "camkit.DenseCRF()",
    "views": "camkit.Views(flip=True)",
}


def kind_of(value: object) -> Kind | None:
    """Return what an object of camkit is; None for objects of other code and of camkit.contrib."""
    owner = type(value).__module__
    if owner == "camkit.seeds.views" and type(value).__name__ == "Views":
        return "views"
    homes = (kind for home, kind in _HOMES.items() if owner.startswith(f"{home}."))
    return next(homes, None)


def check_stage(argument: str, value: object, kind: Kind) -> None:
    """Check a seed, an edit, a refiner or views.

    Args:
        argument: its name, for the error.
        value: an object of camkit of this kind, or of other code: any callable.
        kind: the kind expected.

    Raises:
        TypeError: it is a class without brackets, an object of another kind, or no callable.
    """
    expected = f"`{argument}` must be {_an(kind)}, such as {_EXAMPLE[kind]}"
    if isinstance(value, type):
        raise TypeError(
            f"{expected}, got the class {value.__name__}; add brackets: {value.__name__}()"
        )
    if isinstance(value, str):
        hint = "" if kind == "views" else "; camkit.Method.from_words reads short names"
        raise TypeError(f"{expected}, got the text {value!r}{hint}")
    found = kind_of(value)
    if found is not None and found != kind:
        raise TypeError(f"{expected}, got {_an(found)}; give it as {_ARGUMENT[found]}: {value!r}")
    if kind == "views":
        if found is None:
            raise TypeError(f"{expected}, got {value!r}")
        return
    methods = ("log_weights", "pair_bias") if kind == "edit" else ()
    if not callable(value) and not any(hasattr(value, name) for name in methods):
        raise TypeError(f"{expected}, or a function of your own, got {value!r}")


def _an(kind: Kind) -> str:
    return {"edit": "an edit", "views": "camkit.Views"}.get(kind, f"a {kind}")


def check_model(model: object) -> None:
    """Raise a TypeError for what is no torch module."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise TypeError(f"`model` must be a model, got the class {model.__name__}; add brackets")
    hint = ""
    if isinstance(model, str):
        hint = f"; create it first: timm.create_model({model!r}, pretrained=True)"
    raise TypeError(f"`model` must be a torch.nn.Module, got {model!r}{hint}")


def check_function(argument: str, value: object) -> None:
    """Raise a TypeError for what is neither None nor callable."""
    if value is not None and not callable(value):
        raise TypeError(f"`{argument}` must be a function, got {value!r}")


def check_fraction(argument: str, value: object) -> None:
    """Check that a number lies in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"`{argument}` must be a number in [0, 1], got {value!r}")
    if not 0.0 <= float(value) <= 1.0:  # a NaN fails as well
        raise ValueError(f"`{argument}` must lie in [0, 1], got {value}")


def as_blocks(argument: str, value: Any) -> int | tuple[int, ...] | None:
    """Return a number of blocks or their indices as plain integers; numpy's are taken as well."""
    if value is None:
        return None
    try:
        return operator.index(_not_bool(value))
    except TypeError:
        return as_integers(argument, value, of="a number of blocks or a list of their indices")


def as_integers(
    argument: str, value: Any, *, of: str = "a list of positions, such as [0]"
) -> tuple[int, ...] | None:
    """Return integers in a sequence as a tuple."""
    if value is None:
        return None
    try:  # the characters of a text are no integers
        return tuple(operator.index(_not_bool(each)) for each in value)
    except TypeError as error:
        raise TypeError(f"`{argument}` must be {of}, got {value!r}") from error


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError("a truth value is no number")
    return value


def as_names(argument: str, value: Iterable[str] | None) -> tuple[str, ...] | None:
    """Return names in a sequence as a tuple."""
    if value is None:
        return None
    if isinstance(value, str):
        raise TypeError(f"`{argument}` must be a list of names, such as [{value!r}], got {value!r}")
    return tuple(value)
