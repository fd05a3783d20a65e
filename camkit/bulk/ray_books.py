"""The books of a bulk run on a Ray cluster: what is out, what came back, what the journal has."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from camkit.bulk.finishing import Made, OutFolder, write_part
from camkit.bulk.journal import Error, Journal
from camkit.bulk.plan import Planned
from camkit.bulk.ray_parcels import Parcel
from camkit.bulk.recipe import Recipe

_PAUSE = 1.0  # seconds between two entries in the journal


@dataclass(eq=False)
class _Open:
    """A chunk on its way: which images are still out, and what came of the others."""

    plan: Planned
    out: set[str]
    made: list[Made] = field(default_factory=list)
    errors: list[Error] = field(default_factory=list)


class Books:
    """What came back of each chunk, until the journal has it.

    Args:
        recipe: of the run.
        folder: of the results.
        journal: of the same folder.
        advance: told how many images were done and how many failed, as it happens.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: OutFolder,
        journal: Journal,
        advance: Callable[[int, int], None],
    ) -> None:
        self._shared = recipe.writing.cams == "parquet"
        self._folder, self._journal, self._advance = folder, journal, advance
        self._open: dict[int, _Open] = {}
        self._begun = 0
        self._written = time.monotonic()

    def begin(self, planned: Sequence[Planned]) -> list[Parcel]:
        """Open chunks; the parcels that they are sent as."""
        parcels = []
        for one in planned:
            self._begun += 1
            self._open[self._begun] = _Open(one, set(one.todo), errors=list(one.errors))
            self._advance(0, len(one.errors))
            if one.todo:
                parcels.append(Parcel(self._begun, one.todo, images=one.items))
        return parcels

    def take(self, parcel: Parcel) -> None:
        """Take in what came back.

        Raises:
            CamkitError: it ends the run.
        """
        if parcel.fatal is not None:
            raise parcel.fatal
        chunk = self._open.get(parcel.chunk)
        if chunk is None:  # only company was still out
            return
        made = [one for one in parcel.made if one.key in chunk.out]
        errors = [one for one in parcel.errors if one.key in chunk.out]
        chunk.made += made
        chunk.errors += errors
        chunk.out -= {one.key for one in made} | {one.key for one in errors}
        self._advance(len(made), len(errors))
        self.write(everything=False)

    def write(self, *, everything: bool) -> None:
        """Note in the journal what is done; maps that share a Parquet file are noted at once."""
        if not everything and time.monotonic() - self._written < _PAUSE:
            return
        over = [number for number, chunk in self._open.items() if not chunk.out]
        ready = [self._open[number] for number in over] if self._shared else self._open.values()
        made: list[Made] = []
        for chunk in ready:
            part = chunk.plan.part
            made += write_part(chunk.made, self._folder, part) if self._shared else chunk.made
        self._journal.record(made, [one for chunk in ready for one in chunk.errors])
        for chunk in ready:
            chunk.made, chunk.errors = [], []
        for number in over:
            del self._open[number]
        self._written = time.monotonic()
