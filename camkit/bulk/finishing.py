"""The last stage of a bulk run: maps are refined by colour, drawn and written as atomic files."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from camkit.bulk.items import result_path
from camkit.bulk.recipe import Writing
from camkit.bulk.stages import Maps
from camkit.capture.record import Capture
from camkit.data.camfiles import write_cam
from camkit.errors import CamkitError
from camkit.mask import to_mask
from camkit.ops.images import resize_cam
from camkit.paint import save_mask

_FOLDER_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
)


class OutputError(CamkitError):
    """The results folder cannot be written to, whatever the image."""

    @staticmethod
    def explain(root: Path, error: OSError) -> "OutputError":
        """Say what to do about an error of the file system."""
        return OutputError(
            f"{root} cannot be written to ({error.strerror}); free disk space or check write "
            "permission there, then run the command again: finished images are kept"
        )


@dataclass(frozen=True)
class OutFolder:
    """The results folder.

    Attributes:
        root: of all results.
        rank: of this process among those that write into the folder.
    """

    root: Path
    rank: int = 0

    @property
    def drafts(self) -> Path:
        """Folder of unfinished files of this rank, which its next run clears."""
        return self.root / ".drafts" / f"rank-{self.rank}"


@dataclass(frozen=True, eq=False)
class ImageResult:
    """A finished image.

    Attributes:
        key: of the item.
        row: its line of the manifest, JSON-ready, with paths relative to the results folder.
        cam: its maps, kept for the Parquet file of the chunk.
    """

    key: str
    row: dict[str, Any]
    cam: Float[np.ndarray, "k h w"] | None = None


def finish(maps: Maps, writing: Writing, folder: OutFolder) -> ImageResult:
    """Refine by colour, draw the mask, and write the files of an image."""
    image, classes = maps.image, maps.classes
    cam = torch.from_numpy(maps.cam)[None]
    if classes and writing.finish:
        capture = Capture.of_picture(torch.from_numpy(image.rgb).permute(2, 0, 1)[None] / 255)
        with torch.no_grad():
            for refiner in writing.finish:
                cam = refiner(cam, capture)
        cam = cam.float()
    full = resize_cam(cam, image.size).clamp(0, 1) if classes else torch.zeros(1, 0, *image.size)
    files: dict[str, Path] = {}
    with _draft_folder(folder) as draft:
        if writing.masks:
            mask = torch.zeros(image.size, dtype=torch.uint8)
            if classes:
                mask = to_mask(
                    full,
                    torch.tensor([classes]) if maps.by_class else None,
                    background_score=writing.background_score,
                    background=writing.background,
                    ignore_below=writing.ignore_below,
                )[0]
            files["mask"] = draft / "mask.png"
            save_mask(mask, files["mask"])
        if writing.cams == "npz":
            half = full[0].numpy().astype(np.float16)
            files["cam"] = draft / "cam.npz"
            np.savez_compressed(files["cam"], keys=np.array(classes, np.int64), attn_highres=half)
        elif writing.cams in ("both", "psa", "irn", "clip-es"):
            files["cam"] = draft / "cam.npy"
            write_cam(files["cam"], classes, full[0], form=writing.cams)
        paths = {
            kind: _move(path, f"{kind}s" / result_path(image.key, path.suffix), folder)
            for kind, path in files.items()
        }
    kept = cam[0].clamp(0, 1).numpy() if writing.cams == "parquet" else None
    return ImageResult(image.key, {**maps.row, **paths}, kept)


def write_part(results: Sequence[ImageResult], folder: OutFolder, name: str) -> list[ImageResult]:
    """Write the maps of a chunk as one Parquet file, float16.

    Columns: ``key``; ``rows`` and ``cols`` of the photo; ``height`` and ``width`` of the maps;
    ``classes``; ``names``; ``cam``, map after map, row by row. Rows are sorted by key. ``name`` is
    that of the file without its suffix, see `camkit.bulk.ledger.ChunkPlan.part`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not results:
        return []
    results = sorted(results, key=lambda result: result.key)  # they finish in any order
    rows = [result.row for result in results]
    cams, int32 = [result.cam for result in results if result.cam is not None], pa.int32()
    columns = {
        "key": [result.key for result in results],
        "rows": pa.array([row["size"][0] for row in rows], int32),
        "cols": pa.array([row["size"][1] for row in rows], int32),
        "height": pa.array([cam.shape[1] for cam in cams], int32),
        "width": pa.array([cam.shape[2] for cam in cams], int32),
    }
    for column, entry, kind in (("classes", "index", int32), ("names", "name", pa.string())):
        values = [[label[entry] for label in row["classes"]] for row in rows]
        columns[column] = pa.array(values, pa.list_(kind))
    flat = [cam.astype(np.float16).ravel() for cam in cams]
    columns["cam"] = pa.array(flat, pa.list_(pa.float16()))
    with _draft_folder(folder) as draft:
        parquet.write_table(pa.table(columns), draft / "part.parquet", compression="zstd")
        path = _move(draft / "part.parquet", PurePosixPath("cams", f"{name}.parquet"), folder)
    return [replace(result, row={**result.row, "cam": path}, cam=None) for result in results]


@contextmanager
def _draft_folder(folder: OutFolder) -> Iterator[Path]:
    """Yield a new folder for drafts, which the block may fill, and remove it afterwards."""
    draft = folder.drafts / uuid.uuid4().hex
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise OutputError.explain(folder.root, error) from error
    try:
        yield draft
    except OSError as error:
        if error.errno in _FOLDER_ERRORS:
            raise OutputError.explain(folder.root, error) from error
        raise  # concerns this image alone, such as a path that is too long
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _move(draft: Path, place: PurePosixPath, folder: OutFolder) -> str:
    """Flush a draft to the disk and move it to its place in one step."""
    with draft.open("rb+") as file:
        os.fsync(file.fileno())  # the file must survive whatever the journal entry survives
    target = folder.root / place
    target.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(target)
    return str(place)
