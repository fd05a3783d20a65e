"""A cache of measurements on disk, so that an interrupted benchmark continues."""

import hashlib
import sqlite3
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from camkit.errors import CamkitError

_MOST_UNPACKED = 1 << 30  # bytes of the counts of one image
_PLAIN = (str, bytes, int, float, bool, type(None))


def fingerprint(value: Any) -> str | None:
    """Return a hash that is the same for equal settings in every process.

    Dataclasses are hashed by name and fields, tensors by their bytes. Functions and other objects
    may change unnoticed, so settings that contain one get None.
    """
    digest = hashlib.sha256()
    return digest.hexdigest() if _feed(digest, value) else None


def _feed(digest: Any, value: Any) -> bool:
    digest.update(f"({type(value).__module__}.{type(value).__qualname__} ".encode())
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{flat.dtype} {tuple(flat.shape)} ".encode())
        digest.update(flat.flatten().view(torch.uint8).numpy().tobytes())
        return True
    if isinstance(value, _PLAIN):
        digest.update(repr(value).encode())
        return True
    if isinstance(value, tuple | list):
        digest.update(f"{len(value)} ".encode())
        return all(_feed(digest, item) for item in value)
    if isinstance(value, Mapping):
        return _feed(digest, sorted(value.items()))
    if is_dataclass(value) and not isinstance(value, type):
        parts = tuple((field.name, getattr(value, field.name)) for field in fields(value))
        return _feed(digest, parts)
    return False


_IRRELEVANT = (  # to the measurements; a change here keeps the cache valid
    *("bulk", "cli", "compat", "losses", "bench/examples.py", "bench/figures.py"),
    *("bench/markup.py", "bench/oracles.py", "bench/page.py", "bench/quality.py"),
    "bench/results.py",
)
_SOURCES = (".py", ".cpp", ".hpp", ".cu", ".cuh")


@cache
def code_fingerprint() -> str:
    """Return a hash of the code that makes maps and counts pixels."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package).as_posix()
        if path.suffix in _SOURCES and not name.startswith(_IRRELEVANT):
            digest.update(name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class ResultCache:
    """Bytes by key in one SQLite file, safe against being killed and against concurrent runs.

    Raises:
        CamkitError: the file exists, but is no cache.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise CamkitError(
                f"{path} cannot be opened as a cache ({error}); name a file"
            ) from error
        try:
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB)")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise CamkitError(
                f"{path} is no cache of measurements ({error}); delete it or name another file"
            ) from error

    def get(self, key: str) -> bytes | None:
        with closing(self._file.execute("SELECT value FROM kept WHERE key = ?", (key,))) as rows:
            row = rows.fetchone()
        return None if row is None else row[0]

    def put(self, key: str, value: bytes) -> None:
        self._file.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (key, value))

    def get_counts(self, key: str, values: int) -> Int[Tensor, "s v v"] | None:
        """Return confusion matrices of this many mask values, if they are cached."""
        value = self.get(key)
        if value is None:
            return None
        try:
            unpacked = zlib.decompressobj().decompress(value, _MOST_UNPACKED)
            counts = np.frombuffer(unpacked, dtype=np.int64).reshape(-1, values, values)
        except (zlib.error, ValueError, TypeError) as error:
            raise CamkitError(
                f"{self._path} holds a damaged measurement ({error}); delete it to measure anew"
            ) from error
        return torch.from_numpy(counts.copy())

    def put_counts(self, key: str, counts: Int[Tensor, "..."]) -> None:
        self.put(key, zlib.compress(counts.numpy().tobytes(), 1))

    def __enter__(self) -> "ResultCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
