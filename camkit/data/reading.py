"""Settings that say how a data set is read where its files do not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from camkit.data.sample import MaskForm, Sample, mask_values, unique_values
from camkit.errors import DataError
from camkit.screen import progress
from camkit.tensors import IGNORE, IGNORE_16

Zero: TypeAlias = Literal["background", "void", "class"]
"""What 0 means in a mask: background, pixels that are not scored, or the first class."""


@dataclass(frozen=True)
class Reading:
    """Settings of `open_dataset`.

    Attributes:
        classes: their names, background not counted, in the order of the ids.
        void: values of masks that are not scored, in place of 255.
        zero: what 0 means. None decides by the files, else takes "background".
        values: the class number (from 1, 0 for background) of values in masks, if they are not the
            numbers themselves, such as {255: 1}.
        layout: the name of the layout, one of `LAYOUTS`; None recognises it.
    """

    classes: tuple[str, ...] | None = None
    void: tuple[int, ...] | None = None
    zero: Zero | None = None
    values: Mapping[int, int] | None = field(default=None, hash=False)
    layout: str | None = None

    def __post_init__(self) -> None:
        if self.zero not in (None, *get_args(Zero)):
            raise ValueError(f'`zero` must be "background", "void" or "class", got {self.zero!r}')
        if self.zero not in (None, "background") and self.values is not None:
            raise ValueError("`values` already says what 0 means; leave out `zero`")
        if self.classes is not None:
            _check_classes(self.classes)
        if self.values is not None and (not self.values or min(self.values.values()) < 0):
            raise ValueError(f"`values` must map values of masks to 0, 1, ..., got {self.values}")

    def given(self) -> tuple[str, ...]:
        """Return the names of the settings that are given, but the layout."""
        return tuple(
            each.name
            for each in fields(self)
            if each.name != "layout" and getattr(self, each.name) is not None
        )

    def form(self, count: int, zero: Zero | None = None) -> MaskForm:
        """Return the form of masks of ``count`` classes; ``zero`` is what the files say of 0."""
        void = self.void
        if self.values is not None:
            ids = {0: 0} | dict(self.values)
            kept = tuple(value for value in _void_of(count) if value not in ids)
            return MaskForm(ids=ids, ignored=kept if void is None else void)
        zero = self.zero or zero or "background"
        if zero == "background":
            return MaskForm() if void is None else MaskForm(ignored=void)
        void = _void_of(count) if void is None else void
        numbers = range(1, count + 1)
        if zero == "void":
            return MaskForm(ids={number: number for number in numbers}, ignored=(0, *void))
        return MaskForm(ids={number - 1: number for number in numbers}, ignored=void)


def _void_of(count: int) -> tuple[int, ...]:
    return (IGNORE, IGNORE_16) if count < IGNORE else (IGNORE_16,)


def _check_classes(classes: tuple[str, ...]) -> None:
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"`classes` must be different names, got {', '.join(classes) or 'none'}")
    if is_background(classes[0]):
        raise ValueError("`classes` must start with the first class, not the background")


def is_background(name: str) -> bool:
    """Return whether a name in a list of classes stands for the background."""
    return name.strip("_ ").casefold() in ("background", "bg")


def some_class(
    entries: Iterable[Sample | DataError], split: str, root: Path
) -> Iterator[Sample | DataError]:
    """Pass on samples whose labels come from their masks; add an error if none shows a class.

    The usual cause is a folder of masks of 0 and 255: all that is not background is ignored, and an
    empty prediction would be perfect.
    """
    masks, shown = 0, False
    for entry in entries:
        if isinstance(entry, Sample):
            masks, shown = masks + (entry.mask is not None), shown or bool(entry.classes)
        yield entry
    if masks and not shown:
        yield DataError(no_class(f"{root}: none of the {masks} masks of {split}"))


def no_class(subject: str) -> str:
    """Say that masks show no class, and what to do."""
    return (
        f"{subject} shows a class, only background and ignored pixels; if 255 marks the objects, "
        "say so with values={255: 1} (--mask-values 255=1)"
    )


def numbered_classes(
    paths: Sequence[Path], reading: Reading, zero: Zero | None = None
) -> tuple[str, ...]:
    """Name classes by their numbers, after a look at every mask.

    Args:
        paths: the masks.
        reading: settings of the masks.
        zero: what the files say of 0.

    Raises:
        DataError: no mask shows a class, or one cannot be read.
    """
    zero = reading.zero or zero
    if reading.values is not None:
        count = max(reading.values.values())
    else:
        void = {*(reading.void or (IGNORE, IGNORE_16)), -1}
        held: set[int] = set()
        for path in progress(paths, desc="looking for classes", unit="mask", mininterval=0.5):
            held |= set(unique_values(mask_values(path)).tolist())
        highest = max(held - void, default=0)
        count = highest + (zero == "class")
    if count == 0:
        place = paths[0].parent if paths else "the data set"
        raise DataError(no_class(f"{place}: none of the {len(paths)} masks"))
    return tuple(f"class {number}" for number in range(1, count + 1))
