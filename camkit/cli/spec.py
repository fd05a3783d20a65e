"""Objects as they are written on a command line or in a settings file: par:steps=15,scale=0.5."""

from collections.abc import Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from camkit.data.names import closest

Kinds = Mapping[str, type]
"""The names that may be written, and the dataclass behind each."""

_PLAIN = (NoneType, bool, int, float, str)  # in the order in which a union tries them


def read_spec(text: str, kinds: Kinds, what: str) -> tuple[type, dict[str, Any], dict[str, str]]:
    """Read ``name`` or ``name:key=value,key=value``; the first key may be left out.

    Args:
        text: as written.
        kinds: what may be named.
        what: what they are called in an error, in the singular.

    Returns:
        The dataclass, its settings, and the parts that are no settings of it, by key.

    Raises:
        ValueError: a name or a value is not one of those that exist.
    """
    name, _, written = text.strip().partition(":")
    if name not in kinds:
        raise ValueError(f"no {what} is called {name!r}; {closest(name, kinds)}")
    known = readable(kinds[name])
    given: dict[str, Any] = {}
    others: dict[str, str] = {}
    for number, part in enumerate(written.split(",") if written else []):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and number == 0 and known:
            key, value = next(iter(known)), key
        if key in given or key in others:
            raise ValueError(f"{text}: {key} is set twice")
        if key in known and value:
            given[key] = _value(value, known[key], text, key)
        else:
            others[key] = part.strip()
    return kinds[name], given, others


def make(text: str, kinds: Kinds, what: str) -> Any:
    """Make the object that a text asks for.

    Raises:
        ValueError: a name, a setting or a value is not one of those that exist.
    """
    kind, given, others = read_spec(text, kinds, what)
    if others:
        refuse(text, kind, others)
    return kind(**given)


def refuse(text: str, kind: type, others: Mapping[str, str], extra: str = "") -> None:
    """Say that a setting does not exist, and which do."""
    written = next(iter(others.values()))
    known = [f"{one}={shown(hint)}" for one, hint in readable(kind).items()]
    name = text.strip().partition(":")[0]
    listed = ", ".join([*known, *([extra] if extra else [])]) or "none"
    raise ValueError(f"{text}: {written!r} is no setting of {name}; it has {listed}")


def readable(kind: Any) -> dict[str, Any]:
    """The settings of a dataclass that can be written, with their types."""
    hints = get_type_hints(kind)
    found = {one.name: hints[one.name] for one in fields(kind) if one.init}
    return {key: hint for key, hint in found.items() if _readable(hint)}


def shown(hint: Any) -> str:
    """How the values of a kind are written: INT, FLOAT, slic|felzenszwalb, INTxINT."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return "INTxINT" if len(get_args(hint)) == 2 and ... not in get_args(hint) else "INTxINTx.."
    if get_origin(hint) in (Union, UnionType):
        return "|".join(shown(one) for one in get_args(hint) if _readable(one))
    return "none" if hint is NoneType else str(hint.__name__).upper()


def shown_value(value: Any) -> str:
    """A value as it would be written."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def _readable(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_readable(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return set(get_args(hint)) <= {int, ...}
    return get_origin(hint) is Literal or hint in _PLAIN


def _value(text: str, hint: Any, step: str, key: str) -> Any:
    """Read a value of a kind.

    Raises:
        ValueError: the text is no such value.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    order = [one for one in kinds if one not in _PLAIN] + [one for one in _PLAIN if one in kinds]
    for kind in order:
        try:
            return _read(text, kind)
        except ValueError:
            continue
    raise ValueError(f"{step}: {key} must be {shown(hint)}, got {text!r}")


def _read(text: str, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        sides = tuple(int(side) for side in text.split("x"))
        if ... not in get_args(kind) and len(sides) != len(get_args(kind)):
            raise ValueError(text)
        return sides
    if get_origin(kind) is Literal or kind in (NoneType, bool):
        known = (True, False) if kind is bool else get_args(kind) or (None,)
        written = {str(one).lower(): one for one in known}
        if text.lower() not in written:
            raise ValueError(text)
        return written[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(text)
