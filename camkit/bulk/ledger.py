"""Resumable results folders: a SQLite journal that survives kills, and the chunks in work.

Both engines of bulk runs and the commands for CAM files use the journal.
"""

import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from camkit.bulk.items import Failure, Item
from camkit.bulk.recipe import Job
from camkit.bulk.stages import ImageResult, Lesson, OutFolder, OutputError, write_part
from camkit.errors import CamkitError, DataError
from camkit.manifest import unfinished

JOURNAL, SETTINGS = "journal.sqlite", "settings.json"
MANIFEST, ERRORS = "manifest.jsonl", "errors.tsv"
READOUT = "readout.safetensors"
_IMAGES: Mapping[Job, str] = {"maps": "images", "fit": "fitted_images"}
_TABLES = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    *(
        f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, row TEXT, stage TEXT, "
        "reason TEXT) WITHOUT ROWID"
        for table in _IMAGES.values()
    ),
    "CREATE TABLE IF NOT EXISTS sums (rank INTEGER PRIMARY KEY, file TEXT NOT NULL)",
)
_VALUES = 500  # at most in one SQL statement
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_PAUSE = 1.0  # seconds between two writes to the journal


class Journal:
    """Which images of a results folder are done or failed in each pass, by key.

    Several processes may write to one journal, also on a disk that several machines share.

    Args:
        folder: of the results.
        results: patterns of result files, which must not exist before the journal does.
        exclusive: refuse to open the folder while another process of the same rank has it open.

    Raises:
        CamkitError: another process has the folder open, or it cannot be written to, or the file
            is not a journal.
        DataError: the folder holds results but no journal.
    """

    def __init__(
        self,
        folder: OutFolder,
        *,
        results: tuple[str, ...] = ("masks/*", "cams/*"),
        exclusive: bool = True,
    ) -> None:
        self.folder, root = folder, folder.root
        self._path = root / JOURNAL
        lock: sqlite3.Connection | None = None
        with ExitStack() as on_error:
            try:
                root.mkdir(parents=True, exist_ok=True)
                if exclusive:
                    lock = on_error.enter_context(closing(_lock(folder)))
                    shutil.rmtree(folder.drafts, ignore_errors=True)  # left by a killed run
            except OSError as error:
                raise OutputError.explain(root, error) from error
            paths = (path for pattern in results for path in root.glob(pattern))
            unknown = next((path for path in paths if path.name[0] != "."), None)
            if unknown is not None and not self._path.exists():
                raise DataError(
                    f"{root} holds {unknown.relative_to(root)} but no {JOURNAL}, so the settings "
                    "of its results are unknown; choose another folder"
                )
            with _explained(self._path):
                self._file = sqlite3.connect(self._path, timeout=60, isolation_level=None)
                # no write-ahead log: its memory is shared by processes of one machine only
                self._file.execute("PRAGMA journal_mode=DELETE")
                for table in _TABLES:
                    self._file.execute(table)
            on_error.pop_all()
        self._lock = lock
        self._settings: dict[str, str] = {}

    def claim(
        self,
        settings: Mapping[str, str],
        *,
        overwrite: bool = False,
        moved: bool = False,
        way_out: str = "choose another folder, or replace its results (--overwrite)",
    ) -> None:
        """Store the settings of the folder; results of other settings are a DataError.

        Args:
            settings: everything that determines the results.
            overwrite: remove the results that the journal lists, and start again.
            moved: ``source`` may differ: the same images are now at another place.
            way_out: what the error proposes.
        """
        root = self.folder.root
        with self._transaction() as file:
            known = dict(file.execute("SELECT name, value FROM settings").fetchall())
            if "fit" in settings and "readout" in known and not overwrite:
                settings = {**settings, "readout": known["readout"]}  # what the fit has recorded
            names = [name for name in {**known, **settings} if not (moved and name == "source")]
            differ = [name for name in names if known.get(name) != settings.get(name)]
            if overwrite:
                self._forget_results(file, [READOUT] if "readout" in known else [])
            elif known and differ:
                if differ == ["source"]:
                    way_out = "if these are the same images at another place, say so (--moved)"
                changes = "; ".join(
                    f"{name}: {known.get(name)} there, {settings.get(name)} now" for name in differ
                )
                raise DataError(f"{root} holds results of other settings ({changes}); {way_out}")
            file.execute("DELETE FROM settings")
            file.executemany("INSERT INTO settings VALUES (?, ?)", sorted(settings.items()))
        self._settings = dict(settings)
        self._write_settings()

    def _forget_results(self, file: sqlite3.Connection, others: Sequence[str]) -> None:
        """Delete the results that the journal lists, and the other files named."""
        root = self.folder.root
        for row in map(json.loads, self.lines()):
            for kind in ("mask", "cam"):
                if kind in row:
                    (root / row[kind]).unlink(missing_ok=True)
        for table in (*_IMAGES.values(), "sums"):
            file.execute(f"DELETE FROM {table}")
        for name in (MANIFEST, ERRORS, *others):
            (root / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder.sums, ignore_errors=True)

    def _write_settings(self) -> None:
        with unfinished(self.folder.root / SETTINGS) as draft:
            text = json.dumps(self._settings, indent=2, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")

    def known(self, keys: Sequence[str], job: Job = "maps") -> dict[str, str | None]:
        """Return the settled keys among ``keys``: None if done, else the stage that failed."""
        stages: dict[str, str | None] = {}
        with _explained(self._path):
            for start in range(0, len(keys), _VALUES):
                part = keys[start : start + _VALUES]
                marks = ", ".join("?" * len(part))
                query = f"SELECT key, stage FROM {_IMAGES[job]} WHERE key IN ({marks})"
                stages.update(self._file.execute(query, part).fetchall())
        return stages

    def record(
        self,
        outcomes: Iterable[ImageResult | Failure],
        job: Job = "maps",
        *,
        sums: str | None = None,
    ) -> None:
        """Record images as done or failed, in one transaction.

        Args:
            outcomes: of the images.
            job: the pass that they are of.
            sums: file below `OutFolder.sums` that contains what this rank has summed up, these
                images included; it replaces the one before.
        """
        rows = [
            (outcome.key, None, outcome.stage, outcome.reason)
            if isinstance(outcome, Failure)
            else (outcome.key, json.dumps(outcome.row, ensure_ascii=False), None, None)
            for outcome in outcomes
        ]
        if rows:
            with self._transaction() as file:
                table = _IMAGES[job]
                file.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", rows)
                if sums is not None:
                    rank = self.folder.rank
                    file.execute("INSERT OR REPLACE INTO sums VALUES (?, ?)", (rank, sums))

    def sums(self) -> dict[int, Path]:
        """Return the file with the sums of each rank, until the read-out is recorded."""
        with _explained(self._path):
            rows = self._file.execute("SELECT rank, file FROM sums ORDER BY rank").fetchall()
        return {rank: self.folder.sums / name for rank, name in rows}

    def record_readout(self, digest: str) -> None:
        """Record that `READOUT` is in the folder and contains all sums; the fit is over."""
        with self._transaction() as file:
            file.execute("INSERT OR REPLACE INTO settings VALUES ('readout', ?)", (digest,))
            file.execute("DELETE FROM sums")
            self._settings["readout"] = digest
            self._write_settings()

    @property
    def readout(self) -> str | None:
        """Digest of the read-out that all maps are read by; None until the fit is over."""
        with _explained(self._path):
            query = "SELECT value FROM settings WHERE name = 'readout'"
            row = self._file.execute(query).fetchone()
        return None if row is None else str(row[0])

    def forget_failures(self) -> int:
        """Delete the failures, so that a run tries these images again; return their number.

        Failures of a fit that is over stay: its read-out does not change any more.
        """
        jobs: tuple[Job, ...] = ("maps",) if self.readout is not None else ("maps", "fit")
        with self._transaction() as file:
            deleted = [
                file.execute(f"DELETE FROM {_IMAGES[job]} WHERE row IS NULL").rowcount
                for job in jobs
            ]
        return sum(deleted)

    def counts(self, job: Job = "maps") -> tuple[int, int]:
        """Return how many images are done, and how many failed."""
        with _explained(self._path):
            query = f"SELECT count(row), count(*) - count(row) FROM {_IMAGES[job]}"
            done, failed = self._file.execute(query).fetchone()
        return done, failed

    def lines(self) -> Iterator[str]:
        """Yield the lines of the manifest, JSON, sorted by key."""
        query = "SELECT row FROM images WHERE row IS NOT NULL ORDER BY key"
        return (row for (row,) in self._file.execute(query))

    def failures(self) -> Iterator[Failure]:
        """Yield the failures of both passes, sorted by key; those of the fit have "fit: STAGE"."""
        query = (
            "SELECT key, 'fit: ' || stage AS stage, reason FROM fitted_images WHERE row IS NULL "
            "UNION ALL SELECT key, stage, reason FROM images WHERE row IS NULL ORDER BY key, stage"
        )
        return (Failure(*row) for row in self._file.execute(query))

    def export(self, *, manifest: bool = True) -> None:
        """Write ``manifest.jsonl``, and ``errors.tsv`` if there are failures.

        Processes that finish together take turns, so that the last one writes everything.
        """
        root = self.folder.root
        with self._transaction():
            if manifest:
                path = root / MANIFEST
                with unfinished(path) as draft, draft.open("w", encoding="utf-8") as file:
                    file.writelines(line + "\n" for line in self.lines())
            if not self.counts()[1] + self.counts("fit")[1]:
                (root / ERRORS).unlink(missing_ok=True)
                return
            with unfinished(root / ERRORS) as draft, draft.open("w", encoding="utf-8") as file:
                file.write("name\tstage\treason\n")
                for failure in self.failures():
                    cells = (failure.key, failure.stage, failure.reason)
                    file.write("\t".join(cell.translate(_ESCAPES) for cell in cells) + "\n")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _explained(self._path):
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield self._file
                self._file.execute("COMMIT")
            except BaseException:
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                raise

    def close(self) -> None:
        self._file.close()
        if self._lock is not None:
            shutil.rmtree(self.folder.drafts, ignore_errors=True)
            self._lock.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(folder: OutFolder) -> sqlite3.Connection:
    """Lock a folder for one process of a rank, until the lock is closed or the process ends."""
    locks = folder.root / ".locks"
    locks.mkdir(exist_ok=True)
    path = locks / f"rank-{folder.rank}"
    with _explained(path):
        lock = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise CamkitError(
            f"another run works in {folder.root}, or it cannot be written to ({error}); wait for "
            "it, or choose another folder"
        ) from error
    return lock


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into a ``CamkitError`` that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise CamkitError(
            f"{path} cannot be used ({error}); free disk space or check write permission there, "
            "then run the command again: finished images are kept"
        ) from error
    except sqlite3.DatabaseError as error:
        raise CamkitError(
            f"{path} is not a journal of camkit ({error}); choose another folder"
        ) from error


@dataclass(frozen=True)
class ChunkPlan:
    """A chunk: the images that still need results, and those that keep its batches identical.

    Attributes:
        items: images to read. Finished ones are among them, so that the same images go through
            the model together and the bytes of the results stay the same.
        todo: keys of the images that need results.
        failures: entries of the source that are not images.
        settled: number of images that earlier runs finished or gave up.
    """

    items: tuple[Item, ...]
    todo: frozenset[str]
    failures: tuple[Failure, ...] = ()
    settled: int = 0

    @property
    def part(self) -> str:
        """Name of the chunk's Parquet file, which depends on ``todo`` alone."""
        return sha256("\n".join(sorted(self.todo)).encode()).hexdigest()[:24]


def plan(chunk: Iterable[Item | Failure], journal: Journal, job: Job = "maps") -> ChunkPlan:
    """Plan a chunk from what the journal knows."""
    entries = {entry.key: entry for entry in chunk}
    known = journal.known(list(entries), job)
    failures = [
        entry for key, entry in entries.items() if isinstance(entry, Failure) and key not in known
    ]
    items = [  # an image that could not be read was in no batch
        entry
        for key, entry in entries.items()
        if isinstance(entry, Item) and known.get(key) not in ("list", "read")
    ]
    todo = frozenset(item.key for item in items if item.key not in known)
    return ChunkPlan(tuple(items) if todo else (), todo, tuple(failures), len(known))


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
        self._open[self._begun] = _OpenChunk(planned, set(planned.todo), list(planned.failures))
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
