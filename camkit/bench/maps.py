"""The class maps of many variants of one photo: one forward for each edit, shared stages once."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn

from camkit.bench.protocol import Variant
from camkit.capture.record import Capture
from camkit.photo import Photo
from camkit.refine.normalize import normalize_cam
from camkit.refine.protocol import Refiner
from camkit.seed.looking.look import Look
from camkit.seed.looking.looked import Looked, Reading
from camkit.seed.looking.views import Views
from camkit.seed.needs import TokenSeed
from camkit.tensors import RGB, Cam, Pixels
from camkit.vocabulary import Vocabulary

Start: TypeAlias = tuple[Reading, Views]
Stages: TypeAlias = dict[tuple[Start, tuple[Refiner, ...]], Cam]


def variant_maps(
    model: nn.Module,
    photo: Photo,
    classes: Int[Tensor, "1 k"],
    variants: Sequence[Variant],
    vocabulary: Vocabulary,
) -> dict[Variant, Cam]:
    """Maps of the asked classes by every variant, in the sizes their last refiners return."""
    forwards: dict[Any, list[Variant]] = {}
    for variant in variants:
        blocks = None if variant.edit is None else variant.edit_blocks
        noise = variant.seed.tokens.noise if isinstance(variant.seed, TokenSeed) else None
        forwards.setdefault((variant.edit, blocks, noise), []).append(variant)
    maps: dict[Variant, Cam] = {}
    with torch.no_grad():
        for group in forwards.values():
            maps |= _group_maps(model, photo, classes, group, vocabulary)
    return maps


def _group_maps(
    model: nn.Module,
    photo: Photo,
    classes: Int[Tensor, "1 k"],
    variants: Sequence[Variant],
    vocabulary: Vocabulary,
) -> dict[Variant, Cam]:
    """Maps of variants that share an edit and noise: one forward for each of their views."""
    weight = next(model.parameters())
    pixels, rgb = photo.pixels.to(weight), photo.rgb.to(weight.device)
    look = Look(
        model,
        seeds=tuple(variant.seed for variant in variants),
        edit=variants[0].edit,
        edit_blocks=variants[0].edit_blocks,
        vocabulary=vocabulary,
    )
    capture = _capture(look, pixels, rgb)
    starts = {variant: (variant.seed, variant.views or Views()) for variant in variants}
    looked = Looked(look, pixels, rgb, capture)
    seeds = looked.seeds(classes.to(weight.device), list(starts.values()))
    known: Stages = {(start, ()): normalize_cam(cam) for start, cam in seeds.items()}
    return {
        variant: _stage(starts[variant], variant.refine, capture, known) for variant in variants
    }


def _capture(look: Look, pixels: Pixels, rgb: RGB) -> Capture:
    """The forward that all refiners of a group see."""
    return look(pixels, rgb)


def _stage(start: Start, refine: tuple[Refiner, ...], capture: Capture, known: Stages) -> Cam:
    """Maps after some refiners; what variants share is computed once."""
    if (start, refine) not in known:
        before = _stage(start, refine[:-1], capture, known)
        known[start, refine] = refine[-1](before, capture)
    return known[start, refine]
