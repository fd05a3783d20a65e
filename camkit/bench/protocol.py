"""What a benchmark compares: variants, choices among them, repeats, and how photos are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from camkit.capture.record import scores_of
from camkit.edits.protocol import Edit, KeyEdit
from camkit.errors import CamkitError
from camkit.method import CALIBRATED, DEFAULT_REFINE
from camkit.photo import Photo, load_photo
from camkit.refiners.normalize import Normalize
from camkit.refiners.propagate import Propagate
from camkit.refiners.protocol import Refiner
from camkit.score import Best
from camkit.seeds.attention import ClassAttentionSeed, GradientSeed, RelevanceSeed
from camkit.seeds.pooled import ClassWeightSeed
from camkit.seeds.protocol import Seed
from camkit.seeds.targets import Activation, chances, check_chance
from camkit.seeds.views import Views
from camkit.vocabulary import Vocabulary


@dataclass(frozen=True)
class PredictedLabels:
    """The classes a classifier sees in the image; the score is lower than with true labels.

    Attributes:
        threshold: probability from which a class counts as present.
        activation: see `camkit.seeds.targets.Activation`.
    """

    threshold: float = 0.1
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        check_chance(self.threshold, self.activation)

    def __call__(self, model: nn.Module, photo: Photo, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Classes of the vocabulary that are present, from 0."""
        with torch.no_grad():
            output: Any = model(photo.pixels.to(next(model.parameters())))
        scores = scores_of(output)
        if scores is None:
            raise CamkitError("labels cannot be predicted: the model returns no class scores")
        present = chances(vocabulary.score(scores.float()), scores.float(), self.activation)[0]
        found: list[int] = (present >= self.threshold).nonzero().flatten().tolist()
        return tuple(found)


@dataclass(frozen=True)
class PhotoSettings:
    """How photos are read for the model; the settings are those of `camkit.load_photo`."""

    size: int | tuple[int, int] = 384
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    multiple: int = 16

    def load(self, path: Path) -> Photo:
        """Read one photo (`camkit.load_photo`)."""
        return load_photo(
            path, size=self.size, mean=self.mean, std=self.std, multiple=self.multiple
        )


@dataclass(frozen=True)
class Variant:
    """A seed and what refines it, in a forward that may be edited.

    Attributes:
        name: as it stands in the table.
        seed: where the maps come from.
        refine: refiners in order; none measures the seed alone.
        base: what the gain is measured against; none for a seed.
        edit: changes the forward the seed is read from.
        edit_blocks: how many of the last blocks it changes; None is all.
        controls: what a real gain must beat as well.
        views: other sizes and mirror images that the seed is read from as well.
    """

    name: str
    seed: Seed
    refine: tuple[Refiner, ...] = ()
    base: "Entry | None" = field(default=None, compare=False)
    edit: Edit | KeyEdit | None = None
    edit_blocks: int | tuple[int, ...] | None = 3
    controls: tuple["Entry", ...] = field(default=(), compare=False)
    views: Views | None = None

    @property
    def variants(self) -> tuple["Variant", ...]:
        """What is measured: itself alone."""
        return (self,)

    def reported(self, tuned: Mapping["Variant", Best]) -> tuple["Variant", ...]:
        """Which of the variants are measured on the reported split, given the tuning split."""
        del tuned
        return (self,)


@dataclass(frozen=True)
class _Several:
    """Several variants in one line of the table.

    Attributes:
        name: as it stands in the table.
        variants: at least two.
        base: what the gain is measured against.
        controls: what a real gain must beat as well.
    """

    name: str
    variants: tuple[Variant, ...]
    base: "Entry | None" = field(default=None, compare=False)
    controls: tuple["Entry", ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if len(set(self.variants)) < 2:
            raise ValueError(
                f"`variants` of {self.name!r} must hold at least two, got {len(set(self.variants))}"
            )


@dataclass(frozen=True)
class Choice(_Several):
    """One of several variants, picked on the tuning split: presets, steps, blocks.

    The first one where several are best.
    """

    def reported(self, tuned: Mapping[Variant, Best]) -> tuple[Variant, ...]:
        """The candidate with the highest mean IoU on the tuning split."""
        return (max(self.variants, key=lambda variant: tuned[variant].mean_iou),)


@dataclass(frozen=True)
class Repeats(_Several):
    """A variant with other random seeds: the mean is reported, and how far they lie apart.

    Each has its own background score. The interval of the gain pools them: confusion matrices are
    added over the repeats, image by image, so it tells of the images and not of the draw.
    """

    def reported(self, tuned: Mapping[Variant, Best]) -> tuple[Variant, ...]:
        """All of them."""
        del tuned
        return self.variants


Entry: TypeAlias = Variant | Choice | Repeats
"""A line of the table."""


def stages(variant: Variant) -> tuple[Variant, ...]:
    """A variant step by step: its seed, then one refiner more in each, based on the one before.

    >>> from camkit.refiners.normalize import Normalize
    >>> from camkit.seeds.attention import GradientSeed
    >>> [v.name for v in stages(Variant("gradient", GradientSeed(), (Normalize(),)))]
    ['gradient: seed', 'gradient']
    """
    found: list[Variant] = []
    for count in range(len(variant.refine) + 1):
        last = count == len(variant.refine)
        step = "seed" if count == 0 else type(variant.refine[count - 1]).__name__
        found.append(
            Variant(
                variant.name if last else f"{variant.name}: {step}",
                variant.seed,
                variant.refine[:count],
                found[-1] if found else variant.base,
                variant.edit,
                variant.edit_blocks,
                variant.controls if last else (),
                variant.views,
            )
        )
    return tuple(found)


def check_entries(entries: tuple[Entry, ...]) -> None:
    """Refuse a table without lines, of two lines of one name, or that lacks what it compares to.

    Raises:
        ValueError: saying which line is at fault.
    """
    if not entries:
        raise ValueError("`variants` must hold at least one variant, got none")
    names = [entry.name for entry in entries]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"`variants` must have names of their own, got twice: {doubled}")
    lost = [
        f"{other.name} (for {entry.name})"
        for entry in entries
        for other in (*([] if entry.base is None else [entry.base]), *entry.controls)
        if other not in entries
    ]
    if lost:
        raise ValueError(
            "`variants` must hold the `base` and the `controls` of each, but lacks "
            f"{', '.join(lost)}"
        )


SEEDS: dict[str, Seed] = {
    "class attention": ClassAttentionSeed(),
    "class weight": ClassWeightSeed(),
    "gradient": GradientSeed(),
    "rollout": RelevanceSeed(),
}


def standard_variants(*, calibrated: bool = True) -> tuple[Variant, ...]:
    """Each seed alone, and after plain and balanced propagation.

    Args:
        calibrated: with the default of `camkit.wrap` as the last seed; a model may not bear it.
    """
    minmax = Normalize(mode="minmax")
    chains = {
        "propagation": (Propagate(steps=2, blocks=6), minmax),
        "balanced propagation": DEFAULT_REFINE,
    }
    bases = [Variant(name, seed) for name, seed in SEEDS.items()]
    if calibrated:
        preset = CALIBRATED
        bases.append(
            Variant("calibrated", preset.seed, edit=preset.edit, edit_blocks=preset.edit_blocks)
        )
    variants = []
    for base in bases:
        after = (
            replace(base, name=f"{base.name} + {name}", refine=chain, base=base)
            for name, chain in chains.items()
        )
        variants += [base, *after]
    return tuple(variants)
