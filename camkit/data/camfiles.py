"""Class maps of other codebases: every common file layout is read, the usual ones are written."""

import pickle
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from torch import Tensor

from camkit.atomic import unfinished
from camkit.data.unpickling import unpickle
from camkit.errors import DataError
from camkit.ops.images import resize_cam

CamForm: TypeAlias = Literal[
    "psa", "psa-crf", "irn", "toco", "clip-es", "both", "logits", "excel", "array"
]

_SUM_TOLERANCE = 5e-3  # float16 probabilities of a few classes add up to 1 within this
_MAPS: dict[CamForm, str] = {
    "both": "high_res",
    "clip-es": "attn_highres",
    "irn": "high_res",
    "toco": "high_res",
}
_LOGITS = ("msc_segs", "msc_seg", "segs")  # several scales before one
KNOWN_FORMS = (
    "{class index: map}, {keys, high_res}, {keys, attn_highres}, {msc_seg}, {segs, msc_segs} or "
    "{valid_lam, keys_gt}"
)


@dataclass(frozen=True, eq=False)
class CamFile:
    """The class maps of one image, as a file holds them.

    Attributes:
        classes: the classes of the maps, from 0; the background is no class.
        cam: one map for each of them, float32, in the file's own range; only of form "logits"
            they are computed, the softmax over all classes and the background.
        background: the map of the background, where the file has one.
        form: how the file was laid out. "psa": {class: map} (PSA, SEAM, MCTformer, TransCAM);
            "psa-crf": {0: background, class + 1: probability} (MCTformer); "irn": {keys, cam,
            high_res}; "toco": {keys, high_res}; "clip-es": {keys, attn_highres}; "both": the last
            two at once; "logits": {msc_seg} (ToCo, SeCo, DuPL) or {segs, msc_segs} (AFA, WeCLIP);
            "excel": {valid_lam, keys_gt}; "array": maps without classes.
    """

    classes: tuple[int, ...]
    cam: Float[Tensor, "k H W"]
    background: Float[Tensor, "H W"] | None
    form: CamForm


def from_array(array: np.ndarray, classes: tuple[int, ...] | None, path: Path) -> CamFile:
    """Take an array of maps for the maps of the given classes.

    Raises:
        DataError: no classes are given, or the array does not hold one map for each.
    """
    if classes is None:
        raise DataError(
            f"{path} holds an array of shape {array.shape} and no classes; pass `classes`, one for "
            "each map"
        )
    return CamFile(classes, _tensor(array, "array", len(classes), path), None, "array")


def from_dict(content: dict[Any, object], classes: tuple[int, ...] | None, path: Path) -> CamFile:
    """Tell the layout of a dict by its entries, and take the maps out.

    Args:
        content: the dict of a file.
        classes: settle what one map of key 0 means, which its content leaves open.
        path: the file, for messages.

    Raises:
        DataError: the layout is unknown, or its maps or classes cannot be used.
    """
    if all(type(key) is int for key in content):
        return _from_classes(content, classes, path)
    logits = next((name for name in _LOGITS if name in content), None)
    if logits is not None:
        return _from_logits(content[logits], logits, path)
    if "valid_lam" in content and "keys_gt" in content:
        return _from_excel(content, path)
    form: CamForm
    if "keys" in content and "attn_highres" in content:
        form = "both" if "high_res" in content else "clip-es"
    elif "keys" in content and "high_res" in content:
        form = "irn" if "cam" in content else "toco"
    else:
        names = ", ".join(map(repr, content))
        raise DataError(f"{path} has the entries {names}; expected {KNOWN_FORMS}")
    found = _classes(content["keys"], "keys", path)
    return CamFile(found, _tensor(content[_MAPS[form]], _MAPS[form], len(found), path), None, form)


def _from_classes(
    content: dict[Any, object], classes: tuple[int, ...] | None, path: Path
) -> CamFile:
    keys = _classes(list(content), "keys", path)
    if not keys:
        return CamFile((), torch.zeros(0, 0, 0), None, "psa")
    maps = torch.stack(_same_size(content, path))
    if not _counts_background(keys, maps, classes, path):
        return CamFile(keys, maps, None, "psa")
    shown = [slot for slot, key in enumerate(keys) if key != 0]
    found = tuple(keys[slot] - 1 for slot in shown)
    return CamFile(found, maps[shown], maps[keys.index(0)], "psa-crf")


def _same_size(content: dict[Any, object], path: Path) -> list[Tensor]:
    maps = {key: _pixels(value, f"map {key}", 2, path) for key, value in content.items()}
    first, *others = maps
    for key in others:
        if maps[key].shape != maps[first].shape:
            raise DataError(
                f"{path}: map {key} has shape {tuple(maps[key].shape)}, map {first} has "
                f"{tuple(maps[first].shape)}; all maps of an image have its size"
            )
    return list(maps.values())


def _counts_background(
    keys: tuple[int, ...], maps: Tensor, classes: tuple[int, ...] | None, path: Path
) -> bool:
    if 0 not in keys or ((maps.sum(0) - 1).abs() > _SUM_TOLERANCE).any():
        return False
    if len(keys) > 1:
        return True
    if classes is None:
        raise DataError(
            f"{path} holds one map, of key 0, that is 1 everywhere: the background of an image "
            "without classes, or class 0; pass `classes`, () or (0,), to say which"
        )
    return 0 not in classes


def _from_logits(value: object, name: str, path: Path) -> CamFile:
    if isinstance(value, np.ndarray) and value.ndim == 4 and len(value) == 1:
        value = value[0]
    scores = _pixels(value, name, 3, path)
    if len(scores) < 2:
        raise DataError(
            f"{path}: {name} has {len(scores)} maps; expected the background and each class"
        )
    maps = scores.softmax(dim=0)
    return CamFile(tuple(range(len(maps) - 1)), maps[1:], maps[0], "logits")


def _from_excel(content: dict[Any, object], path: Path) -> CamFile:
    classes = _classes(content["keys_gt"], "keys_gt", path)
    maps = _tensor(content["valid_lam"], "valid_lam", len(classes) + 1, path)
    return CamFile(classes, maps[1:], maps[0], "excel")


def _classes(value: object, name: str, path: Path) -> tuple[int, ...]:
    indices = np.asarray(value) if isinstance(value, (list, tuple)) else value
    if not isinstance(indices, np.ndarray) or indices.ndim != 1:
        raise DataError(f"{path}: {name} must be a row of class indices, got {_kind(value)}")
    if indices.size and indices.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} must be whole numbers, got {_kind(value)}")
    classes = tuple(int(index) for index in indices)
    if min(classes, default=0) < 0 or len(set(classes)) != len(classes):
        raise DataError(
            f"{path}: {name} must be different class indices from 0, got {list(classes)}"
        )
    return classes


def _tensor(value: object, name: str, count: int, path: Path) -> Float[Tensor, "k H W"]:
    if not count and isinstance(value, np.ndarray) and value.shape[:1] == (0,):
        return torch.zeros(value.shape if value.ndim == 3 else (0, 0, 0))
    maps = _pixels(value, name, 3, path)
    if len(maps) != count:
        raise DataError(f"{path}: {name} has {len(maps)} maps, but there must be {count}")
    return maps


def _pixels(value: object, name: str, ndim: int, path: Path) -> Float[Tensor, "..."]:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise DataError(f"{path}: {name} must hold floating-point numbers, got {_kind(value)}")
    if value.ndim != ndim or 0 in value.shape:
        axes = "maps x rows x columns" if ndim == 3 else "rows x columns"
        raise DataError(f"{path}: {name} must be {axes}, got {_kind(value)}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is told as infinity below
        pixels = torch.from_numpy(value.astype(np.float32, order="C"))
    if not pixels.isfinite().all():
        raise DataError(f"{path}: {name} holds NaN or infinity; compute the maps again")
    return pixels


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"


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
