"""Confusion matrices of variants, image by image, at every background score."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from camkit.bench.labels import PredictedLabels
from camkit.bench.maps import variant_maps
from camkit.bench.protocol import PhotoSettings, Variant
from camkit.bench.store import Store, code_fingerprint, fingerprint
from camkit.data import DataSet, Sample, read_mask
from camkit.errors import DataError
from camkit.manifest import weights_hash
from camkit.ops.resampling import resize_cam
from camkit.photo import Photo, load_photo
from camkit.score import sweep_confusions
from camkit.tensors import Cam
from camkit.vocabulary import Vocabulary

IGNORE = 255
LabelSource = Literal["dataset"] | PredictedLabels


@dataclass(frozen=True)
class Picture:
    """A photo, its truth in the classes measured, and the classes its maps are made of."""

    photo: Photo
    truth: Int[Tensor, "H W"]
    asked: tuple[int, ...]


@dataclass(frozen=True)
class Meter:
    """Measures variants on images.

    Attributes:
        model: borrowed, in evaluation mode.
        dataset: where the images come from.
        vocabulary: the classes measured.
        photos: how photos are read.
        labels: where image-level labels come from.
        store: keeps what was measured; None measures anew.
    """

    model: nn.Module
    dataset: DataSet
    vocabulary: Vocabulary
    photos: PhotoSettings
    labels: LabelSource = "dataset"
    store: Store | None = None
    _known: dict[Variant | Literal["setup"], str | None] = field(default_factory=dict)

    def each(
        self, samples: Sequence[Sample], variants: Sequence[Variant], title: str, skipped: list[str]
    ) -> Iterator[tuple[str, dict[Variant, Int[Tensor, "s c c"]]]]:
        """Name and swept matrices of each image; those that cannot be used are listed instead."""
        done = 0
        for sample in tqdm(samples, desc=title, unit="image", delay=2, mininterval=0.5):
            try:
                found = self.measure(sample, variants)
            except DataError as error:  # that image is lost and listed; the others are not
                skipped.append(str(error))
                continue
            done += 1
            yield sample.name, found
        if not done:
            raise DataError(f"no usable image among {len(samples)} ({'; '.join(skipped[:3])})")

    def measure(
        self, sample: Sample, variants: Sequence[Variant]
    ) -> dict[Variant, Int[Tensor, "s c c"]]:
        """Matrices of one image by each variant.

        Raises:
            DataError: the photo or its mask cannot be used.
        """
        keys = {variant: self._key(sample, variant) for variant in variants}
        found = {variant: self._recall(key) for variant, key in keys.items()}
        missing = [variant for variant, known in found.items() if known is None]
        if missing:
            picture = self.load(sample)
            for variant, cam in self.maps(picture, missing).items():
                found[variant] = swept = self._sweep(picture, cam)
                self._remember(keys[variant], swept)
        return {variant: swept for variant, swept in found.items() if swept is not None}

    def load(self, sample: Sample) -> Picture:
        """Read one image.

        Raises:
            DataError: the photo or its mask cannot be used.
        """
        if sample.mask is None:
            raise DataError(f"{sample.photo} has no mask; a benchmark needs one")
        settings = self.photos
        photo = load_photo(
            sample.photo,
            size=settings.size,
            mean=settings.mean,
            std=settings.std,
            multiple=settings.multiple,
        )
        ids = read_mask(sample.mask, size=photo.size, num_classes=len(self.dataset.classes))
        truth = torch.where(ids == IGNORE, IGNORE, torch.zeros_like(ids))
        for index, name in enumerate(self.vocabulary.names):
            truth[ids == self.dataset.classes.index(name) + 1] = index + 1
        if self.labels == "dataset":
            present = [self.dataset.classes[index] for index in sample.classes]
            names = self.vocabulary.names
            asked = tuple(index for index, name in enumerate(names) if name in present)
        else:
            asked = self.labels(self.model, photo, self.vocabulary)
        return Picture(photo, truth, asked)

    def maps(self, picture: Picture, variants: Sequence[Variant]) -> dict[Variant, Cam]:
        """Maps at the size of the truth, in [0, 1]; one empty map where no class is asked."""
        if not picture.asked:
            return dict.fromkeys(variants, torch.zeros(1, 1, *picture.photo.size))
        classes = torch.tensor([picture.asked], dtype=torch.int64)
        found = variant_maps(self.model, picture.photo, classes, variants, self.vocabulary)
        size = picture.photo.size
        return {variant: resize_cam(found[variant], size).clamp(0, 1).cpu() for variant in variants}

    def _sweep(self, picture: Picture, cam: Cam) -> Int[Tensor, "s c c"]:
        classes = torch.tensor(picture.asked or (-1,), dtype=torch.int64)
        return sweep_confusions(
            cam[0], classes, picture.truth, num_classes=len(self.vocabulary) + 1
        )

    def _key(self, sample: Sample, variant: Variant) -> str | None:
        """Names all that a measurement depends on; None where that cannot be told."""
        if self.store is None or sample.mask is None:
            return None
        if "setup" not in self._known:
            self._known["setup"] = self._setup()
        if variant not in self._known:
            edit = None if variant.edit is None else (variant.edit, variant.edit_blocks)
            self._known[variant] = fingerprint((variant.seed, variant.refine, edit))
        setup, settings = self._known["setup"], self._known[variant]
        if setup is None or settings is None:
            return None
        try:
            photo = hashlib.sha256(sample.photo.read_bytes()).hexdigest()
            mask = hashlib.sha256(sample.mask.read_bytes()).hexdigest()
        except OSError:
            return None  # reading it for the measurement will say what is wrong
        parts = (setup, settings, photo, mask, sample.classes)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _setup(self) -> str | None:
        weight = next(self.model.parameters())
        return fingerprint(
            (
                *(code_fingerprint(), torch.__version__, weights_hash(self.model)),
                *(repr(self.model), str(weight.dtype), weight.device.type),
                *(self.vocabulary, self.photos, self.labels, self.dataset.classes),
            )
        )

    def _recall(self, key: str | None) -> Tensor | None:
        kept = None if key is None or self.store is None else self.store.get(key)
        if kept is None:
            return None
        side = len(self.vocabulary) + 1
        counts = np.frombuffer(zlib.decompress(kept), dtype=np.int64)
        return torch.from_numpy(counts.reshape(-1, side, side).copy())

    def _remember(self, key: str | None, swept: Tensor) -> None:
        if key is not None and self.store is not None:
            self.store.put(key, zlib.compress(swept.numpy().tobytes(), 1))
