"""Everything that decides what a bulk run makes of an image: frozen, picklable, for any engine."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from camkit.edits.protocol import Edit, KeyEdit
from camkit.manifest import weights_hash
from camkit.mask import to_mask
from camkit.method import DEFAULT_REFINE
from camkit.pipeline import Pipeline, wrap
from camkit.refiners import Refiner
from camkit.seeds import GradientSeed, PredictedClasses, Seed
from camkit.vocabulary import Vocabulary

CamOutput: TypeAlias = Literal["none", "both", "psa", "irn", "clip-es", "npz", "parquet"]
"""How class maps are written: not, by `camkit.data.write_cam`, as float16 npz, or in Parquet."""

MOST_PIXELS = 89_478_485
"""What PIL trusts by default: a quarter of a gigabyte of colours."""


@dataclass(frozen=True)
class Reading:
    """How image files become pictures for the model (`camkit.load_photo`).

    Attributes:
        size: long side, or exact rows and columns.
        mean: subtracted from the colours.
        std: what the difference is divided by.
        multiple: what both sides are rounded to.
        max_pixels: images of more are refused: a small file may unpack to fill the memory.
    """

    size: int | tuple[int, int] = 384
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    multiple: int = 16
    max_pixels: int = MOST_PIXELS

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"`max_pixels` must be at least 1, got {self.max_pixels}")


@dataclass(frozen=True)
class Writing:
    """What becomes of the maps behind the model, on any core.

    Attributes:
        finish: refiners that need only maps and picture, applied in order.
        background_score: see `camkit.to_mask`, as are the next two.
        background: "constant" or "power".
        ignore_below: pixels that lose to the background, yet score more than this, become 255.
        masks: write palette PNGs.
        cams: how class maps are written. Those of Parquet keep the size the refiners return, the
            others have the size of the photo.
    """

    finish: tuple[Refiner, ...] = ()
    background_score: float = 0.55
    background: Literal["constant", "power"] = "constant"
    ignore_below: float | None = None
    masks: bool = True
    cams: CamOutput = "none"

    def __post_init__(self) -> None:
        if self.cams not in get_args(CamOutput):
            raise ValueError(f"`cams` must be one of {get_args(CamOutput)}, got {self.cams!r}")
        if not self.masks and self.cams == "none":
            raise ValueError("nothing would be written; ask for masks or for class maps")
        to_mask(  # refuses settings that cannot be used
            torch.zeros(1, 1, 1, 1),
            background_score=self.background_score,
            background=self.background,
            ignore_below=self.ignore_below,
        )


@dataclass(frozen=True)
class Recipe:
    """A bulk run: how images are read, what the model is asked, what is written.

    Attributes:
        model: opens the model, in the process that runs it; its repr is its settings.
        reading: how image files are read.
        writing: what happens behind the model.
        seed: where the first maps come from.
        edit: changes the forward.
        edit_blocks: which blocks, as in `camkit.attach`.
        refine: refiners that need the model's attention, applied in order where the model runs.
        vocabulary: names the classes, see `camkit.wrap`.
        labels: classes of every image, a `camkit.seeds.PredictedClasses`, or None for those
            that the source gives.
        batch: images of one size that go through the model at once.
        chunk: images that are planned together, and batched by size among themselves. Neither
            changes more than the rounding of the maps.
    """

    model: Callable[[], nn.Module]
    reading: Reading = field(default_factory=Reading)
    writing: Writing = field(default_factory=Writing)
    seed: Seed = field(default_factory=GradientSeed)
    edit: Edit | KeyEdit | None = None
    edit_blocks: int | tuple[int, ...] | None = 3
    refine: tuple[Refiner, ...] = DEFAULT_REFINE
    vocabulary: Vocabulary | None = None
    labels: tuple[int, ...] | PredictedClasses | None = None
    batch: int = 8
    chunk: int = 32

    def __post_init__(self) -> None:
        if self.batch < 1 or self.chunk < self.batch:
            raise ValueError(
                f"`batch` must be at least 1 and `chunk` no less, got {self.batch}, {self.chunk}"
            )

    def pipeline(self, model: nn.Module) -> Pipeline:
        """The pipeline around the opened model."""
        return wrap(
            model,
            seed=self.seed,
            edit=self.edit,
            edit_blocks=self.edit_blocks,
            refine=self.refine,
            background_score=0.5,  # `writing` draws the masks
            vocabulary=self.vocabulary,
        )

    def settings(self, model: nn.Module, source: object) -> dict[str, str]:
        """All that decides what the results look like, as text.

        Args:
            model: opened; its weights are told by their hash.
            source: where the images come from.
        """
        known = self.vocabulary and (self.vocabulary.names, self.vocabulary.members)
        return {
            "camkit": version("camkit"),
            "source": str(source),
            "model": repr(self.model),
            "weights_sha256": weights_hash(model),
            "classes": "outputs" if known is None else _digest(known),
            "labels": repr(self.labels),
            "reading": repr(self.reading),
            "seed": repr(self.seed),
            "edit": repr(self.edit),
            "edit_blocks": repr(self.edit_blocks),
            "refine": repr(self.refine),
            "writing": repr(self.writing),
        }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
