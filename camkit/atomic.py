"""Files that appear complete or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield another name in the same folder; what is written there becomes ``path`` at the end.

    When the block raises, nothing appears and whatever stood at ``path`` stays.
    """
    # 50 characters are 200 bytes at most, and a file name holds 255
    draft = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.part")
    try:
        yield draft
        os.replace(draft, path)  # noqa: PTH105 - the rename is what makes it atomic
    finally:
        draft.unlink(missing_ok=True)
