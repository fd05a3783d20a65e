"""Class maps of other codebases: every common way to save them is read, the usual ones written."""

import pickle
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from torch import Tensor

from camkit.atomic import unfinished
from camkit.data.camforms import KNOWN_FORMS, CamFile, from_array, from_dict
from camkit.data.unpickling import unpickle
from camkit.errors import DataError
from camkit.ops.resampling import resize_cam

_IRN_STRIDE = 4  # IRN keeps a second copy of the maps at a quarter of the size
_UNREADABLE = (
    OSError,
    EOFError,
    TypeError,
    ValueError,
    RuntimeError,  # zip files of unknown kinds
    MemoryError,  # a header may promise more than the file holds
    OverflowError,
    tokenize.TokenError,  # numpy cleans a header that Python 2 wrote, and any that is damaged
    zipfile.BadZipFile,
    zlib.error,
    SafetensorError,
)


def read_cam(path: str | Path, *, classes: Sequence[int] | None = None) -> CamFile:
    """Read class maps, whichever codebase wrote them; nothing in the file is ever run.

    The form is told by the content. {class: map} with a class 0 may count from 0 or have the
    background there: it has, if its maps add up to 1 at each pixel.

    Args:
        path: a ``.npy`` file, or the same entries as ``.npz`` or safetensors.
        classes: the classes of the maps, from 0. Needed where the file does not say them, as a
            plain array does not; checked where it does.

    Returns:
        The maps in the order of the file. An empty dict is an image without classes: 0 maps, 0x0.

    Raises:
        DataError: the file cannot be read, asks for code to be run, or holds no class maps.
    """
    path = Path(path)
    wanted = None if classes is None else tuple(classes)
    content = read_arrays(path)
    if isinstance(content, np.ndarray):
        found = from_array(content, wanted, path)
    elif isinstance(content, dict):
        found = from_dict(content, wanted, path)
    else:
        kind = type(content).__name__
        raise DataError(f"{path} holds a {kind}; expected a dict of maps: {KNOWN_FORMS}")
    if wanted is not None and sorted(wanted) != sorted(found.classes):
        raise DataError(f"{path} holds the classes {found.classes}, but `classes` is {wanted}")
    return found


def write_cam(
    path: str | Path,
    classes: Sequence[int],
    cam: Float[Tensor, "k H W"],
    *,
    form: Literal["both", "psa", "irn", "clip-es"] = "both",
) -> None:
    """Write class maps as other codebases read them.

    The file appears complete or not at all. Codebases that run on numpy 1 read it as well.

    Args:
        path: by custom ``<image name>.npy``.
        classes: the classes of the maps, from 0; the background is no class.
        cam: one map for each class, in [0, 1], at the size of the image: nobody resizes them.
        form: "both" is read by the evaluators of ToCo and CLIP-ES and by that of IRN; "psa" by
            those of MCTformer, TransCAM and PSA; "irn" has the tensors at a quarter of the size
            that the later steps of IRN take; "clip-es" has float16 only, a third of "both".

    Raises:
        ValueError: the maps are not in [0, 1], or do not fit the classes.
    """
    path = Path(path)
    indices = _check_arguments(classes, cam)
    # A copy of its own: a view would take all of the tensor that it looks at into the pickle.
    maps = cam.detach().to("cpu", torch.float32, copy=True).contiguous()
    content: dict[Any, object]
    if form == "psa":
        content = {index: one.numpy() for index, one in zip(indices, maps, strict=True)}
    elif form == "irn":
        rows, cols = ((side - 1) // _IRN_STRIDE + 1 for side in maps.shape[-2:])
        small = (
            resize_cam(maps[None], (rows, cols))[0] if indices else maps.new_zeros(0, rows, cols)
        )
        keys = torch.tensor(indices, dtype=torch.int64)
        content = {"keys": keys, "cam": small.clone(), "high_res": maps.numpy()}
    elif form in ("both", "clip-es"):
        content = {"keys": np.array(indices, dtype=np.int64)}
        if form == "both":
            content["high_res"] = maps.numpy()
        content["attn_highres"] = maps.numpy().astype(np.float16)
    else:
        raise ValueError(f"`form` must be both, psa, irn or clip-es, got {form!r}")
    with unfinished(path) as draft, draft.open("wb") as file:
        _write_object(file, content)


def _check_arguments(classes: Sequence[int], cam: Tensor) -> list[int]:
    indices = [int(index) for index in classes]
    if cam.ndim != 3 or len(cam) != len(indices):
        raise ValueError(
            f"`cam` must be one map of rows x columns for each of the {len(indices)} classes, "
            f"got shape {tuple(cam.shape)}"
        )
    if len(set(indices)) != len(indices) or min(indices, default=0) < 0:
        raise ValueError(f"`classes` must be different indices from 0, got {indices}")
    if not cam.is_floating_point() or 0 in cam.shape[1:]:
        raise ValueError(
            f"`cam` must hold floating-point pixels, got {cam.dtype} of shape {tuple(cam.shape)}"
        )
    if indices:
        lowest, highest = cam.min().item(), cam.max().item()
        if not (lowest >= 0 and highest <= 1):  # so that NaN fails too
            raise ValueError(
                f"`cam` must lie in [0, 1], got {lowest:g} to {highest:g}; normalise it first"
            )
    return indices


def _write_object(file: BinaryIO, content: dict[Any, object]) -> None:
    """Do what `numpy.save` does, under the module name that numpy 1 and 2 both know."""
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(file, header)
    # Protocol 3, as in numpy 1: names stand as plain lines, the first of them is numpy's own.
    data = pickle.dumps(np.array(content, dtype=object), protocol=3)
    file.write(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))


def read_arrays(path: Path) -> object:
    """Read the dict or the array in a file; nothing that a pickle in it names is run.

    Raises:
        DataError: the file cannot be read, or asks for code to be run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            if start.startswith(b"\x93NUMPY"):
                return _read_npy(file, path)
            if start.startswith(b"PK\x03\x04"):
                with np.load(file, allow_pickle=False) as arrays:
                    entries = dict(arrays)
            elif start[8:] == b"{":
                entries = load_safetensors(file.read())
            else:
                raise DataError(f"{path} is no .npy, .npz or safetensors file; expected class maps")
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    return next(iter(entries.values())) if list(entries) in (["arr_0"], ["cam"]) else entries


def _read_npy(file: BinaryIO, path: Path) -> object:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        _, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise DataError(f"{path} is of .npy version {version}; class maps are of 1.0 or 2.0")
    if dtype.hasobject:
        return unpickle(file.read(), path)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
