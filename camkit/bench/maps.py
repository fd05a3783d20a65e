"""The class maps of many variants of one photo: one forward for each edit, shared stages once."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from camkit.bench.protocol import Variant
from camkit.capture.record import Capture
from camkit.capture.watcher import watch
from camkit.edit.handle import attach
from camkit.photo import Photo
from camkit.refine.normalize import normalize_cam
from camkit.refine.protocol import Refiner
from camkit.seed.protocol import Seed
from camkit.tensors import Cam
from camkit.vocabulary import Vocabulary

Stages = dict[tuple[Seed, tuple[Refiner, ...]], Cam]


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
        forwards.setdefault((variant.edit, blocks), []).append(variant)
    maps: dict[Variant, Cam] = {}
    for group in forwards.values():
        capture = _capture(model, photo, group, vocabulary)
        known: Stages = {}
        with torch.no_grad():
            asked = classes.to(next(model.parameters()).device)
            for variant in group:
                maps[variant] = _stage(variant.seed, variant.refine, capture, asked, known)
    return maps


def _capture(
    model: nn.Module, photo: Photo, variants: Sequence[Variant], vocabulary: Vocabulary
) -> Capture:
    """A forward under the edit that the variants share."""
    weight = next(model.parameters())
    pixels, rgb = photo.pixels.to(weight), photo.rgb.to(weight.device)
    edit, blocks = variants[0].edit, variants[0].edit_blocks
    gradients = any(variant.seed.gradients for variant in variants)
    seen = watch(model, gradients=gradients, rgb=rgb, vocabulary=vocabulary)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if edit is not None:
            stack.enter_context(attach(model, edit, blocks=blocks)).rgb = rgb
        stack.enter_context(seen)
        model(pixels)
    return seen.capture


def _stage(
    seed: Seed, refine: tuple[Refiner, ...], capture: Capture, classes: Tensor, known: Stages
) -> Cam:
    """Maps after some refiners; what variants share is computed once."""
    if (seed, refine) not in known:
        if refine:
            before = _stage(seed, refine[:-1], capture, classes, known)
            known[seed, refine] = refine[-1](before, capture)
        else:
            known[seed, refine] = normalize_cam(seed(capture, classes).float())
    return known[seed, refine]
