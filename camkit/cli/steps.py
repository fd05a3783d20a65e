"""Refiners as they are written on the command line: crf:clip_es or par:steps=15,scale=0.5."""

import re
from collections.abc import Sequence
from dataclasses import fields

from camkit.cli.spec import Kinds, read_spec, readable, refuse, shown_value
from camkit.refine import (
    Amplify,
    Blur,
    DenseCRF,
    FastGlobalSmooth,
    GuidedFilter,
    HybridAlign,
    Normalize,
    PixelAdaptive,
    Propagate,
    RandomWalk,
    Reduced,
    Refiner,
    Superpixels,
    chain,
)

STEPS: Kinds = {
    "crf": DenseCRF,
    "par": PixelAdaptive,
    "guided": GuidedFilter,
    "fgs": FastGlobalSmooth,
    "superpixels": Superpixels,
    "blur": Blur,
    "normalize": Normalize,
    "amplify": Amplify,
}
"""Those that need only class maps and photo."""

MODEL_STEPS: Kinds = {
    **STEPS,
    "propagate": Propagate,
    "align": HybridAlign,
    "walk": RandomWalk,
}
"""All of them; the last need the attention of a model."""

GRAMMAR = """A step is NAME[:SETTINGS], steps are joined by + or by --refine given again. Settings
stand between commas as key=value; the first may be the value alone of the refiner's
first setting: crf:clip_es is crf:preset=clip_es. Sizes and lists are joined by x:
size=240x320. reduced=0.5 on any step refines at half size (camkit.refine.Reduced)."""

_REDUCED = "reduced"


def read_steps(texts: Sequence[str], steps: Kinds = STEPS) -> Refiner:
    """Make the refiners that a command line asks for.

    Args:
        texts: each ``step`` or ``step+step``; see ``GRAMMAR``.
        steps: what may be named.

    Raises:
        ValueError: a name, a setting or a value is not one of those that exist.
    """
    # a plus within a number is followed by a digit
    parts = [one for text in texts for one in re.split(r"\+(?=\D)", text)]
    found = [read_step(one, steps) for one in parts]
    return found[0] if len(found) == 1 else chain(*found)


def read_step(text: str, steps: Kinds = STEPS) -> Refiner:
    """Make one refiner of ``name:settings``."""
    kind, given, others = read_spec(text, steps, "refiner")
    scale = others.pop(_REDUCED, None)
    if others:
        refuse(text, kind, others, "reduced=FLOAT")
    refiner: Refiner = kind(**given)
    if scale is None:
        return refiner
    try:
        share = float(scale.partition("=")[2])
    except ValueError as error:
        raise ValueError(f"{text}: reduced must be FLOAT, got {scale!r}") from error
    return Reduced(refiner, scale=share)


def steps_help(steps: Kinds = STEPS) -> str:
    """All steps with their settings and defaults, one a line."""
    lines = []
    for name, kind in steps.items():
        defaults = {one.name: one.default for one in fields(kind)}
        told = [f"{key}={shown_value(defaults[key])}" for key in readable(kind)]
        lines.append(f"  {name:<12} {' '.join(told)}")
    return "\n".join(lines)
