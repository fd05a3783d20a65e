"""What is done of a bulk run, in one SQLite file and one folder that survive a kill."""

import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from camkit.atomic import unfinished
from camkit.bulk.finishing import CAMS, MASKS, ImageResult, OutFolder
from camkit.bulk.items import Item, Refused
from camkit.bulk.stages import chunks
from camkit.bulk.workers import Failure
from camkit.errors import CamkitError, DataError


def locked(out: OutFolder) -> sqlite3.Connection:
    """Take the place of a rank in a folder of results, until closed or until the process ends.

    Raises:
        CamkitError: another process has it, or nothing can be written there.
    """
    folder = out.root / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CamkitError(
            f"{out.root} cannot be written to ({error.strerror}); make room there, or rights, or "
            "take another folder"
        ) from error
    lock = sqlite3.connect(folder / f"rank-{out.rank}", timeout=0, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise CamkitError(
            f"another run works in {out.root}, or it cannot be written to ({error}); wait for it, "
            "or take another folder"
        ) from error
    return lock


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what an error of a database means for a run.

    Raises:
        CamkitError: instead of what SQLite raises.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise CamkitError(
            f"{path} cannot be used ({error}); what is done is kept: make room there, or rights, "
            "and start again"
        ) from error
    except sqlite3.DatabaseError as error:
        raise CamkitError(
            f"{path} is no journal of camkit ({error}); take another folder"
        ) from error


JOURNAL, MANIFEST, ERRORS, SETTINGS = (
    "journal.sqlite",
    "manifest.jsonl",
    "errors.tsv",
    "settings.json",
)
Stage: TypeAlias = Literal["list", "read", "model", "write"]
"""Where an image failed: in the source, while being read, in the model, or behind it."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS images (key TEXT PRIMARY KEY, row TEXT, stage TEXT, reason TEXT)"
    " WITHOUT ROWID",
)
_AT_ONCE = 500  # of the values that one SQL statement may hold


@dataclass(frozen=True)
class Error:
    """An image that nothing could be made of."""

    key: str
    stage: Stage
    reason: str


class Journal:
    """Which images are done, and what was made of them, by key.

    Several processes may write into one journal, on a disk that several machines share too. A
    second run of the same rank is refused while the first one lives.

    Args:
        folder: of the results.

    Raises:
        CamkitError: another process works there, or the file is no journal.
    """

    def __init__(self, folder: OutFolder) -> None:
        self._folder, root = folder, folder.root
        self._path = root / JOURNAL
        self._lock = locked(folder)
        shutil.rmtree(folder.drafts, ignore_errors=True)  # what a killed run began
        try:
            with explained(root / JOURNAL):
                self._file = sqlite3.connect(root / JOURNAL, timeout=60, isolation_level=None)
                # no write-ahead log: it needs memory that only processes of one machine share
                self._file.execute("PRAGMA journal_mode=DELETE")
                for table in _TABLES:
                    self._file.execute(table)
        except BaseException:
            self._lock.close()
            raise

    def claim(
        self, settings: Mapping[str, str], *, overwrite: bool = False, moved: bool = False
    ) -> None:
        """Make the folder that of these settings; results of others are kept apart.

        Args:
            settings: all that decides what the results look like.
            overwrite: remove what the journal knows of, and begin anew.
            moved: the same images are at another place now, so ``source`` may differ.

        Raises:
            DataError: the folder holds results of other settings, or of unknown ones.
        """
        with self._writing() as file:
            found = dict(file.execute("SELECT name, value FROM settings").fetchall())
            if overwrite and found:
                self._wipe()
            elif found:
                _check_same(found, settings, self._folder.root, moved=moved)
            else:
                _check_empty(self._folder.root)
            file.execute("DELETE FROM settings")
            file.executemany("INSERT INTO settings VALUES (?, ?)", sorted(settings.items()))
        with unfinished(self._folder.root / SETTINGS) as draft:
            text = json.dumps(dict(settings), indent=2, ensure_ascii=False)
            draft.write_text(text + "\n", encoding="utf-8")

    def known(self, keys: Sequence[str]) -> dict[str, Stage | None]:
        """Those of some images that are settled: None for done ones, else where they failed."""
        found: dict[str, Stage | None] = {}
        with explained(self._path):
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                asked = f"SELECT key, stage FROM images WHERE key IN ({marks})"
                found.update(self._file.execute(asked, some).fetchall())
        return found

    def record(self, made: Iterable[ImageResult], errors: Iterable[Error] = ()) -> None:
        """Note images as done or failed, all of them or none."""
        rows: list[tuple[Any, ...]] = [(one.key, _json(one.row), None, None) for one in made]
        rows += [(one.key, None, one.stage, one.reason) for one in errors]
        if rows:
            with self._writing() as file:
                file.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", rows)

    def forget_errors(self) -> int:
        """Let failed images be tried again; how many there were."""
        with self._writing() as file:
            return file.execute("DELETE FROM images WHERE row IS NULL").rowcount

    def counts(self) -> tuple[int, int]:
        """How many are done, and how many failed."""
        with explained(self._path):
            asked = "SELECT count(row), count(*) - count(row) FROM images"
            done, failed = self._file.execute(asked).fetchone()
        return done, failed

    def rows(self) -> Iterator[dict[str, Any]]:
        """The manifest: what was made of each image, by key."""
        asked = "SELECT row FROM images WHERE row IS NOT NULL ORDER BY key"
        with closing(self._file.execute(asked)) as found:
            for (row,) in found:
                yield json.loads(row)

    def errors(self) -> Iterator[Error]:
        """What failed, by key."""
        asked = "SELECT key, stage, reason FROM images WHERE row IS NULL ORDER BY key"
        with closing(self._file.execute(asked)) as found:
            for row in found:
                yield Error(*row)

    def export(self) -> None:
        """Write ``manifest.jsonl``, and ``errors.tsv`` where something failed.

        Processes that end at the same time take turns, so that the last one writes all there is.
        """
        root = self._folder.root
        with self._writing():
            with unfinished(root / MANIFEST) as draft, draft.open("w", encoding="utf-8") as file:
                file.writelines(_json(row) + "\n" for row in self.rows())
            if not self.counts()[1]:
                (root / ERRORS).unlink(missing_ok=True)
                return
            with unfinished(root / ERRORS) as draft, draft.open("w", encoding="utf-8") as file:
                file.write("name\tstage\treason\n")
                for one in self.errors():
                    file.write(f"{_cell(one.key)}\t{one.stage}\t{_cell(one.reason)}\n")

    def _wipe(self) -> None:
        root = self._folder.root
        for row in self.rows():
            for kind in ("mask", "cam"):
                if kind in row:
                    (root / row[kind]).unlink(missing_ok=True)
        self._file.execute("DELETE FROM images")
        for name in (MANIFEST, ERRORS):
            (root / name).unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with explained(self._path):
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
        shutil.rmtree(self._folder.drafts, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_same(
    found: Mapping[str, str], settings: Mapping[str, str], root: Path, *, moved: bool
) -> None:
    names = {**found, **settings}
    differ = [name for name in names if found.get(name) != settings.get(name)]
    differ = [name for name in differ if not (moved and name == "source")]
    if not differ:
        return
    told = "; ".join(f"{one}: {found.get(one)} there, {settings.get(one)} now" for one in differ)
    way_out = "take another folder, or begin anew with overwrite (--overwrite)"
    if differ == ["source"]:
        way_out = "if these are the same images at another place, say so by moved (--moved)"
    raise DataError(f"{root} holds results of other settings ({told}); {way_out}")


def _check_empty(root: Path) -> None:
    for name in (MASKS, CAMS):
        if (root / name).is_dir() and next((root / name).iterdir(), None) is not None:
            raise DataError(
                f"{root / name} holds files but {root} no journal, so how they were made is "
                "unknown; take another folder"
            )


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _cell(text: str) -> str:
    """Text without what a table is made of."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


FOLDER_SETTINGS = "settings.json"
FOLDER_ERRORS = "errors.tsv"


def claim_folder(
    folder: Path,
    settings: Mapping[str, str],
    names: Iterable[str],
    *,
    suffix: str,
    overwrite: bool = False,
) -> set[str]:
    """Make a folder ready for results, and find those that an earlier run left there.

    The settings are kept in ``settings.json``; a folder with results of other settings is refused,
    so that no folder ever holds results of two kinds.

    Args:
        folder: made if it is not there.
        settings: all that decides what the results look like.
        names: of the results that are wanted, without their ending.
        suffix: ending of a result file.
        overwrite: remove what is there of these results, and begin anew.

    Returns:
        The wanted names whose result is there already.

    Raises:
        DataError: the folder holds results of other settings, or of unknown ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.stem for path in folder.iterdir() if _is_result(path, suffix)}
    wanted = there & set(names)
    staying = there - wanted if overwrite else there
    if staying:
        way_out = (
            "they are of none of these images, so remove them or take another folder"
            if overwrite
            else "take another folder for these, or begin anew with overwrite (--overwrite)"
        )
        _check_settings(folder, settings, f"{len(staying)} {suffix} files", way_out)
    if overwrite:
        for name in wanted:
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        wanted = set()
    with unfinished(folder / FOLDER_SETTINGS) as draft:
        draft.write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
    return wanted


def write_errors(folder: Path, failures: Sequence[Failure]) -> None:
    """Write what failed as ``errors.tsv``, name and reason; without failures there is no file."""
    path = folder / FOLDER_ERRORS
    if not failures:
        path.unlink(missing_ok=True)
        return
    with unfinished(path) as draft:
        lines = [f"{one.name}\t{' '.join(one.reason.split())}\n" for one in failures]
        draft.write_text("name\treason\n" + "".join(sorted(lines)), encoding="utf-8")


def _is_result(path: Path, suffix: str) -> bool:
    return path.suffix == suffix and not path.name.startswith(".")


def _check_settings(folder: Path, settings: Mapping[str, str], held: str, way_out: str) -> None:
    path = folder / FOLDER_SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds {held} but no {FOLDER_SETTINGS}, so how they were made is unknown; "
            f"{way_out}"
        ) from error
    except ValueError as error:  # no JSON, or no text
        raise DataError(f"{path} cannot be read ({error}); {way_out}") from error
    if found != settings:
        known = found if isinstance(found, dict) else {}
        differ = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
        told = "; ".join(
            f"{one}: {known.get(one)} there, {settings.get(one)} now" for one in differ
        )
        raise DataError(f"{folder} holds {held} of other settings ({told}); {way_out}")


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
class ChunkPlan:
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


def plan(chunk: Iterable[Item | Refused], journal: Journal) -> ChunkPlan:
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
    return ChunkPlan(tuple(items) if todo else (), todo, tuple(errors), len(known))
