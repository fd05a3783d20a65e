"""The journal of a results folder: what is done or failed, in SQLite, whole after any kill.

Both engines of bulk runs and the commands for CAM files use it.
"""

import json
import re
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from heapq import merge
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from camkit.bulk.items import Failure
from camkit.bulk.recipe import Job
from camkit.bulk.stages import ImageResult, OutFolder, OutputError, stamp_of
from camkit.errors import CamkitError, DataError, one_line
from camkit.manifest import unfinished
from camkit.untrusted import read_json

JOURNAL, SETTINGS = "journal.sqlite", "settings.json"
MANIFEST, ERRORS = "manifest.jsonl", "errors.tsv"
READOUT = "readout.safetensors"
_IMAGES: Mapping[Job, str] = {"maps": "images", "fit": "fitted_images"}
_COLUMNS = {
    "settings": ("name", "value"),
    **dict.fromkeys(_IMAGES.values(), ("key", "row", "stage", "reason", "origin", "stamps")),
    "sums": ("rank", "file"),
}
_TABLES = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    *(
        f"CREATE TABLE IF NOT EXISTS {table} (key TEXT PRIMARY KEY, row TEXT, stage TEXT, "
        "reason TEXT, origin INTEGER, stamps TEXT) WITHOUT ROWID"
        for table in _IMAGES.values()
    ),
    "CREATE TABLE IF NOT EXISTS sums (rank INTEGER PRIMARY KEY, file TEXT NOT NULL)",
)
_INDICES = tuple(
    f"CREATE INDEX IF NOT EXISTS failed_{table} ON {table} (key) WHERE row IS NULL"
    for table in _IMAGES.values()
)
_ADDED = {"origin": "INTEGER", "stamps": "TEXT"}  # columns that older journals lack
_VALUES = 500  # at most in one SQL statement
_PAGE = 2000  # rows that are read at once: a longer look would keep other processes from writing
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_EXPORT = "export"  # the lock of whoever writes manifest and errors
_SUMS = re.compile(r"[0-9]+-[0-9a-f]+\.safetensors")
_TURN = 3600.0  # seconds that a process waits for others to write the manifest
_NO_ROOM = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY),
    *(sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
)


class Known(NamedTuple):
    """What the journal knows of a key: the stage that failed, or None; and which image it is."""

    stage: str | None
    origin: int | None


class Awaited(NamedTuple):
    """An image that a process is going to record: a number of its origin, its place, its origin."""

    number: int
    place: str
    origin: str


class _Row(NamedTuple):
    """A row of a table of images: done if it has a line of the manifest, else failed."""

    key: str
    line: str | None
    stage: str | None
    reason: str | None
    origin: int | None = None
    stamps: str | None = None


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
        root = folder.root
        self._path = root / JOURNAL
        lock: sqlite3.Connection | None = None
        with ExitStack() as on_error:
            try:
                root.mkdir(parents=True, exist_ok=True)
                if exclusive:
                    lock = on_error.enter_context(closing(_lock(folder, f"rank-{folder.rank}")))
                    _remove_leftovers(folder)
                    folder = replace(folder, folds=_folds(root))
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
                on_error.callback(self._file.close)
                _open_tables(self._file, self._path)
            on_error.pop_all()
        self.folder, self._lock = folder, lock
        self._settings: dict[str, str] = {}
        self._awaited: dict[Job, dict[str, Awaited]] = {"maps": {}, "fit": {}}
        self._readers: ThreadPoolExecutor | None = None

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
                    _change(name, known.get(name), settings.get(name)) for name in differ
                )
                raise DataError(f"{root} holds results of other settings ({changes}); {way_out}")
            elif moved and known.get("source") != settings.get("source"):
                for table in _IMAGES.values():  # origins may contain the former place
                    file.execute(f"UPDATE {table} SET origin = NULL")
            file.execute("DELETE FROM settings")
            file.executemany("INSERT INTO settings VALUES (?, ?)", sorted(settings.items()))
        self._settings = dict(settings)
        self._write_settings()

    def _forget_results(self, file: sqlite3.Connection, others: Sequence[str]) -> None:
        """Delete the results that the journal lists, and the other files named."""
        root = self.folder.root
        for line in self.lines():
            for path in self._files(line):
                path.unlink(missing_ok=True)
        for table in (*_IMAGES.values(), "sums"):
            file.execute(f"DELETE FROM {table}")
        for name in (MANIFEST, ERRORS, *others):
            (root / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder.sums, ignore_errors=True)

    def _files(self, line: str | None) -> list[Path]:
        """Return the files that a line of the manifest names; none may lie outside the folder."""
        if line is None:
            return []
        row = read_json(line, self._path)
        names = [row[kind] for kind in ("mask", "cam") if kind in row]
        return [_result_in(self.folder.root, name) for name in names]

    def _write_settings(self) -> None:
        with unfinished(self.folder.root / SETTINGS) as draft:
            text = json.dumps(self._settings, indent=2, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")

    def known(self, keys: Sequence[str], job: Job = "maps") -> dict[str, str | None]:
        """Return the settled keys among ``keys``: None if done, else the stage that failed."""
        return {row.key: row.stage for row in self._rows(keys, job, "key, NULL, stage, NULL")}

    def origins(self, keys: Sequence[str], job: Job = "maps") -> dict[str, Known]:
        """Return what is known of ``keys`` that are settled, or in work by this process."""
        awaited = self._awaited[job]
        known = {key: Known("awaited", awaited[key].number) for key in keys if key in awaited}
        rows = self._rows(keys, job, "key, NULL, stage, NULL, origin")
        return known | {row.key: Known(row.stage, row.origin) for row in rows}

    def place_of(self, key: str, job: Job) -> str:
        """Return where an image is that is settled or in work, for an error."""
        if key in self._awaited[job]:
            return self._awaited[job][key].place
        row = next(iter(self._rows([key], job)), None)
        return "another image" if row is None else _source(row.line)

    def _rows(
        self,
        keys: Sequence[str],
        job: Job,
        columns: str = "key, row, stage, reason, origin, stamps",
    ) -> list[_Row]:
        rows: list[_Row] = []
        with _explained(self._path):
            for start in range(0, len(keys), _VALUES):
                part = keys[start : start + _VALUES]
                marks = ", ".join("?" * len(part))
                query = f"SELECT {columns} FROM {_IMAGES[job]} WHERE key IN ({marks})"
                rows += [_Row(*row) for row in self._file.execute(query, part)]
        return rows

    def await_images(self, images: Mapping[str, Awaited], job: Job) -> None:
        """Note the images that this process is going to record."""
        self._awaited[job].update(images)

    def adopt(self, origins: Mapping[str, int], job: Job) -> None:
        """Note which images the rows are of that an older camkit wrote, or that were moved."""
        if origins:
            with self._transaction() as file:
                query = f"UPDATE {_IMAGES[job]} SET origin = ? WHERE key = ?"
                file.executemany(query, [(origin, key) for key, origin in origins.items()])

    def record(
        self,
        outcomes: Iterable[ImageResult | Failure],
        job: Job = "maps",
        *,
        sums: str | None = None,
    ) -> None:
        """Record images as done or failed, in one transaction.

        An image whose key another image has fails, and so does the other one: their files would
        replace each other.

        Args:
            outcomes: of the images.
            job: the pass that they are of.
            sums: file below `OutFolder.sums` that contains what this rank has summed up, these
                images included; it replaces the one before.
        """
        outcomes = list(outcomes)
        if not outcomes:
            return
        unused: list[Path] = []
        with self._transaction() as file:
            table = _IMAGES[job]
            before = {row.key: row for row in self._rows([x.key for x in outcomes], job)}
            for outcome in outcomes:
                held = self._awaited[job].pop(outcome.key, None)
                for row in self._settle(_row_of(outcome, held), held, before, unused):
                    before[row.key] = row
            query = f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?, ?, ?)"
            file.executemany(query, before.values())
            if sums is not None:
                rank = self.folder.rank
                file.execute("INSERT OR REPLACE INTO sums VALUES (?, ?)", (rank, sums))
        for path in unused:
            path.unlink(missing_ok=True)

    def _settle(
        self,
        row: _Row,
        held: Awaited | None,
        rows: Mapping[str, _Row],
        unused: list[Path],
    ) -> list[_Row]:
        """Return the rows that an outcome changes; append the files that nothing needs any more."""
        before = rows.get(row.key)
        if before is None:
            return [row]
        origin = row.origin if before.origin is None else before.origin
        if row.stage == "key":
            unused += self._own_files(before)
            return [row._replace(origin=origin)]
        if before.stage == "key":
            unused += self._own_files(row)
            return []
        if held is None or before.origin in (None, held.number):
            return [row._replace(origin=origin)]
        # another process has recorded another image under this key meanwhile
        unused += [*self._own_files(before), *self._own_files(row)]
        reason = twice(row.key, _source(before.line), held.place)
        return [
            _Row(row.key, None, "key", reason, before.origin),
            _Row(name_of_second(row.key, held.origin), None, "key", reason, held.number),
        ]

    def _own_files(self, row: _Row) -> list[Path]:
        """Return the files of an image alone; a Parquet file holds others as well."""
        return [path for path in self._files(row.line) if path.suffix != ".parquet"]

    def forget_damaged(self, keys: Sequence[str]) -> set[str]:
        """Forget the finished images whose files are missing or not as they were written.

        Returns:
            Their keys; a run does these images again.
        """
        if self._readers is None:
            self._readers = ThreadPoolExecutor(8)
        stamps: dict[Path, set[str]] = {}
        users: dict[Path, list[str]] = {}
        for row in self._rows(keys, "maps"):
            files = self._files(row.line)
            parts = (row.stamps or "").split() or [""] * len(files)
            for path, stamp in zip(files, parts, strict=False):
                stamps.setdefault(path, set()).add(stamp)
                users.setdefault(path, []).append(row.key)
        whole = self._readers.map(_is_whole, stamps, stamps.values())
        bad = {
            key for path, good in zip(stamps, whole, strict=True) if not good for key in users[path]
        }
        if bad:
            with self._transaction() as file:
                file.executemany("DELETE FROM images WHERE key = ?", [(key,) for key in bad])
        return bad

    def sums(self) -> dict[int, Path]:
        """Return the file with the sums of each rank, until the read-out is recorded."""
        with _explained(self._path):
            rows = self._file.execute("SELECT rank, file FROM sums ORDER BY rank").fetchall()
        for _, name in rows:
            if not _SUMS.fullmatch(str(name)):
                raise DataError(
                    f"{self._path} names {one_line(name)} as sums; start again elsewhere"
                )
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
            table = _IMAGES[job]
            query = (
                f"SELECT (SELECT count(*) FROM {table} WHERE row IS NULL), count(*) FROM {table}"
            )
            failed, both = self._file.execute(query).fetchone()
        return both - failed, failed

    def lines(self) -> Iterator[str]:
        """Yield the lines of the manifest, JSON, sorted by key."""
        query = "SELECT key, row FROM images WHERE row IS NOT NULL AND key > ? ORDER BY key LIMIT ?"
        for key, line in self._pages(query):
            if not isinstance(line, str) or line[:1] != "{" or "\n" in line:
                raise DataError(
                    f"{self._path} has a damaged row, {one_line(repr(key))}; choose another folder"
                )
            yield line

    def failures(self) -> Iterator[Failure]:
        """Yield the failures of both passes, sorted by key; those of the fit have "fit: STAGE"."""
        stages: dict[Job, str] = {"fit": "'fit: ' || stage", "maps": "stage"}
        parts = [
            self._pages(
                f"SELECT key, {stage}, reason FROM {_IMAGES[job]} WHERE row IS NULL AND key > ? "
                "ORDER BY key LIMIT ?"
            )
            for job, stage in stages.items()
        ]
        return (Failure(*map(str, row)) for row in merge(*parts))

    def _pages(self, query: str) -> Iterator[Any]:
        """Yield rows sorted by key, of which few are read at once, so that others can write."""
        key, size = "", 0
        while not size or size == _PAGE:
            with _explained(self._path):
                rows = self._file.execute(query, (key, _PAGE)).fetchall()
            yield from rows
            size, key = len(rows), rows[-1][0] if rows else ""
            if not rows:
                return

    def export(self, *, manifest: bool = True) -> None:
        """Write ``manifest.jsonl``, and ``errors.tsv`` if there are failures.

        Processes that finish together take turns, so that the last one writes everything; they
        can write to the journal meanwhile.
        """
        root = self.folder.root
        with self._turn():
            if manifest:
                with (
                    unfinished(root / MANIFEST) as draft,
                    draft.open("w", encoding="utf-8") as file,
                ):
                    file.writelines(line + "\n" for line in self.lines())
            failures = self.failures()
            first = next(failures, None)
            if first is None:
                (root / ERRORS).unlink(missing_ok=True)
                return
            with unfinished(root / ERRORS) as draft, draft.open("w", encoding="utf-8") as file:
                file.write("name\tstage\treason\n")
                for failure in chain([first], failures):
                    cells = (failure.key, failure.stage, failure.reason)
                    file.write("\t".join(cell.translate(_ESCAPES) for cell in cells) + "\n")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other process writes the tables."""
        if self._lock is None:
            with self._transaction():
                yield
            return
        with closing(_lock(self.folder, _EXPORT, wait=_TURN)):
            yield

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
        if self._readers is not None:
            self._readers.shutdown()
        self._file.close()
        if self._lock is not None:
            shutil.rmtree(self.folder.drafts, ignore_errors=True)
            self._lock.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def twice(key: str, first: str, second: str) -> str:
    """Return the reason why two images of one key fail."""
    return (
        f"two images have the name {key}: {first} and {second}; rename one, or use another folder "
        "for its results (--out)"
    )


def name_of_second(key: str, origin: str) -> str:
    """Return the name of the failure of an image whose key another one has; no key contains //."""
    return f"{key}//{origin}"


def _row_of(outcome: ImageResult | Failure, held: Awaited | None) -> _Row:
    origin = None if held is None else held.number
    if isinstance(outcome, Failure):
        return _Row(outcome.key, None, outcome.stage, outcome.reason, origin)
    line = json.dumps(outcome.row, ensure_ascii=False)
    return _Row(outcome.key, line, None, None, origin, " ".join(outcome.stamps) or None)


def _source(line: str | None) -> str:
    """Return the place that a line of the manifest names."""
    row = None if line is None else read_json(line, "the journal")
    return str(row.get("source")) if isinstance(row, dict) else "another image"


def _result_in(root: Path, name: object) -> Path:
    """Return the path of a result; the journal may come from anywhere."""
    if isinstance(name, str) and "\0" not in name:
        path = PurePosixPath(name)
        named = len(path.parts) > 1 and path.parts[0] in ("masks", "cams")
        if (
            named
            and ".." not in path.parts
            and (root / path).parent.resolve().is_relative_to(root.resolve())
        ):
            return root / path
    raise DataError(
        f"{root / JOURNAL} names {one_line(repr(name), most=100)}, which is no result in this "
        "folder; choose another folder"
    )


def _is_whole(path: Path, stamps: Collection[str]) -> bool:
    """Return whether a file is as it was written; without a stamp, whether it is not empty."""
    try:
        return {stamp_of(path)} == set(stamps) if stamps != {""} else path.stat().st_size > 0
    except OSError:
        return False


def _remove_leftovers(folder: OutFolder) -> None:
    """Remove the drafts of processes that were killed."""
    root = folder.root
    shutil.rmtree(folder.drafts, ignore_errors=True)
    for drafts in folder.drafts.parent.glob("rank-*"):
        with suppress(CamkitError), closing(_lock(folder, drafts.name)):
            shutil.rmtree(drafts, ignore_errors=True)
    with suppress(CamkitError), closing(_lock(folder, _EXPORT)):
        names = (MANIFEST, ERRORS, *((SETTINGS, READOUT) if folder.rank == 0 else ()))
        for path in (path for name in names for path in root.glob(f".{name}.*.part")):
            path.unlink(missing_ok=True)


def _folds(root: Path) -> bool:
    """Return whether the file system takes names for equal that differ in case or Unicode form."""
    name = "K\u00e9y"
    (root / ".locks" / name).touch()
    others = ("k\u00e9Y", "Ke\u0301y")
    return any((root / ".locks" / other).exists() for other in others)


def _lock(folder: OutFolder, name: str, *, wait: float = 0) -> sqlite3.Connection:
    """Lock a part of a folder until the lock is closed or the process ends."""
    locks = folder.root / ".locks"
    locks.mkdir(exist_ok=True)
    with ExitStack() as on_error, _explained(locks / name, "lock"):
        lock = sqlite3.connect(locks / name, timeout=wait, isolation_level=None)
        on_error.callback(lock.close)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise CamkitError(
                f"another run works in {folder.root}, or it cannot be written to ({error}); wait "
                "for it, or choose another folder"
            ) from error
        on_error.pop_all()
    return lock


def _open_tables(file: sqlite3.Connection, path: Path) -> None:
    """Create the tables; refuse a file in which they are not those of a journal."""
    # no write-ahead log: its memory is shared by processes of one machine only
    file.execute("PRAGMA journal_mode=DELETE")
    file.execute("PRAGMA trusted_schema=OFF")
    for table in _TABLES:
        file.execute(table)
    kinds = dict(file.execute("SELECT name, type FROM sqlite_master").fetchall())
    for table, columns in _COLUMNS.items():
        present = {row[1] for row in file.execute(f"PRAGMA table_info({table})")}
        for column in set(columns) - present if table in _IMAGES.values() else ():
            if column in _ADDED:
                file.execute(f"ALTER TABLE {table} ADD COLUMN {column} {_ADDED[column]}")
                present.add(column)
        if kinds[table] != "table" or present != set(columns) or "trigger" in kinds.values():
            raise DataError(f"{path} is not a journal of camkit ({table}); choose another folder")
    for index in _INDICES:
        file.execute(index)


@contextmanager
def _explained(path: Path, kind: str = "journal") -> Iterator[None]:
    """Turn errors of SQLite into a ``CamkitError`` that says what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in _NO_ROOM:
            raise CamkitError(
                f"{path} cannot be used ({error}); free disk space or check write permission "
                "there, then run the command again: finished images are kept"
            ) from error
        raise CamkitError(
            f"{path} is not a {kind} of camkit ({one_line(error)}); choose another folder"
        ) from error


_HASH = re.compile(r"[0-9a-f]{16,}")


def _change(name: str, *values: str | None) -> str:
    """Say how a setting of a folder differs from now; two hashes only tell that it does."""
    there, now = (
        "None" if value is None else "others" if _HASH.fullmatch(value) else value
        for value in values
    )
    name = name.removesuffix("_sha256")
    return f"{name}: others now" if there == now else f"{name}: {there} there, {now} now"
