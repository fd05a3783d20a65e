"""The settings of a bulk run: frozen and picklable, the same for every engine."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from camkit import __version__
from camkit.errors import require
from camkit.fitting import GUESSES
from camkit.manifest import weights_hash
from camkit.mask import to_mask
from camkit.method import Method, with_readout
from camkit.photo import Photo, PhotoSettings, photo_from_array
from camkit.pipeline import Pipeline
from camkit.readout import Form, Readout
from camkit.refiners import Refiner
from camkit.refiners.prompted import segmenters_in
from camkit.seeds import FittedSeed, PredictedClasses
from camkit.seeds.views import ModelCall
from camkit.vocabulary import Vocabulary

CamOutput: TypeAlias = Literal["none", "both", "psa", "irn", "clip-es", "npz", "parquet"]
"""How class maps are written: not at all, as `camkit.data.write_cam` does, float16 npz, Parquet."""


@dataclass(frozen=True)
class Loading(PhotoSettings):
    """How image files are loaded.

    Attributes:
        max_pixels: larger images are refused, because a small file may unpack to fill the memory.
            The default is PIL's.
    """

    max_pixels: int = 89_478_485

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise ValueError(f"`max_pixels` must be at least 1, got {self.max_pixels}")

    def photo(
        self, levels: UInt8[np.ndarray, "H W c"], size: int | tuple[int, int] | None = None
    ) -> Photo:
        """Bring a picture to ``size``, or to the size of these settings, and normalise it."""
        return photo_from_array(
            levels,
            size=self.size if size is None else size,
            mean=self.mean,
            std=self.std,
            multiple=self.multiple,
            channels=self.channels,
        )


@dataclass(frozen=True)
class Writing:
    """What the workers do with the maps of the model, and which files they write.

    Attributes:
        finish: refiners that need only maps and picture, applied in order.
        background_score: of `camkit.to_mask`, as are the next two.
        background: "constant" or "power".
        ignore_below: background pixels with a class score above this become 255.
        masks: write palette PNGs.
        cams: how class maps are written. In Parquet they keep the size the refiners return, in
            other files they have the size of the photo.
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
            raise ValueError("nothing would be written; set `masks` or `cams`")
        if self.cams == "parquet":
            require("pyarrow", "class maps in Parquet need", "parquet")
        to_mask(  # refuses invalid settings
            torch.zeros(1, 1, 1, 1),
            background_score=self.background_score,
            background=self.background,
            ignore_below=self.ignore_below,
        )


Job: TypeAlias = Literal["fit", "maps"]
"""The pass of a bulk run: the sums of a read-out, or class maps and masks."""


@dataclass(frozen=True)
class Recipe:
    """A bulk run: model, method, how images are loaded, what is written.

    Attributes:
        model: opens the model, in the process that runs it; its repr identifies it in the settings.
        method: what runs where the model is; ``writing`` holds the refiners that follow, and the
            background score of the masks.
        loading: how image files are loaded.
        writing: what follows the model.
        vocabulary: names the classes, see `camkit.wrap`.
        labels: classes of every image, a `camkit.seeds.PredictedClasses`, or None for the labels of
            the source.
        call: calls a model that takes more than images, see `camkit.wrap`. Like ``model`` it must
            be picklable for a Ray cluster; the settings hold its name, not its code.
        batch: images of one size that go through the model together.
        chunk: images that are planned together and batched by size. ``batch`` and ``chunk`` change
            only the rounding of the maps.
        fit: fit a read-out of this form (`camkit.Readout`) over all images in a pass of its own,
            and read the maps of ``method`` by it.
        guesses: classes of images for which the source has no labels, in both passes. None makes
            them failures; with ``fit`` it is the `camkit.fitting.GUESSES` of `camkit.fit`.
    """

    model: Callable[[], nn.Module]
    method: Method = field(default_factory=Method)
    loading: Loading = field(default_factory=Loading)
    writing: Writing = field(default_factory=Writing)
    vocabulary: Vocabulary | None = None
    labels: tuple[int, ...] | PredictedClasses | None = None
    call: ModelCall | None = None
    batch: int = 8
    chunk: int = 32
    fit: Form | None = None
    guesses: PredictedClasses | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.chunk < self.batch:
            raise ValueError(
                f"`batch` must be at least 1 and `chunk` no less, got {self.batch}, {self.chunk}"
            )
        if self.fit is None:
            return
        if self.fit not in get_args(Form):
            raise ValueError(f"`fit` must be one of {get_args(Form)}, got {self.fit!r}")
        has_readout = isinstance(self.method.seed, FittedSeed)
        if has_readout or self.method.views is not None:
            what = "a read-out already" if has_readout else "views, and a read-out reads no views"
            raise ValueError(f"`fit` needs the method of the first maps, but this one has {what}")
        if self.guesses is None:
            object.__setattr__(self, "guesses", GUESSES)

    def pipeline(self, model: nn.Module) -> Pipeline:
        """Wrap the opened model."""
        return Pipeline(model, self.method, vocabulary=self.vocabulary, call=self.call)

    def read_by(self, readout: Readout, model: nn.Module) -> "Recipe":
        """Return the recipe of the maps that follow the fit.

        Raises:
            ValueError: the read-out was fitted on another model or with another method.
        """
        return replace(self, method=with_readout([self.method], readout, model), fit=None)

    def settings(self, model: nn.Module, source: object) -> dict[str, str]:
        """Return everything that determines the results, as text."""
        classes, method = "outputs", self.method
        if self.vocabulary is not None:
            names = self.vocabulary
            text = json.dumps((names.names, names.members, names.values, names.candidates))
            classes = hashlib.sha256(text.encode()).hexdigest()[:16]
        settings = {
            "camkit": __version__,
            "source": str(source),
            "model": repr(self.model),
            "weights_sha256": weights_hash(model),
            "classes": classes,
            "labels": repr(self.labels),
            "loading": repr(self.loading),
            "seed": repr(method.seed),
            "edit": repr(method.edit),
            "edit_blocks": repr(method.edit_blocks),
            "refine": repr(method.refine),
            "writing": repr(self.writing),
        }
        if self.call is not None:  # the repr of a function would hold an address
            settings["call"] = getattr(self.call, "__qualname__", repr(self.call))
        if self.fit is not None:
            settings["fit"] = f"{self.fit}, background_score={method.background_score}"
        if self.guesses is not None:
            settings["guesses"] = repr(self.guesses)
        segmenters = segmenters_in((method.seed, *method.refine, *self.writing.finish))
        if segmenters:
            settings["segmenters"] = "; ".join(segmenters)
        return settings if method.views is None else settings | {"views": repr(method.views)}
