"""What a pickle would build, from its opcodes alone: sizes are bounded before anything is built."""

import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_NEW = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT")
_FIXED = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
_FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")
_DEEPEST = 32  # tuples inside each other; files of arrays have up to 4
_ATOMS = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.stack_before == []
    and len(opcode.stack_after) == 1
    and opcode.name not in (*_GETS, *_NEW, "EMPTY_TUPLE", "MARK", "GLOBAL", "PERSID")
)
"""Opcodes of numbers and texts."""


@dataclass(eq=False, slots=True)
class _Value:
    """Something on the stack of the unpickler.

    Attributes:
        size: values in it, each counted as often as it can be reached.
        depth: of the tuples in it.
        grows: a list, dict or set.
        shared: it was taken from the memo.
    """

    size: int = 1
    depth: int = 0
    grows: bool = False
    shared: bool = False


_MARK, _ATOM = _Value(), _Value(shared=True)


def check_opcodes(file: BytesIO, length: int) -> None:
    """Refuse a pickle whose values would be larger than its file; leave the file where it was.

    A tuple of two references to a tuple of two references, and so on, is a small file, but
    hashing, comparing or printing it takes for ever; a deep one overflows the stack of Python.
    Files of arrays share neither lists nor large tuples, and nest few of them.

    Args:
        file: at the start of the pickle.
        length: of the file.

    Raises:
        pickle.UnpicklingError: the values are too large, or the opcodes do not fit each other.
        ValueError: the bytes are no pickle.
    """
    machine = _Machine(2 * length + 1000, length)
    start = file.tell()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.actions[opcode.name](argument)
    except (IndexError, KeyError) as error:
        raise pickle.UnpicklingError("its opcodes do not fit each other") from error
    file.seek(start)


class _Machine:
    """The stack and the memo of an unpickler, with sizes in place of values.

    Attributes:
        actions: what each opcode does.
    """

    def __init__(self, most: int, slots: int) -> None:
        self._most, self._slots = most, slots
        self._stack: list[_Value] = []
        self._memo: dict[int, _Value] = {}
        self.actions = {opcode.name: self._action(opcode) for opcode in pickletools.opcodes}

    def _action(self, opcode: pickletools.OpcodeInfo) -> Callable[[Any], object]:
        """Return what `pickletools` says of an opcode, as a function of its argument."""
        name, before = opcode.name, opcode.stack_before
        special: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(_PUTS, self._put),
            **dict.fromkeys(_GETS, self._get),
            **dict.fromkeys(_ATOMS, lambda _: self._stack.append(_ATOM)),
            "DUP": lambda _: self._take(self._stack[-1]),
            "MARK": lambda _: self._stack.append(_MARK),
            "POP": lambda _: self._stack.pop(),
        }
        if name in special:
            return special[name]
        marked = pickletools.markobject in before
        count = before.index(pickletools.markobject) if marked else len(before)
        if name in _FILLS:
            return lambda _: self._fill(self._pop(count - 1, marked=marked))
        if name in _NEW or name in _FIXED:
            grows = name in _NEW
            return lambda _: self._push(_Value(grows=grows), self._pop(count, marked=marked))
        after = len(opcode.stack_after)
        return lambda _: self._replace(count, after, marked=marked)

    def _put(self, argument: int | None) -> None:
        slot = len(self._memo) if argument is None else argument
        # the unpickler allocates every slot below the highest one, whether it is used or not
        if slot > self._slots:
            raise pickle.UnpicklingError("its memory slots do not fit its length")
        self._memo[slot] = self._stack[-1]

    def _get(self, slot: int) -> None:
        self._take(self._memo[slot])

    def _take(self, value: _Value) -> None:
        if value.grows:
            raise pickle.UnpicklingError("it uses a list or a dict twice")
        value.shared = True
        self._stack.append(value)

    def _pop(self, count: int, *, marked: bool) -> list[_Value]:
        """Take the values down to a mark, and then so many more."""
        stack = self._stack
        items = []
        if marked:
            while (value := stack.pop()) is not _MARK:
                items.append(value)
        return items + [stack.pop() for _ in range(count)]

    def _replace(self, count: int, after: int, *, marked: bool) -> None:
        self._pop(count, marked=marked)
        for _ in range(after):
            self._stack.append(_Value())

    def _fill(self, items: list[_Value]) -> None:
        container = self._stack.pop()
        if container.shared:
            raise pickle.UnpicklingError("it fills an object that it uses elsewhere")
        container.grows = True
        self._push(container, items)

    def _push(self, value: _Value, items: list[_Value]) -> None:
        for item in items:
            value.size += item.size
            if item.depth >= value.depth and not value.grows:  # nothing hashes a list
                value.depth = item.depth + 1
        if value.size > self._most or value.depth > _DEEPEST:
            raise pickle.UnpicklingError("its values are nested too deeply or too often")
        self._stack.append(value)
