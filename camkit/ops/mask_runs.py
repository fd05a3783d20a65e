"""Masks of one picture as runs of pixels: many overlapping masks in little memory.

Runs go down the columns, as in the run-length encoding of COCO, so that its counts are read without
decoding a mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from camkit.printing import short_repr

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class MaskRuns:
    """Binary masks of one picture, which may overlap.

    Attributes:
        size: rows and columns of the picture.
        count: number of masks.
        starts: first pixel of each run; pixel ``row + rows * column``.
        ends: the pixel behind its last.
        owners: mask that it belongs to, from 0, ascending.
    """

    size: Size
    count: int
    starts: Integer[np.ndarray, " r"]
    ends: Integer[np.ndarray, " r"]
    owners: Integer[np.ndarray, " r"]

    __repr__ = short_repr

    def __len__(self) -> int:
        return self.count

    @classmethod
    def of(cls, proposals: Any, size: Size) -> "MaskRuns":
        """Read masks in any of the forms that mask generators return.

        Args:
            proposals: bool masks ``(n, H, W)`` or a list of masks ``(H, W)``; whole numbers ``(H,
                W)``, a label image, in which each value from 0 is a mask of its own and negative
                values belong to none; a stack or list of these; or a list of dicts, each the COCO
                encoding of a mask (``size``, ``counts``) or with a mask or its encoding as
                ``segmentation``, as segment-anything's ``SamAutomaticMaskGenerator`` returns them.
                Arrays may be numpy's or tensors.
            size: rows and columns, for a list without masks.

        Raises:
            TypeError: it has none of these forms.
            ValueError: masks have different sizes, or an encoding is damaged.
        """
        if isinstance(proposals, MaskRuns):
            return proposals
        if isinstance(proposals, np.ndarray | Tensor):
            array = _array(proposals, "proposals")
            parts = [array] if array.ndim == 2 else list(array)
        elif isinstance(proposals, Sequence) and not isinstance(proposals, str | bytes):
            parts = list(proposals)
        else:
            raise TypeError(
                "proposals must be bool masks (n, H, W), a label image (H, W) of whole numbers, or "
                f"a list of masks or dicts, got {type(proposals).__name__}"
            )
        return cls.joined([_read(part, place) for place, part in enumerate(parts)], size)

    @classmethod
    def joined(cls, parts: "Sequence[MaskRuns]", size: Size) -> "MaskRuns":
        """Put the masks of several values into one; ``size`` is that of none at all."""
        none = np.zeros(0, np.int64)
        if not parts:
            return cls(size, 0, none, none, none)
        for place, part in enumerate(parts):
            if part.size != parts[0].size:
                shown = ["x".join(map(str, each.size)) for each in (parts[0], part)]
                raise ValueError(
                    f"proposals must all have the size of the picture, got {shown[0]} (rows x "
                    f"columns) in place 0 and {shown[1]} in place {place}"
                )
        counts = [part.count for part in parts]
        firsts = np.cumsum([0, *counts[:-1]])
        owners = [part.owners + first for part, first in zip(parts, firsts, strict=True)]
        starts, ends = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("starts", "ends")
        )
        return cls(parts[0].size, sum(counts), starts, ends, np.concatenate(owners))

    @classmethod
    def of_mask(cls, mask: Bool[np.ndarray, "H W"]) -> "MaskRuns":
        """Encode one mask."""
        rows, cols = mask.shape
        bits = mask.view(np.uint8)
        turns = np.empty((rows + 1, cols), np.uint8)  # where a column enters or leaves the mask
        turns[0], turns[rows] = bits[0], bits[-1]
        np.bitwise_xor(bits[1:], bits[:-1], out=turns[1:rows])
        row, col = np.divmod(np.flatnonzero(turns.view(bool)), cols)
        places = row + rows * col
        places = places[np.lexsort((row, col))]  # a run may end where the next column begins
        starts, ends = places[0::2], places[1::2]
        return cls((rows, cols), 1, starts, ends, np.zeros(len(starts), np.int64))

    @classmethod
    def of_labels(cls, labels: Integer[np.ndarray, "H W"]) -> "MaskRuns":
        """Encode a label image: a mask for each value from 0, in ascending order of the values."""
        flat = np.ascontiguousarray(labels.T).ravel()
        edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [flat.size]])
        held, owners = np.unique(flat[starts], return_inverse=True)
        below = int(np.searchsorted(held, 0))  # number of negative values
        kept = owners >= below
        starts, ends, owners = starts[kept], ends[kept], owners[kept] - below
        order = np.argsort(owners, kind="stable")
        size = (labels.shape[0], labels.shape[1])
        return cls(size, len(held) - below, starts[order], ends[order], owners[order])

    @classmethod
    def of_coco(cls, encoded: Mapping[str, Any]) -> "MaskRuns":
        """Read one mask in the encoding of COCO.

        Args:
            encoded: ``size``, rows and columns; ``counts``, the lengths of alternating runs outside
                and inside of the mask, as a list, or compressed as text or bytes.

        Raises:
            ValueError: it is damaged.
        """
        size = encoded.get("size")
        whole = isinstance(size, Sequence) and [type(side) for side in size] == [int, int]
        if size is None or not whole or min(size) < 1:
            raise ValueError(f"`size` must be [rows, columns], got {size!r}")
        rows, cols = size[0], size[1]
        lengths = _lengths(encoded.get("counts"))
        total = lengths.sum(dtype=np.float64)  # int64 would wrap around
        if lengths.min(initial=0) < 0 or total != rows * cols:
            raise ValueError(
                f"`counts` must add up to the {rows * cols} pixels of {rows}x{cols}, without "
                f"negative numbers, got a sum of {total:.15g}"
            )
        edges = np.cumsum(lengths, dtype=np.int64)
        ends = edges[1::2]
        starts = edges[0::2][: len(ends)]
        kept = ends > starts
        return cls((rows, cols), 1, starts[kept], ends[kept], np.zeros(kept.sum(), np.int64))

    @property
    def areas(self) -> Integer[np.ndarray, " n"]:
        """Pixels of each mask."""
        areas = np.zeros(self.count, np.int64)
        np.add.at(areas, self.owners, self.ends - self.starts)
        return areas

    def kept(self, chosen: Bool[np.ndarray, " n"]) -> "MaskRuns":
        """Return only the masks that are chosen."""
        numbers = np.cumsum(chosen) - 1
        runs = chosen[self.owners]
        owners = numbers[self.owners[runs]]
        return MaskRuns(self.size, int(chosen.sum()), self.starts[runs], self.ends[runs], owners)

    def dense(self) -> Bool[np.ndarray, "n H W"]:
        """Decode all masks; takes a byte for every pixel of every mask."""
        rows, cols = self.size
        masks = np.zeros((self.count, rows * cols), bool)
        for start, end, owner in self._triples():
            masks[owner, start:end] = True
        return masks.reshape(self.count, cols, rows).transpose(0, 2, 1)

    def pieces(self) -> Int[Tensor, "H W"]:
        """Return a number for every set of masks that cover a pixel, -1 where none does.

        These are the quasi-superpixels of FMA-WSSS: the pixels of a piece lie in the same masks.
        """
        rows, cols = self.size
        # the sum of a random number for each mask is the same only for the same set of masks
        codes = np.random.default_rng(0).integers(1, 2**63, self.count, dtype=np.uint64)
        steps = np.zeros(rows * cols + 1, np.uint64)
        np.add.at(steps, self.starts, codes[self.owners])
        np.subtract.at(steps, self.ends, codes[self.owners])
        sums = np.cumsum(steps)[:-1]
        held, pieces = np.unique(sums, return_inverse=True)
        pieces = pieces.reshape(cols, rows).T - int(held.size > 0 and held[0] == 0)
        return torch.from_numpy(np.ascontiguousarray(pieces))

    def top(self, order: Integer[np.ndarray, " n"]) -> Int[Tensor, "H W"]:
        """Return the mask of every pixel, -1 where none is; later masks of ``order`` cover others.

        Args:
            order: all masks, the highest last.
        """
        rows, cols = self.size
        places = np.argsort(order)[self.owners]  # of the mask of each run
        runs = np.argsort(places, kind="stable")
        owner = np.full(rows * cols, -1, np.int64)
        for start, end, mask in self._triples(runs):
            owner[start:end] = mask
        return torch.from_numpy(np.ascontiguousarray(owner.reshape(cols, rows).T))

    def _triples(self, runs: Integer[np.ndarray, " r"] | slice = slice(None)) -> Any:
        columns = (self.starts[runs], self.ends[runs], self.owners[runs])
        return zip(*(column.tolist() for column in columns), strict=True)


def _read(part: Any, place: int) -> MaskRuns:
    """Read one mask, label image or dict of a list."""
    if isinstance(part, Mapping):
        mask = part.get("segmentation", part)
        if isinstance(mask, Mapping):
            try:
                return MaskRuns.of_coco(mask)
            except ValueError as error:
                raise ValueError(f"proposals in place {place}: {error}") from None
        part = mask
    array = _array(part, f"proposals in place {place}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"proposals in place {place} must be a mask or label image (H, W), got shape "
            f"{array.shape}; polygons and boxes have to be drawn as masks first"
        )
    return MaskRuns.of_mask(array) if array.dtype == bool else MaskRuns.of_labels(array)


def _array(value: Any, name: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biu":
        kind, way_out = type(array).__name__, "polygons and boxes have to be drawn as masks first"
        if isinstance(array, np.ndarray):
            kind, way_out = f"{array.dtype}", "write `scores > threshold` to make masks of scores"
        raise ValueError(
            f"{name} must hold bool masks or label images of whole numbers, got {kind}; {way_out}"
        )
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} must be (H, W) or (n, H, W), got shape {array.shape}")
    return np.ascontiguousarray(array)


def _lengths(counts: Any) -> Integer[np.ndarray, " c"]:
    """Return the lengths of runs, decompressed if they are text."""
    if isinstance(counts, str | bytes):
        return _decompressed(counts)
    try:
        lengths = np.asarray(counts)
    except ValueError:  # lists of different lengths
        lengths = np.asarray(None)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        got = lengths.dtype if lengths.ndim == 1 else type(counts).__name__
        raise ValueError(f"`counts` must be a list of whole numbers, or text, got {got}")
    return lengths.astype(np.int64)


def _decompressed(text: str | bytes) -> Integer[np.ndarray, " c"]:
    """Read the compressed counts of COCO.

    Each number has groups of 5 bits, the lowest first, as characters from "0" on; bit 5 says that
    another group follows, bit 4 of the last is the sign. From the fourth number on, it is the
    difference to the number two places before.
    """
    try:
        raw = text.encode("ascii") if isinstance(text, str) else bytes(text)
    except UnicodeEncodeError as error:
        raise ValueError("compressed `counts` must be ASCII characters") from error
    groups = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if not groups.size:
        return groups
    if groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise ValueError("compressed `counts` are damaged: a character or the end does not fit")
    last = np.flatnonzero(groups & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    widths = last - first + 1
    if widths.max() > 8:
        raise ValueError("compressed `counts` are damaged: a number has more than 40 bits")
    shifts = 5 * (np.arange(groups.size) - np.repeat(first, widths))
    numbers = np.add.reduceat((groups & 31) << shifts, first)
    numbers -= np.where(groups[last] & 16, 1 << (5 * widths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
