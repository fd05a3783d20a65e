"""How other codebases lay out class maps: a dict or an array becomes a `CamFile`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from camkit.errors import DataError

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
