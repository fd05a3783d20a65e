"""Which images of a chunk are to be done, and which only keep the others company."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

from camkit.bulk.items import Item, Refused
from camkit.bulk.journal import Error, Journal
from camkit.bulk.stages import chunks


@dataclass(frozen=True)
class Share:
    """The part of the chunks that a process works on; ranks of one world share all of them.

    Attributes:
        rank: of this process, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"`rank` must lie in 0 to {self.world - 1}, got {self.rank}")

    def of(
        self, entries: Iterable[Item | Refused], size: int
    ) -> Iterator[tuple[Item | Refused, ...]]:
        """Every ``world``-th chunk; chunks are the same whatever the world."""
        for number, chunk in enumerate(chunks(entries, size)):
            if number % self.world == self.rank:
                yield chunk


@dataclass(frozen=True)
class Planned:
    """What is left of a chunk.

    Attributes:
        items: all that are to be read, those done already among them: the same images as ever
            go through the model together, so the bytes come out the same.
        todo: keys of those that nothing is known of yet.
        errors: entries that are no images.
        settled: how many images of the chunk were done or had failed before.
    """

    items: tuple[Item, ...]
    todo: frozenset[str]
    errors: tuple[Error, ...] = ()
    settled: int = 0

    @property
    def part(self) -> str:
        """A name for the Parquet file of the chunk, the same however often it is begun."""
        return sha256("\n".join(sorted(self.todo)).encode()).hexdigest()[:24]


def plan(chunk: Iterable[Item | Refused], journal: Journal) -> Planned:
    """See what is left of a chunk."""
    entries = {one.key: one for one in chunk}
    known = journal.known(list(entries))
    items, errors = [], []
    for key, one in entries.items():
        if isinstance(one, Refused):
            if key not in known:
                errors.append(Error(key, "list", one.reason))
        elif known.get(key) not in ("list", "read"):  # what could not be read was no company
            items.append(one)
    todo = frozenset(one.key for one in items if one.key not in known)
    return Planned(tuple(items) if todo else (), todo, tuple(errors), len(known))
