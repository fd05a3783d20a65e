"""The last stage: maps become masks and files, each of them complete or not there."""

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
from torch import Tensor

from camkit.bulk.items import result_path
from camkit.bulk.recipe import Writing
from camkit.bulk.stages import Maps
from camkit.capture.record import Capture
from camkit.data.camfiles import write_cam
from camkit.errors import CamkitError
from camkit.mask import to_mask
from camkit.ops.images import resize_cam
from camkit.paint import save_mask

MASKS, CAMS = "masks", "cams"
_NO_ROOM = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
)


class OutputError(CamkitError):
    """Results cannot be written, whichever image they are of."""


@dataclass(frozen=True)
class OutFolder:
    """Where results go.

    Attributes:
        root: the folder of all results.
        rank: of this process among those that write into it; each has its own place for drafts.
    """

    root: Path
    rank: int = 0

    @property
    def drafts(self) -> Path:
        """Where files are begun; what a killed process left there is swept by the next one."""
        return self.root / ".drafts" / f"rank-{self.rank}"


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What became of an image.

    Attributes:
        key: of the item.
        row: its line of the manifest, JSON-ready; paths in it begin at the folder of the results.
        cam: its maps, where they are kept for a Parquet file of the whole chunk.
    """

    key: str
    row: dict[str, Any]
    cam: Float[np.ndarray, "k h w"] | None = None


def finish(maps: Maps, writing: Writing, folder: OutFolder) -> ImageResult:
    """Refine by the picture, draw the mask, write what is asked for.

    Raises:
        OutputError: the folder cannot be written to.
    """
    cam = _refined(maps, writing)
    full = _at_photo_size(cam, maps)
    made: dict[str, str] = {}
    with writing_into(folder) as draft:
        if writing.masks:
            mask = _mask(full, maps, writing)
            save_mask(mask, draft / "mask.png")
            made["mask"] = _place(draft / "mask.png", MASKS, result_path(maps.key, ".png"), folder)
        if writing.cams not in ("none", "parquet"):
            suffix = ".npz" if writing.cams == "npz" else ".npy"
            _write_maps(draft / f"cam{suffix}", maps.classes, full[0], writing)
            where = result_path(maps.key, suffix)
            made["cam"] = _place(draft / f"cam{suffix}", CAMS, where, folder)
    kept = cam[0].clamp(0, 1).numpy() if writing.cams == "parquet" else None
    return ImageResult(maps.key, {**maps.row, **made}, kept)


def write_part(made: Sequence[ImageResult], folder: OutFolder, name: str) -> list[ImageResult]:
    """Write the maps of a chunk as one Parquet file, float16.

    Columns: ``key``; ``rows`` and ``cols`` of the photo; ``height`` and ``width`` of the maps;
    ``classes``; ``names``; ``cam``, the maps one after the other, row by row. Rows stand by key.

    Args:
        made: images of the chunk, with their maps.
        folder: of the results.
        name: of the file, without its ending (`camkit.bulk.ledger.ChunkPlan.part`).

    Raises:
        OutputError: the folder cannot be written to.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not made:
        return []
    made = sorted(made, key=lambda one: one.key)  # they are finished in any order
    cams = [np.zeros((0, 1, 1), np.float32) if one.cam is None else one.cam for one in made]
    table = pa.table(
        {
            "key": [one.key for one in made],
            "rows": pa.array([one.row["size"][0] for one in made], pa.int32()),
            "cols": pa.array([one.row["size"][1] for one in made], pa.int32()),
            "height": pa.array([cam.shape[1] for cam in cams], pa.int32()),
            "width": pa.array([cam.shape[2] for cam in cams], pa.int32()),
            "classes": pa.array(
                [[told["index"] for told in one.row["classes"]] for one in made],
                pa.list_(pa.int32()),
            ),
            "names": pa.array(
                [[told["name"] for told in one.row["classes"]] for one in made],
                pa.list_(pa.string()),
            ),
            "cam": pa.array(
                [cam.astype(np.float16).ravel() for cam in cams], pa.list_(pa.float16())
            ),
        }
    )
    with writing_into(folder) as draft:
        parquet.write_table(table, draft / "part.parquet", compression="zstd")
        where = PurePosixPath(f"{name}.parquet")
        path = _place(draft / "part.parquet", CAMS, where, folder)
    return [replace(one, row={**one.row, "cam": path}, cam=None) for one in made]


def _refined(maps: Maps, writing: Writing) -> Float[Tensor, "1 k h w"]:
    cam = torch.from_numpy(maps.cam)[None]
    if not maps.classes or not writing.finish:
        return cam
    picture = Capture.of_picture(torch.from_numpy(maps.rgb).permute(2, 0, 1)[None] / 255)
    with torch.no_grad():
        for refiner in writing.finish:
            cam = refiner(cam, picture)
    return cam.float()


def _at_photo_size(cam: Float[Tensor, "1 k h w"], maps: Maps) -> Float[Tensor, "1 k H W"]:
    if not maps.classes:
        return torch.zeros(1, 0, *maps.size)
    return resize_cam(cam, maps.size).clamp(0, 1)


def _mask(full: Float[Tensor, "1 k H W"], maps: Maps, writing: Writing) -> Tensor:
    if not maps.classes:
        return torch.zeros(maps.size, dtype=torch.uint8)
    return to_mask(
        full,
        torch.tensor([maps.classes]) if maps.by_class else None,
        background_score=writing.background_score,
        background=writing.background,
        ignore_below=writing.ignore_below,
    )[0]


def _write_maps(
    path: Path, classes: tuple[int, ...], cam: Float[Tensor, "k H W"], writing: Writing
) -> None:
    if writing.cams in ("both", "psa", "irn", "clip-es"):
        write_cam(path, classes, cam, form=writing.cams)
        return
    keys = np.array(classes, np.int64)
    np.savez_compressed(path, keys=keys, attn_highres=cam.numpy().astype(np.float16))


@contextmanager
def writing_into(folder: OutFolder) -> Iterator[Path]:
    """A new folder for drafts, gone afterwards; one that takes no files is an `OutputError`."""
    draft = folder.drafts / uuid.uuid4().hex
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise no_room(folder, error) from error
    try:
        yield draft
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise no_room(folder, error) from error
        raise  # of this image alone, such as a path that is too long
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def no_room(folder: OutFolder, error: OSError) -> OutputError:
    """What to raise where the folder takes no files."""
    return OutputError(
        f"{folder.root} cannot be written to ({error.strerror}); what is done is kept: make room "
        "there, or rights, and start again"
    )


def _place(draft: Path, kind: str, where: PurePosixPath, folder: OutFolder) -> str:
    """Bring a draft to the disk, then to its place at once."""
    with draft.open("rb+") as file:
        os.fsync(file.fileno())  # a journal that says it is there must not outlive it
    target = folder.root / kind / where
    target.parent.mkdir(parents=True, exist_ok=True)
    draft.replace(target)
    return str(PurePosixPath(kind) / where)
