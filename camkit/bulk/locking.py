"""SQLite as a lock that no killed process leaves behind, and its errors in plain words."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from camkit.bulk.finishing import OutFolder
from camkit.errors import CamkitError


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
