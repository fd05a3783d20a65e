"""What holds of every refiner that reads the picture, and of the settings of all refiners."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from coarse import captured, coarse_iou
from timm.models import VisionTransformer
from tiny_segmenters import Planted, by_colour

import camkit
from camkit import CaptureError, DenseCRF, Propagate
from camkit.capture.record import required_by
from camkit.ops.confidence import (
    FuzzyMembership,
    MeanSplit,
    Otsu,
    TanhAroundMean,
    TopShare,
    TwoMeans,
)
from camkit.ops.mean_field import Kernels
from camkit.refiners import (
    Amplify,
    AtReducedSize,
    Blur,
    FastGlobalSmooth,
    GuidedFilter,
    HybridPropagate,
    Normalize,
    PixelAdaptive,
    PromptedRefine,
    RandomWalk,
    Regions,
    Segments,
    Superpixels,
    chain,
)
from camkit.segmenters import Peaks, SamRefinerPrompts

NAN, INF = math.nan, math.inf
CRF = DenseCRF(preset="clip_es", temperature=0.25, background_score=0.5)


def quarters(picture):
    """A label image of four segments."""
    rows, cols = (np.arange(side) * 2 // side for side in picture.shape[:2])
    return 2 * rows[:, None] + cols


REFINERS = {
    "DenseCRF": CRF,
    "GuidedFilter": GuidedFilter(radius=4),
    "GuidedFilter at half size": GuidedFilter(radius=2, scale=0.5),
    "FastGlobalSmooth": FastGlobalSmooth(),
    "Superpixels slic": Superpixels("slic", size=40, sigma=0.0),
    "Superpixels felzenszwalb": Superpixels("felzenszwalb", size=40, sigma=0.0),
    "Regions": Regions(Segments("felzenszwalb", (10, 40), least=10, sigma=0.0)),
    "Regions cut": Regions(Segments("slic", (40, 80)), overlap="cut"),
    "PixelAdaptive": PixelAdaptive(steps=10),
    "AtReducedSize": AtReducedSize(FastGlobalSmooth()),
    "PromptedRefine": PromptedRefine(Planted(by_colour), min_agreement=0.0),
}
every_refiner = pytest.mark.parametrize("name", REFINERS)


def stripes(images=1):
    """Pictures of 20 x 30 pixels in three colours, with a little noise."""
    rgb = torch.zeros(images, 3, 20, 30)
    for channel in range(3):
        rgb[:, channel, :, 10 * channel : 10 * channel + 10] = 0.8
    return (rgb + 0.1 * torch.rand_like(rgb)).clamp(0, 1)


@every_refiner
@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.usefixtures("no_shape_checks")
def test_a_capture_of_another_batch_is_an_error(name, pictures):
    words = f"needs a picture for each image in `cam`, got {pictures} for 2"
    with pytest.raises(ValueError, match=words):
        REFINERS[name](torch.rand(2, 1, 5, 6), captured(stripes(pictures)))


@every_refiner
def test_a_missing_picture_is_an_error(name):
    words = rf"^{type(REFINERS[name]).__name__} needs the picture; watch with `rgb=photo\.rgb`"
    with pytest.raises(CaptureError, match=words):
        REFINERS[name](torch.rand(2, 1, 2, 3), captured(None))


# of the public ones, each path through their code; the picture has 32 x 32 pixels, the grid 2 x 2
ALL = [
    *(Normalize(mode, epsilon) for mode in ("max", "minmax") for epsilon in (0.0, 1e-5)),
    *(Amplify(rule=rule) for rule in (TanhAroundMean(), MeanSplit(), TwoMeans())),
    *(Amplify(rule=rule) for rule in (TopShare(), Otsu(), FuzzyMembership())),
    Blur(),
    Propagate(),
    Propagate(balance=3, boxes=0.4),
    Propagate(scale_rows=False),
    HybridPropagate(),
    RandomWalk(),
    RandomWalk(boxes=0.4, box_rule="clip-es"),
    CRF,
    GuidedFilter(),
    FastGlobalSmooth(),
    PixelAdaptive(steps=1),
    Superpixels("slic"),
    Superpixels("felzenszwalb", vote=0.5),
    Regions(quarters),
    Regions(quarters, rule="vote", overlap="cut"),
    Regions(quarters, rule="sepl"),
    AtReducedSize(GuidedFilter()),
    AtReducedSize(PixelAdaptive(steps=1), scale=1.0),
    PromptedRefine(Planted(by_colour), min_agreement=0.0),
    chain(Normalize(), Blur()),
]
all_refiners = pytest.mark.parametrize("refiner", ALL, ids=repr)


@cache
def seen_by_a_model(images):
    model = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    pixels = torch.rand(images, 3, 32, 32)
    requires = required_by(*ALL)
    with camkit.watch(model.eval(), requires=requires, rgb=pixels) as seen, torch.no_grad():
        model(pixels)
    return seen.capture


def test_all_public_refiners_are_listed():
    public = {
        name
        for name, value in vars(camkit.refiners).items()
        if hasattr(value, "requires") and isinstance(value, type)
    }
    assert {type(refiner).__name__ for refiner in ALL} == public


@pytest.mark.parametrize(
    ("value", "kind"), [(NAN, "NaN"), (INF, "infinity"), (-INF, "infinity")], ids=str
)
@all_refiners
def test_maps_that_are_not_finite_are_refused(refiner, value, kind):
    cam = torch.rand(2, 3, 2, 2)
    cam[1, 2, 0, 1] = value
    words = rf"`cam` must be finite, got {kind} in image 1, map 2 \(1 of 24 values\)"
    with pytest.raises(ValueError, match=words):
        refiner(cam, seen_by_a_model(2))


@all_refiners
def test_no_classes_come_back_as_none(refiner):
    some, none = (refiner(torch.rand(2, k, 2, 2), seen_by_a_model(2)) for k in (1, 0))
    assert none.shape == (2, 0, *some.shape[2:])
    assert none.dtype == some.dtype


@every_refiner
@pytest.mark.parametrize("shape", [(0, 2, 2, 3), (2, 0, 2, 3)], ids=["images", "classes"])
def test_no_images_or_no_classes_come_back_as_none(name, shape):
    refined = REFINERS[name](torch.rand(shape), captured(stripes(shape[0])))
    assert refined.shape == (*shape[:2], 20, 30)


@every_refiner
def test_a_map_from_the_grid_comes_back_at_the_size_of_the_picture_within_its_range(name):
    cam = torch.rand(2, 3, 2, 3)
    refined = REFINERS[name](cam, captured(stripes(2)))
    assert refined.shape == (2, 3, 20, 30)
    assert refined.dtype == torch.float32
    assert refined.min() >= 0
    assert refined.max() <= 1 + 1e-5


@every_refiner
def test_images_and_classes_do_not_mix(name):
    """In the CRF, and for prompts, classes compete, but their order does not count."""
    refiner, cam, rgb = REFINERS[name], torch.rand(3, 3, 2, 3), stripes(3)
    refined, order = refiner(cam, captured(rgb)), [2, 0, 1]
    torch.testing.assert_close(refiner(cam[:, order], captured(rgb)), refined[:, order])
    for image in range(3):
        single = refiner(cam[image : image + 1], captured(rgb[image : image + 1]))
        torch.testing.assert_close(refined[image], single[0])
        if name not in ("DenseCRF", "PromptedRefine"):
            first = refiner(cam[image : image + 1, :1], captured(rgb[image : image + 1]))
            torch.testing.assert_close(refined[image, :1], first[0])


@every_refiner
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_end(name, dtype):
    cam, capture = torch.rand(1, 2, 2, 3).to(dtype), captured(stripes())
    refined = REFINERS[name](cam, capture)
    assert refined.dtype == dtype
    torch.testing.assert_close(refined, REFINERS[name](cam.float(), capture).to(dtype))


@every_refiner
def test_a_map_that_misses_an_edge_is_drawn_to_it(name):
    left = torch.zeros(1, 1, 40, 60)
    left[..., :30] = 1.0
    off = left.clone()
    off[..., 30:32] = 1.0  # two columns too wide
    rgb = torch.cat([0.8 * left, 0.5 * left, 1 - left], 1)
    assert torch.equal(REFINERS[name](off, captured(rgb)) > 0.5, left > 0.5)


@pytest.mark.parametrize(
    "refiner",
    [
        GuidedFilter(radius=2, eps=1e-2, scale=1.0),
        PixelAdaptive(steps=2),
        Superpixels("slic"),
        Regions(quarters),
        Regions(quarters, overlap="rank"),
    ],
    ids=repr,
)
def test_a_gradient_reaches_the_maps_through_the_refiner(refiner):
    cam = torch.rand(1, 2, 2, 3, requires_grad=True)
    refiner(cam, captured(torch.rand(1, 3, 20, 30))).sum().backward()
    torch.testing.assert_close(cam.grad.sum(), torch.tensor(1200.0), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    "refiner",
    [
        CRF,
        GuidedFilter(radius=16, scale=1.0),
        GuidedFilter(radius=4, scale=0.25),
        FastGlobalSmooth(smoothness=1000.0, colour_width=4 / 255),
        Superpixels("slic", size=400, coherence=10.0),
        Superpixels("felzenszwalb"),
        Regions("felzenszwalb"),
        AtReducedSize(CRF, scale=0.5),
    ],
    ids=repr,
)
def test_on_photos_objects_known_to_the_patch_are_found_better(real_data, refiner):
    assert coarse_iou(refiner, real_data) > coarse_iou(None, real_data) + 0.015


def test_on_photos_a_crf_of_a_reduced_picture_finds_objects_as_well(real_data):
    half = coarse_iou(AtReducedSize(CRF, scale=0.5), real_data)
    assert half > coarse_iou(CRF, real_data) - 0.01


def reduced(**settings):
    return AtReducedSize(CRF, **settings)


def prompted(**settings):
    return PromptedRefine(Planted(by_colour), **settings)


REFUSED = [
    (DenseCRF, "preset", ["deeplab"], "must be one of clip_es, psa, irn, .*, convcrf, got"),
    (DenseCRF, "preset", [Kernels(3, 3, 80, 0, 10)], "`bilateral_srgb` must be above 0 .*, got 0"),
    (DenseCRF, "preset", [Kernels(3, -1, 80, 13, 10)], "`gauss_weight` must be at least 0 .* -1"),
    (DenseCRF, "backend", ["cuda"], "must be one of auto, native, torch, pydensecrf, got 'cuda'"),
    (DenseCRF, "steps", [0], "must be at least 1, got {}"),
    (DenseCRF, "background_score", [0.0, 1.0, NAN], r"must lie in \(0, 1\), got {}"),
    (DenseCRF, "temperature", [0.0, NAN], "must be above 0, got {}"),
    (GuidedFilter, "radius", [0, NAN], "must be at least 1 pixel, got {}"),
    (GuidedFilter, "eps", [0.0, NAN], "must be positive and finite, got {}"),
    (GuidedFilter, "scale", [0.0, 1.5, NAN], r"must lie in \(0, 1\], got {}"),
    (FastGlobalSmooth, "smoothness", [0.0, 1e6, NAN], r"must lie in \(0, 100000\], got {}"),
    (FastGlobalSmooth, "colour_width", [0.0, INF], "must be positive and finite, got {}"),
    (Superpixels, "method", ["quickshift"], "must be one of slic, felzenszwalb, got 'quickshift'"),
    (Superpixels, "size", [0], "must be at least 1 pixel, got {}"),
    (Superpixels, "coherence", [0.0, NAN], "must be positive and finite, got {}"),
    (Superpixels, "sigma", [-1.0, NAN], "must be at least 0 and finite, got {}"),
    (Superpixels, "vote", [0.0, 1.0], r"must lie in \(0, 1\), got {}"),
    (Regions, "proposals", ["quickshift"], "must be one of slic, felzenszwalb, got 'quickshift'"),
    (Regions, "rule", ["median"], "must be one of mean, vote, sepl, got 'median'"),
    (Regions, "overlap", ["max"], "must be mean, cut, rank or None, got 'max'"),
    (Regions, "background_score", [0.0, 1.0, NAN], r"must lie in \(0, 1\), got {}"),
    (Regions, "largest", [0.0, 1.1, NAN], r"must lie in \(0, 1\], got {}"),
    (Segments, "method", ["quickshift"], "must be one of slic, felzenszwalb, got 'quickshift'"),
    (Segments, "scales", [(0.0,)], "must be positive and finite, got 0.0"),
    (Segments, "least", [0], "must be at least 1 pixel, got {}"),
    (Segments, "compactness", [0.0, INF], "must be positive and finite, got {}"),
    (Segments, "sigma", [-1.0, NAN], "must be at least 0 and finite, got {}"),
    (PixelAdaptive, "steps", [0, NAN], "must be at least 1, got {}"),
    (PixelAdaptive, "dilations", [()], "must name at least one distance, got none"),
    (PixelAdaptive, "dilations", [(1, 0)], r"must be at least 1 each, got \(1, 0\)"),
    (PixelAdaptive, "dilations", [(NAN,)], r"must be at least 1 each, got \(nan,\)"),
    (PixelAdaptive, "colour_width", [0.0, NAN, INF], "must be positive and finite, got {}"),
    (PixelAdaptive, "position_weight", [-0.1, NAN], "must be .*, got {}"),
    (PixelAdaptive, "scale", [0.0, NAN], "must be positive and finite, got {}"),
    (PixelAdaptive, "size", [(0, 4)], "must be at least 1x1, got 0x4"),
    (reduced, "scale", [0.0, 2.0, NAN], r"must lie in \(0, 1\], got {}"),
    (reduced, "radius", [0], "must be at least 1 pixel, got {}"),
    (reduced, "eps", [0.0], "must be positive and finite, got {}"),
    (prompted, "rounds", [0], "must be at least 1, got {}"),
    (prompted, "background_score", [-0.1, 1.0, NAN], r"must lie in \[0, 1\), got {}"),
    (prompted, "mix", [-0.1, 1.1, NAN], r"must lie in \[0, 1\], got {}"),
    (prompted, "min_area", [1.1], r"must lie in \[0, 1\], got {}"),
    (prompted, "max_area", [1.1], r"must lie in \[0, 1\], got {}"),
    (prompted, "min_agreement", [-1.0], r"must lie in \[0, 1\], got {}"),
    (prompted, "cache", [-1], "must be at least 0 photos, got {}"),
    (prompted, "choose", ["iou"], "must be one of both, predicted, agreement, got {!r}"),
    (prompted, "contested", ["first"], "must be one of region, pixel, got {!r}"),
    (Peaks, "top", [0.0, 1.1, NAN], r"must lie in \(0, 1\], got {}"),
    (SamRefinerPrompts, "margin", [-0.1, 1.0, NAN], r"must lie in \[0, 1\), got {}"),
    (SamRefinerPrompts, "gamma", [0.0, INF, NAN], "must be positive and finite, got {}"),
    (SamRefinerPrompts, "strength", [0.0, INF, NAN], "must be positive and finite, got {}"),
    (RandomWalk, "beta", [0.0, NAN], "must be positive and finite, got {}"),
    (RandomWalk, "logt", [-1], r"must lie in \[0, 20\], got {}"),
    (RandomWalk, "logt", [64], r"must lie in \[0, 20\], got 64: 2\^logt steps are taken"),
    (RandomWalk, "blocks", [0], "must be at least 1, got {}"),
    (RandomWalk, "balance", [-1], "must be at least 0, got {}"),
    (RandomWalk, "boxes", [1.0, NAN], r"must lie in \[0, 1\), got {}"),
    (Normalize, "epsilon", [-1e-5, INF, NAN], "must be at least 0 and finite, got {}"),
    (Propagate, "steps", [0], "must be at least 1, got {}"),
    (Propagate, "blocks", [0], "must be at least 1, got {}"),
    (Propagate, "mix", [1.5, NAN], r"must lie in \[0, 1\], got {}"),
    (RandomWalk, "box_rule", ["wide"], 'must be "whole" or "clip-es", got {!r}'),
    (Propagate, "box_rule", ["wide"], 'must be "whole" or "clip-es", got {!r}'),
    (Propagate, "boxes", [1.0, NAN], r"must lie in \[0, 1\), got {}"),
]


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("refiner", "setting", "value", "words"),
    [(refiner, name, value, words) for refiner, name, values, words in REFUSED for value in values],
)
def test_settings_out_of_range_are_refused(refiner, setting, value, words):
    if not isinstance(value, Kernels):  # whose own fields are named
        words = f"`{setting}` {words}"
    with pytest.raises(ValueError, match=words.format(value)):
        refiner(**{setting: value})


@pytest.mark.usefixtures("no_shape_checks")
def test_a_scale_and_a_size_are_not_given_together():
    with pytest.raises(ValueError, match=r"give `scale` or `size`, got 0.5 and \(4, 4\)"):
        PixelAdaptive(size=(4, 4), scale=0.5)
