"""What a benchmark compares: variants, choices among them, and repeats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import nn

from camkit.method import (
    CALIBRATED,
    DEFAULT_REFINE,
    WITHOUT_EDGES,
    Method,
    origin_of,
    with_readout,
)
from camkit.readout import Readout
from camkit.refiners.normalize import Normalize
from camkit.refiners.propagate import Propagate
from camkit.score import Best
from camkit.seeds.attention import ClassAttentionSeed, GradientSeed, RelevanceSeed
from camkit.seeds.pooled import ClassWeightSeed


@dataclass(frozen=True)
class Variant:
    """One method in the table; its background score is picked on the tuning split.

    Attributes:
        name: name of the row.
        method: what is measured; without refiners, its seed alone.
        base: entry to compute the gain over; None for a row without one.
        controls: entries that a real gain must exceed as well.
    """

    name: str
    method: Method
    base: "Entry | None" = field(default=None, compare=False)
    controls: tuple["Entry", ...] = field(default=(), compare=False)

    @property
    def variants(self) -> tuple["Variant", ...]:
        """The variants measured for this row: itself."""
        return (self,)

    def reported(self, tuned: Mapping["Variant", Best]) -> tuple["Variant", ...]:
        """Return the variants to measure on the reported split, given the tuning split."""
        del tuned
        return (self,)


@dataclass(frozen=True)
class _Several:
    """A row of at least two variants; other attributes as in `Variant`."""

    name: str
    variants: tuple[Variant, ...]
    base: "Entry | None" = field(default=None, compare=False)
    controls: tuple["Entry", ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        count = len(set(self.variants))
        if count < 2:
            raise ValueError(f"`variants` of {self.name!r} must hold at least two, got {count}")


@dataclass(frozen=True)
class Choice(_Several):
    """The best of several variants on the tuning split: settings, steps, blocks.

    Of equally good variants the first is taken.
    """

    def reported(self, tuned: Mapping[Variant, Best]) -> tuple[Variant, ...]:
        """Return the candidate with the highest mean IoU on the tuning split."""
        return (max(self.variants, key=lambda variant: tuned[variant].mean_iou),)


@dataclass(frozen=True)
class Repeats(_Several):
    """One variant with several random seeds; the table shows the mean and the range.

    Each repeat has its own background score. The interval of the gain pools the repeats: their
    confusion matrices are added image by image, so it describes the images, not the random draw.
    """

    def reported(self, tuned: Mapping[Variant, Best]) -> tuple[Variant, ...]:
        """Return all repeats."""
        del tuned
        return self.variants


Entry: TypeAlias = Variant | Choice | Repeats
"""A row of the table."""


def stages(variant: Variant) -> tuple[Variant, ...]:
    """Return a variant step by step: its seed, then one refiner more each, based on the last step.

    >>> variant = Variant("gradient", Method(GradientSeed(), refine=(Normalize(),)))
    >>> [stage.name for stage in stages(variant)]
    ['gradient: seed', 'gradient']
    """
    steps: list[Variant] = []
    refine = variant.method.refine
    for count in range(len(refine)):
        name = "seed" if count == 0 else type(refine[count - 1]).__name__
        method = replace(variant.method, refine=refine[:count])
        steps.append(
            Variant(f"{variant.name}: {name}", method, base=steps[-1] if steps else variant.base)
        )
    return (*steps, replace(variant, base=steps[-1]) if steps else variant)


def fitted_variant(
    variants: Sequence[Variant], readout: Readout, model: nn.Module, name: str = "fitted"
) -> Variant:
    """Return the row of a read-out, based on the row whose first maps it was fitted on.

    A read-out is fitted over a data set, so its row does not compare with methods that read one
    photo; its name says so. Fit it on photos that are not reported.

    Args:
        variants: rows that it may have been fitted on; the last that fits is its base.
        readout: see `camkit.fit`.
        model: the measured one.
        name: of the row.

    Raises:
        ValueError: it was fitted on another model, or on the first maps of none of the rows.
    """
    refined = [each for each in reversed(variants) if each.method.refine]
    if not refined:
        raise ValueError("`variants` holds no row with refiners that a read-out can be based on")
    fits = [readout.origin.why_not(origin_of(each.method, model)) is None for each in refined]
    base = refined[fits.index(True) if any(fits) else 0]
    return Variant(f"{base.name}, {name}", with_readout([base.method], readout, model), base=base)


def check_entries(entries: tuple[Entry, ...]) -> None:
    """Check that a table has rows, unique names, and every base and control it refers to.

    Raises:
        ValueError: with the name of the row at fault.
    """
    if not entries:
        raise ValueError("`variants` must hold at least one variant, got none")
    names = [entry.name for entry in entries]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"`variants` must have unique names, got twice: {doubled}")
    missing = [
        f"{other.name} (for {entry.name})"
        for entry in entries
        for other in (entry.base, *entry.controls)
        if other is not None and other not in entries
    ]
    if missing:
        raise ValueError(
            "`variants` must hold the `base` and the `controls` of each, but lacks "
            f"{', '.join(missing)}"
        )


def standard_variants(*, calibrated: bool = True) -> tuple[Variant, ...]:
    """Return standard seeds, each alone and after plain and balanced propagation.

    Args:
        calibrated: add the preset `CALIBRATED`, which not every model supports: the row "hybrid",
            and "default", which is all of it.
    """
    methods = {
        "class attention": Method(ClassAttentionSeed()),
        "class weight": Method(ClassWeightSeed()),
        "gradient": Method(GradientSeed()),
        "relevance": Method(RelevanceSeed()),
    }
    if calibrated:
        methods["hybrid"] = CALIBRATED.method
    chains = {
        "propagation": (Propagate(steps=2, blocks=6), Normalize(mode="minmax")),
        "balanced propagation": WITHOUT_EDGES,
    }
    variants = []
    for name, method in methods.items():
        base = Variant(name, replace(method, refine=()))
        variants.append(base)
        for step, chain in chains.items():
            variants.append(Variant(f"{name} + {step}", replace(method, refine=chain), base=base))
    if calibrated:
        method = replace(CALIBRATED.method, refine=DEFAULT_REFINE)
        variants.append(Variant("default", method, base=variants[-1]))
    return tuple(variants)
