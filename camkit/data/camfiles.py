"""CAM files of other codebases: read every common layout, write the usual ones."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camkit.data.arrays import read_arrays
from camkit.errors import DataError
from camkit.manifest import unfinished
from camkit.ops.finite import check_finite, finite_range
from camkit.ops.images import resize_cam
from camkit.printing import short_repr

CamForm: TypeAlias = Literal[
    "psa", "psa-crf", "irn", "toco", "clip-es", "both", "logits", "excel", "array"
]

_LOGITS = ("msc_segs", "msc_seg", "segs")  # several scales are preferred to one
_KNOWN_FORMS = (
    "{class index: map}, {keys, high_res}, {keys, attn_highres}, {msc_seg}, {segs, msc_segs} or "
    "{valid_lam, keys_gt}"
)


@dataclass(frozen=True, eq=False)
class CamFile:
    """The class maps of one image, as its file holds them.

    Attributes:
        classes: the classes of the maps, from 0; the background is not a class.
        cam: one float32 map for each class, in the file's own range; for the form "logits" the
            softmax over all classes and the background.
        background: the map of the background, if the file has one.
        form: the layout of the file. "psa": {class: map} (PSA, SEAM, MCTformer, TransCAM);
            "psa-crf": {0: background, class + 1: probability} (MCTformer); "irn": {keys, cam,
            high_res}; "toco": {keys, high_res}; "clip-es": {keys, attn_highres}; "both": toco and
            clip-es in one; "logits": {msc_seg} (ToCo, SeCo, DuPL) or {segs, msc_segs} (AFA,
            WeCLIP); "excel": {valid_lam, keys_gt}; "array": maps without classes.
    """

    classes: tuple[int, ...]
    cam: Float[Tensor, "k H W"]
    background: Float[Tensor, "H W"] | None
    form: CamForm

    __repr__ = short_repr


def read_cam(path: str | Path, *, classes: Sequence[int] | None = None) -> CamFile:
    """Read class maps in the layout of any codebase, without running anything in the file.

    The layout is recognised by the content. Key 0 of {class: map} is the background if the maps add
    up to 1 at each pixel, else a class.

    Args:
        path: a ``.npy`` file, or the same entries as ``.npz`` or safetensors.
        classes: the classes of the maps, from 0. Required where the file does not name them, such
            as a plain array; checked where it does.

    Returns:
        The maps in the order of the file. An empty dict is an image without classes: 0 maps, 0x0.

    Raises:
        DataError: the file cannot be read, would run code, or holds no class maps.
    """
    path = Path(path)
    given = None if classes is None else tuple(classes)
    content = read_arrays(path)
    if isinstance(content, dict) and list(content) in (["arr_0"], ["cam"]):
        content = next(iter(content.values()))
    if isinstance(content, dict):
        cam_file = _from_dict(content, given, path)
    elif not isinstance(content, np.ndarray):
        kind = type(content).__name__
        raise DataError(f"{path} holds a {kind}; expected a dict of maps: {_KNOWN_FORMS}")
    elif given is None:
        raise DataError(
            f"{path} holds an array of shape {content.shape} without classes; pass `classes`, one "
            "for each map"
        )
    else:
        cam_file = CamFile(given, _maps(content, "array", len(given), path), None, "array")
    if given is not None and sorted(given) != sorted(cam_file.classes):
        raise DataError(f"{path} holds the classes {cam_file.classes}, but `classes` is {given}")
    return cam_file


def write_cam(
    path: str | Path,
    classes: Sequence[int],
    cam: Float[Tensor, "k H W"],
    *,
    form: Literal["both", "psa", "irn", "clip-es"] = "both",
) -> None:
    """Write class maps in a layout that other codebases read.

    The write is atomic. Codebases that run on numpy 1 can read the file, too.

    Args:
        path: by convention ``<image name>.npy``.
        classes: the classes of the maps, from 0; the background is not a class.
        cam: one map for each class, in [0, 1], at image size: no reader resizes them.
        form: "both" fits the evaluators of ToCo, CLIP-ES and IRN; "psa" those of MCTformer,
            TransCAM and PSA; "irn" adds the tensors at a quarter of the size that the later steps
            of IRN take; "clip-es" holds float16 only, a third of "both".

    Raises:
        ValueError: the maps are not in [0, 1] or do not match the classes.
    """
    path = Path(path)
    indices = [int(index) for index in classes]
    _check_writable(indices, cam)
    # copy, because the pickle of a view would hold the whole tensor behind it
    maps = cam.detach().to("cpu", torch.float32, copy=True).contiguous()
    content: dict[Any, object]
    if form == "psa":
        content = {index: map_.numpy() for index, map_ in zip(indices, maps, strict=True)}
    elif form == "irn":
        rows, cols = ((side - 1) // 4 + 1 for side in maps.shape[-2:])
        small = maps.new_zeros(0, rows, cols)
        if indices:
            small = resize_cam(maps[None], (rows, cols))[0].clone()
        keys = torch.tensor(indices, dtype=torch.int64)
        content = {"keys": keys, "cam": small, "high_res": maps.numpy()}
    elif form in ("both", "clip-es"):
        content = {"keys": np.array(indices, dtype=np.int64)}
        if form == "both":
            content["high_res"] = maps.numpy()
        content["attn_highres"] = maps.numpy().astype(np.float16)
    else:
        raise ValueError(f"`form` must be both, psa, irn or clip-es, got {form!r}")
    with unfinished(path) as draft, draft.open("wb") as file:
        # `numpy.save`, except that the pickle names a module that numpy 1 and numpy 2 both have
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, header)
        # protocol 3, as in numpy 1, writes names as plain lines, and numpy's is the first
        data = pickle.dumps(np.array(content, dtype=object), protocol=3)
        file.write(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1))


def _from_dict(content: dict[Any, object], given: tuple[int, ...] | None, path: Path) -> CamFile:
    """Recognise the layout of a dict by its entries, and read its maps."""
    if all(type(key) is int for key in content):
        return _from_class_keys(content, given, path)
    logits = next((name for name in _LOGITS if name in content), None)
    if logits is not None:
        return _from_logits(content[logits], logits, path)
    if "valid_lam" in content and "keys_gt" in content:
        classes = _classes(content["keys_gt"], "keys_gt", path)
        maps = _maps(content["valid_lam"], "valid_lam", len(classes) + 1, path)
        return CamFile(classes, maps[1:], maps[0], "excel")
    name = "high_res" if "high_res" in content else "attn_highres"
    if "keys" not in content or name not in content:
        entries = ", ".join(map(repr, content))
        raise DataError(f"{path} has the entries {entries}; expected {_KNOWN_FORMS}")
    form: CamForm = "irn" if "cam" in content else "toco"
    if "attn_highres" in content:
        form = "both" if name == "high_res" else "clip-es"
    classes = _classes(content["keys"], "keys", path)
    return CamFile(classes, _maps(content[name], name, len(classes), path), None, form)


def _from_class_keys(
    content: dict[Any, object], given: tuple[int, ...] | None, path: Path
) -> CamFile:
    keys = _classes(list(content), "keys", path)
    if not keys:
        return CamFile((), torch.zeros(0, 0, 0), None, "psa")
    maps = {key: _pixels(value, f"map {key}", 2, path) for key, value in content.items()}
    for key in keys:
        if maps[key].shape != maps[keys[0]].shape:
            raise DataError(
                f"{path}: map {key} has shape {tuple(maps[key].shape)}, map {keys[0]} has "
                f"{tuple(maps[keys[0]].shape)}; all maps of an image must have its size"
            )
    stacked = torch.stack(list(maps.values()))
    # float16 probabilities of a few classes add up to 1 within 0.005
    has_background = 0 in keys and not ((stacked.sum(0) - 1).abs() > 5e-3).any()
    if has_background and len(keys) == 1:
        if given is None:
            raise DataError(
                f"{path} holds one map, of key 0, that is 1 everywhere: either the background of "
                "an image without classes, or class 0; pass `classes`, () or (0,), to say which"
            )
        has_background = 0 not in given
    if not has_background:
        return CamFile(keys, stacked, None, "psa")
    slots = [slot for slot, key in enumerate(keys) if key != 0]
    classes = tuple(keys[slot] - 1 for slot in slots)
    return CamFile(classes, stacked[slots], maps[0], "psa-crf")


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


def _classes(value: object, name: str, path: Path) -> tuple[int, ...]:
    indices = np.asarray(value) if isinstance(value, (list, tuple)) else value
    if not isinstance(indices, np.ndarray) or indices.ndim != 1:
        raise DataError(f"{path}: {name} must be a list of class indices, got {_kind(value)}")
    if indices.size and indices.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} must be whole numbers, got {_kind(value)}")
    classes = tuple(int(index) for index in indices)
    if not _distinct(classes):
        raise DataError(
            f"{path}: {name} must be distinct class indices from 0, got {list(classes)}"
        )
    return classes


def _distinct(indices: Sequence[int]) -> bool:
    return min(indices, default=0) >= 0 and len(set(indices)) == len(indices)


def _maps(value: object, name: str, count: int, path: Path) -> Float[Tensor, "k H W"]:
    if not count and isinstance(value, np.ndarray) and value.shape[:1] == (0,):
        return torch.zeros(value.shape if value.ndim == 3 else (0, 0, 0))
    maps = _pixels(value, name, 3, path)
    if len(maps) != count:
        raise DataError(f"{path}: {name} has {len(maps)} maps; expected {count}")
    return maps


def _pixels(value: object, name: str, ndim: int, path: Path) -> Float[Tensor, "..."]:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise DataError(f"{path}: {name} must hold floating-point numbers, got {_kind(value)}")
    if value.ndim != ndim or 0 in value.shape:
        axes = "maps x rows x columns" if ndim == 3 else "rows x columns"
        raise DataError(f"{path}: {name} must be {axes}, got {_kind(value)}")
    with np.errstate(over="ignore"):  # a value too large for float32 becomes infinity, see below
        pixels = torch.from_numpy(value.astype(np.float32, order="C"))
    try:
        check_finite(name, pixels, ("map",) if ndim == 3 else ())
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return pixels


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"


def _check_writable(indices: list[int], cam: Tensor) -> None:
    fits = cam.ndim == 3 and len(cam) == len(indices) and 0 not in cam.shape[1:]
    if not fits or not cam.is_floating_point():
        raise ValueError(
            f"`cam` must be one map of rows x columns for each of the {len(indices)} classes, of "
            f"floating-point pixels, got {cam.dtype} of shape {tuple(cam.shape)}"
        )
    if not _distinct(indices):
        raise ValueError(f"`classes` must be distinct indices from 0, got {indices}")
    if indices:
        lowest, highest = finite_range("cam", cam, ("map",)) or (0.0, 0.0)
        if lowest < 0 or highest > 1:
            raise ValueError(
                f"`cam` must lie in [0, 1], got {lowest:g} to {highest:g}; normalise it first"
            )
