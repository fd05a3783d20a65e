"""Measured images kept on disk, so that an interrupted benchmark goes on."""

import hashlib
import sqlite3
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from camkit.errors import CamkitError

_PLAIN = (str, bytes, int, float, bool, type(None))


def fingerprint(value: Any) -> str | None:
    """A hash of settings: equal for equal ones, in any process.

    Dataclasses are told by their name and fields, tensors by their bytes. Other objects and
    functions cannot be told from changed ones: their settings have no fingerprint, None.
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


_COUNTING = (
    *("ops", "native", "capture", "edit", "seed", "refine", "data", "*.py", "bench/maps.py"),
    *("bench/meter.py", "score/sweep.py", "score/boundary.py", "score/confusion.py"),
)


@cache
def code_fingerprint() -> str:
    """A hash of the source that makes maps and counts pixels: other code may measure otherwise."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for pattern in _COUNTING:
        for path in sorted(folder.glob(pattern)):
            files = [path] if path.is_file() else sorted(path.rglob("*.*"))
            for file in files:
                if file.suffix in (".py", ".cpp", ".hpp", ".cu", ".cuh"):
                    digest.update(file.relative_to(folder).as_posix().encode())
                    digest.update(file.read_bytes())
    return digest.hexdigest()


class ResultCache:
    """Bytes by key, in one file, safe against being killed and against a second run beside it.

    Raises:
        CamkitError: the file is there, but is no store.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value BLOB)")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise CamkitError(
                f"{path} is no store of measured images ({error}); delete it or name another file"
            ) from error

    def get(self, key: str) -> bytes | None:
        with closing(self._file.execute("SELECT value FROM kept WHERE key = ?", (key,))) as found:
            row = found.fetchone()
        return None if row is None else row[0]

    def put(self, key: str, value: bytes) -> None:
        self._file.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (key, value))

    def get_counts(self, key: str, values: int) -> Int[Tensor, "s v v"] | None:
        """Confusion matrices of so many mask values, if they are kept."""
        kept = self.get(key)
        if kept is None:
            return None
        counts = np.frombuffer(zlib.decompress(kept), dtype=np.int64)
        return torch.from_numpy(counts.reshape(-1, values, values).copy())

    def put_counts(self, key: str, counts: Int[Tensor, "..."]) -> None:
        self.put(key, zlib.compress(counts.numpy().tobytes(), 1))

    def __enter__(self) -> "ResultCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
