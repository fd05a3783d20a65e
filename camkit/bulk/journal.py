"""What is done of a bulk run, in one SQLite file that survives being killed at any moment."""

import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from camkit.atomic import unfinished
from camkit.bulk.finishing import CAMS, MASKS, Made, OutFolder
from camkit.bulk.locking import explained, locked
from camkit.errors import DataError

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

    def record(self, made: Iterable[Made], errors: Iterable[Error] = ()) -> None:
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
