"""The chunks of a bulk run in work: what each still needs, and what came of it."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256

from camkit.bulk.items import Failure, Item, printable
from camkit.bulk.journal import Awaited, Journal, Known, name_of_second, twice
from camkit.bulk.recipe import Job
from camkit.bulk.stages import ImageResult, Lesson, write_part
from camkit.errors import one_line

_PAUSE = 1.0  # seconds between two writes to the journal
_LARGEST = 2**31  # class indices are below
_UNSETTLED = ("list", "awaited")  # stages of rows that are of no image, or not there yet


@dataclass(frozen=True)
class ChunkPlan:
    """A chunk: the images that still need results, and those that keep its batches identical.

    Attributes:
        items: images to read. Finished ones are among them, so that the same images go through
            the model together and the bytes of the results stay the same.
        todo: keys of the images that need results.
        failures: entries of the source that are not images, or that have the key of another one.
        settled: number of entries that earlier runs finished or gave up, or that are repeated.
        offered: number of entries of the source.
        taken: failures of images in work or done before, whose key another image has.
        damaged: number of images done before whose files were damaged; they are in ``todo`` again.
    """

    items: tuple[Item, ...]
    todo: frozenset[str]
    failures: tuple[Failure, ...] = ()
    settled: int = 0
    offered: int = 0
    taken: tuple[Failure, ...] = ()
    damaged: int = 0

    @property
    def part(self) -> str:
        """Name of the chunk's Parquet file, which depends on ``todo`` alone."""
        return sha256("\n".join(sorted(self.todo)).encode()).hexdigest()[:24]


def plan(
    chunk: Sequence[Item | Failure], journal: Journal, job: Job = "maps", *, verify: bool = False
) -> ChunkPlan:
    """Plan a chunk from what the journal knows.

    Two images with one key fail both. Whether they do, and which images share batches, does not
    depend on interruptions: images that have a key twice within the chunk are not read, others are.

    Args:
        chunk: entries of the source.
        journal: of the results folder.
        job: the pass.
        verify: check the files of finished images; those that are damaged are done again.
    """
    planner = _Planner(chunk, journal, job, verify=verify)
    for entry in planner.entries:
        planner.add(entry)
    return planner.end()


def origin_of(entry: Item) -> str:
    """Return the text that tells an image from others of the same key."""
    return str(entry.place) if entry.origin is None else entry.origin


def _number(origin: str) -> int:
    digest = blake2b(origin.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


class _Planner:
    """Sorts the entries of a chunk by what is to be done with them."""

    def __init__(
        self, chunk: Sequence[Item | Failure], journal: Journal, job: Job, *, verify: bool
    ) -> None:
        self._journal, self._job, self._offered = journal, job, len(chunk)
        distinct: dict[tuple[str, int | None], Item | Failure] = {}
        for entry in map(checked, chunk):
            number = _number(origin_of(entry)) if isinstance(entry, Item) else None
            distinct.setdefault((entry.key, number), entry)
        self._numbers = {id(entry): number for (_, number), entry in distinct.items()}
        self.entries = list(distinct.values())
        self._settled = len(chunk) - len(distinct)  # repeated
        keys = [key for key, _ in distinct]
        self._clashing = {key for key, count in Counter(keys).items() if count > 1}
        damaged = journal.forget_damaged(keys) if verify and job == "maps" else set()
        self._damaged = len(damaged)
        self._known = journal.origins(keys, job)
        self._items: list[Item] = []
        self._todo: set[str] = set()
        self._held: dict[str, Awaited] = {}
        self._failures: dict[str, Failure] = {}
        self._taken: dict[str, Failure] = {}
        self._adopted: dict[str, int] = {}

    def add(self, entry: Item | Failure) -> None:
        """Decide about an entry."""
        key, number = entry.key, self._numbers[id(entry)]
        owner = self._known.get(key)
        if owner is None:
            self._add_new(entry, number)
        elif number is None or owner.origin in (None, number):
            self._settled += 1
            if number is not None and owner.origin is None and owner.stage not in _UNSETTLED:
                self._adopted[key] = number
                self._known[key] = Known(owner.stage, number)
            if isinstance(entry, Item) and owner.stage not in ("list", "read"):
                self._batch(entry)
        elif isinstance(entry, Item):
            self._add_second(entry, owner)

    def _add_new(self, entry: Item | Failure, number: int | None) -> None:
        """Add an entry whose key is free."""
        key = entry.key
        self._known[key] = Known("awaited", number)
        if isinstance(entry, Failure):
            self._failures[key] = entry
            return
        self._held[key] = Awaited(number or 0, str(entry.place), origin_of(entry))
        self._todo.add(key)
        self._batch(entry)

    def _add_second(self, entry: Item, owner: Known) -> None:
        """Add an image whose key another one has."""
        key = entry.key
        name = name_of_second(key, origin_of(entry))
        held = self._held.get(key)
        first = self._journal.place_of(key, self._job) if held is None else held.place
        reason = twice(key, first, str(entry.place))
        if self._journal.known([name], self._job):
            self._settled += 1
        else:
            self._failures[name] = Failure(name, "key", reason)
        if key in self._todo:
            self._todo.remove(key)
            self._failures[key] = Failure(key, "key", reason)
        elif owner.stage != "key" and key not in self._failures and self._job == "maps":
            self._taken[key] = Failure(key, "key", reason)
        self._batch(entry)

    def _batch(self, item: Item) -> None:
        """Let an image go through the model with the others of the chunk."""
        if item.key not in self._clashing:
            self._items.append(item)

    def end(self) -> ChunkPlan:
        """Return the plan, and tell the journal which images it is going to receive."""
        self._journal.adopt(self._adopted, self._job)
        self._journal.await_images(self._held, self._job)
        todo = frozenset(self._todo)
        return ChunkPlan(
            tuple(self._items) if todo else (),
            todo,
            tuple(self._failures.values()),
            self._settled,
            self._offered,
            tuple(self._taken.values()),
            self._damaged,
        )


def checked(entry: Item | Failure) -> Item | Failure:
    """Return the entry, or a failure if its key or its classes cannot be those of an image."""
    if isinstance(entry, Failure):
        return entry
    key = entry.key
    if not {"", ".", ".."}.isdisjoint(key.split("/")) or "\0" in key:
        reason = f"{key!r} cannot name results; give a relative path without .."
        return Failure(f"{printable(key)}//", "list", one_line(reason))
    if entry.classes and not 0 <= min(entry.classes) <= max(entry.classes) < _LARGEST:
        return Failure(key, "list", "class indices must lie in 0 to 2147483647; correct the labels")
    return entry


@dataclass(eq=False)
class _OpenChunk:
    """A chunk in work: keys still to come, and outcomes that the journal does not have yet."""

    plan: ChunkPlan
    pending: set[str]
    outcomes: list[ImageResult | Failure]


class Ledger:
    """Collects the outcomes of chunks in work, and writes them to the journal.

    Its set ``unfitted`` names the classes of the images that a read-out does not know; ``notes``
    counts what is noted of images.

    Args:
        journal: of the results folder.
        advance: called with the numbers of images done and failed, as they come.
        by_chunk: record chunks as a whole, because the maps of a chunk share a Parquet file.
    """

    def __init__(
        self, journal: Journal, advance: Callable[[int, int], None], *, by_chunk: bool
    ) -> None:
        self.folder = journal.folder
        self.unfitted: set[str] = set()
        self.notes: Counter[str] = Counter()
        self._journal, self._advance, self._by_chunk = journal, advance, by_chunk
        self._open: dict[int, _OpenChunk] = {}
        self._begun = 0
        self._written = time.monotonic()

    def __len__(self) -> int:
        """The number of open chunks."""
        return len(self._open)

    def begin(self, planned: ChunkPlan) -> int:
        """Open a chunk and return its number."""
        self._begun += 1
        failures: list[ImageResult | Failure] = [*planned.failures, *planned.taken]
        self._open[self._begun] = _OpenChunk(planned, set(planned.todo), failures)
        self._advance(0, len(planned.failures))
        return self._begun

    def add(self, number: int, *outcomes: ImageResult | Failure | Lesson) -> None:
        """Take outcomes of a chunk; those of images that need no result are dropped."""
        chunk = self._open.get(number)
        if chunk is None:  # only finished images of it were still in work
            return
        for outcome in outcomes:
            if not isinstance(outcome, Lesson) and outcome.key in chunk.pending:
                chunk.pending.remove(outcome.key)
                chunk.outcomes.append(outcome)
                if isinstance(outcome, ImageResult):
                    self.unfitted.update(outcome.row.get("unfitted", ()))
                    self.notes.update(outcome.row.get("notes", ()))
                failed = isinstance(outcome, Failure)
                self._advance(not failed, failed)

    def write(self, *, everything: bool = False) -> None:
        """Write to the journal: at once, or if a chunk is complete or a second has passed."""
        complete = [number for number, chunk in self._open.items() if not chunk.pending]
        if not (complete or everything or time.monotonic() > self._written + _PAUSE):
            return
        ready = [self._open[number] for number in complete]
        if self._by_chunk:
            for chunk in ready:
                # an interrupt before the journal leaves a chunk here whose file is already written
                held = [
                    x for x in chunk.outcomes if isinstance(x, ImageResult) and x.cam is not None
                ]
                others = [x for x in chunk.outcomes if isinstance(x, Failure) or x.cam is None]
                parts = write_part(held, self.folder, chunk.plan.part)
                chunk.outcomes = [*parts, *others]
        else:
            ready = list(self._open.values())
        recorded = [outcome for chunk in ready for outcome in chunk.outcomes]
        self._journal.record(recorded)
        for chunk in ready:
            chunk.outcomes = []
        for number in complete:
            del self._open[number]
        self._written = time.monotonic()
