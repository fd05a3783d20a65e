"""Atomic files: complete, or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield a draft path in the same folder, and rename the draft to ``path`` after the block.

    If the block raises, the draft is deleted and ``path`` stays as it was.
    """
    # 50 characters are at most 200 bytes, and a file name may have 255
    draft = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        os.replace(draft, path)  # noqa: PTH105 - the rename is what makes it atomic
    finally:
        draft.unlink(missing_ok=True)
