"""Views: how often the model runs, and that joined maps are those of the views."""

import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from hosts import HandMade, OneTokenPerClass, shaken, tiny
from optional import transformers

import camkit
from camkit import GradientSeed, Vocabulary
from camkit.bench import Variant
from camkit.bench.evaluator import variant_maps
from camkit.capture.record import SmoothGrad
from camkit.edits import ScaleOutput
from camkit.photo import Photo
from camkit.seeds import (
    ClassAttentionSeed,
    ClassWeightSeed,
    ModelRunner,
    MultiViewReader,
    RelevanceSeed,
    Views,
    views,
)
from camkit.seeds.token_gradients import GradCAMSeed

CLASSES = torch.tensor([[1, 4], [3, -1]])
SEED = GradientSeed()


@pytest.fixture
def model():
    return tiny("vit", depth=2)[0]


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 64, 96)


def alone(model, pixels, classes=CLASSES, seed=SEED, **options):
    """The seed of one view, by the public call."""
    with camkit.watch(model, requires=seed.requires, **options) as seen, torch.no_grad():
        model(pixels)
    return seed(seen.capture, classes).float()


def by_hand(model, pixels, size, *, mirrored=False, seed=SEED):
    """The map of one view, brought back to the 4x6 grid, by torch alone."""
    seen = pixels.flip(-1) if mirrored else pixels
    if size != (64, 96):
        shrinks = size[0] < 64 or size[1] < 96
        seen = F.interpolate(seen, size, mode="bilinear", align_corners=False, antialias=shrinks)
    cam = alone(model, seen, seed=seed)
    grows = cam.shape[-1] > 6 or cam.shape[-2] > 4
    cam = F.interpolate(cam, (4, 6), mode="bilinear", align_corners=False, antialias=grows)
    return cam.flip(-1) if mirrored else cam


def joined(model, pixels, chosen, classes=CLASSES, seed=SEED, **options):
    runner = ModelRunner(model, seed.requires, **options)
    with torch.no_grad():
        reader = MultiViewReader(runner, pixels, None, runner(pixels))
        return reader.seeds(classes, [(seed, chosen)])[seed, chosen]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_one_view_is_the_seed_itself(model, pixels):
    assert torch.equal(joined(model, pixels, Views()), alone(model, pixels))


@pytest.mark.parametrize("seed", [SEED, ClassWeightSeed(), ClassAttentionSeed()], ids=repr)
def test_the_sum_of_scales_and_mirror_images_is_that_of_the_views_alone(model, pixels, seed):
    chosen = Views(scales=(0.5, 1.0, 1.5), flip=True)
    parts = [
        by_hand(model, pixels, size, mirrored=mirrored, seed=seed)
        for size in [(64, 96), (32, 48), (96, 144)]
        for mirrored in (False, True)
    ]
    close(joined(model, pixels, chosen, seed=seed), torch.stack(parts).sum(0))


def test_mirror_images_may_be_joined_otherwise_than_scales(model, pixels):
    """ToCo: the larger of a map and its mirrored twin, summed over scales."""
    chosen = Views(scales=(1.0, 0.5), flip=True, join_flip="max")
    parts = [
        torch.maximum(by_hand(model, pixels, size), by_hand(model, pixels, size, mirrored=True))
        for size in [(64, 96), (32, 48)]
    ]
    close(joined(model, pixels, chosen), parts[0] + parts[1])


def test_views_scaled_to_their_maximum_count_alike(model, pixels):
    chosen = Views(scales=(1.0, 0.5), join="max", normalize="before")
    parts = [by_hand(model, pixels, size) for size in [(64, 96), (32, 48)]]
    tops = [part.amax((-2, -1), keepdim=True).clamp_min(1e-12) for part in parts]
    close(joined(model, pixels, chosen), torch.maximum(parts[0] / tops[0], parts[1] / tops[1]))


def test_pixels_that_shrink_are_sampled_if_told(model, pixels):
    chosen = Views(scales=(1.0, 0.5), antialias=False)
    small = F.interpolate(pixels, (32, 48), mode="bilinear", align_corners=False)
    grown = F.interpolate(alone(model, small), (4, 6), mode="bilinear", align_corners=False)
    close(joined(model, pixels, chosen), alone(model, pixels) + grown)
    smooth = joined(model, pixels, Views(scales=(1.0, 0.5)))
    assert (joined(model, pixels, chosen) - smooth).abs().max() > 1e-4


def test_one_view_at_image_size_is_the_seed_resized(model, pixels):
    found = joined(model, pixels, Views(join_at="image"))
    assert torch.equal(found, camkit.resize_cam(alone(model, pixels), (64, 96)))


def test_tiles_are_joined_at_image_size_too(model, pixels):
    tiles, plain = (joined(model, pixels, Views(tiles=t)) for t in (2, 1))
    found = joined(model, pixels, Views(tiles=2, join_at="image"))
    close(found, camkit.resize_cam(plain, (64, 96)) + camkit.resize_cam(tiles - plain, (64, 96)))


def test_negative_scores_count_as_zero_behind_the_resizing(model, pixels):
    middle = alone(model, pixels)[0].median()

    def signed(capture, classes):
        return SEED(capture, classes) - middle

    signed.requires = SEED.requires
    for size in ("grid", "image"):
        found = joined(model, pixels, Views(join_at=size), seed=signed)
        plain = joined(model, pixels, Views(join_at=size))
        close(found, (plain - middle).clamp_min(0))
        assert 0 < (found == 0).float().mean() < 1


def test_views_in_pairs_are_views_one_by_one(model, pixels):
    settings = {"scales": (1.0, 0.5, 1.25), "flip": True}
    one, pair = (joined(model, pixels, Views(**settings, paired=p)) for p in (False, True))
    close(pair, one)


def test_a_mirrored_photo_gives_mirrored_maps_when_mirror_images_are_joined(model, pixels):
    chosen = Views(scales=(1.0, 0.5), flip=True)
    plain, turned = joined(model, pixels, chosen), joined(model, pixels.flip(-1), chosen)
    close(turned, plain.flip(-1))
    single = joined(model, pixels, Views()) - joined(model, pixels.flip(-1), Views()).flip(-1)
    assert single.abs().max() > 1e-4  # which the seed alone does not


def test_tiles_are_maps_of_crops_side_by_side(model, pixels):
    chosen = Views(tiles=2)
    crops = [
        [alone(model, pixels[..., top : top + 32, left : left + 48]) for left in (0, 48)]
        for top in (0, 32)
    ]
    laid = torch.cat([torch.cat(row, -1) for row in crops], -2)
    close(joined(model, pixels, chosen), alone(model, pixels) + laid)


@pytest.mark.parametrize(("patches", "tiles"), [(7, 2), (6, 4), (2, 3), (5, 5), (1, 4)])
def test_tiles_cover_every_patch_once(patches, tiles):
    spans = views.tile_spans(patches, tiles)
    assert [p for a, b in spans for p in range(a, b)] == list(range(patches))
    lengths = [b - a for a, b in spans]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("scale", "expected"), [(0.5, (32, 48)), (0.75, (48, 80)), (1.3, (80, 128)), (0.01, (16, 16))]
)
def test_sizes_are_rounded_to_whole_patches(scale, expected):
    got = Views(scales=(1.0, scale)).sizes((64, 100), (16, 16))
    assert got == ((64, 100), expected)


def test_scales_that_round_to_one_size_count_once(model, pixels):
    close(joined(model, pixels, Views(scales=(1.0, 0.99, 1.02))), alone(model, pixels))
    twice = joined(model, pixels, Views(scales=(1.0, 0.5, 0.51)))
    close(twice, joined(model, pixels, Views(scales=(1.0, 0.5))))


def test_padding_stays_empty(model, pixels):
    found = joined(model, pixels, Views(scales=(1.0, 0.5), flip=True, tiles=2))
    assert not found[1, 1].any()
    assert found[1, 0].any()


def count_forwards(model):
    """Sizes of the batches that enter the model."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


def test_the_model_runs_once_for_each_view_of_several_variants(model):
    photo = Photo(torch.randn(1, 3, 64, 96), torch.rand(1, 3, 64, 96), (64, 96))
    both, wide = Views(scales=(1.0, 0.5), flip=True), Views(scales=(1.0, 0.5, 1.5))
    variants = [
        Variant("one", camkit.Method(SEED, refine=())),
        Variant("two", camkit.Method(ClassWeightSeed(), views=both, refine=())),
        Variant("three", camkit.Method(SEED, views=both, refine=())),
        Variant("four", camkit.Method(SEED, views=wide, refine=())),
    ]
    names = Vocabulary(tuple("abcde"))
    classes = torch.tensor([[1, 4]])
    variant_maps(model, photo, classes, variants, names)  # the anatomy is measured once
    seen = count_forwards(model)
    found = variant_maps(model, photo, classes, variants, names)
    assert sorted(seen) == sorted([(1, 3, 64, 96)] * 2 + [(1, 3, 32, 48)] * 2 + [(1, 3, 96, 144)])
    for variant in variants:
        single = variant_maps(model, photo, classes, [variant], names)[variant]
        close(found[variant], single)
    assert (found[variants[0]] - found[variants[2]]).abs().max() > 0.01


def test_a_view_is_let_go_before_the_next(model, pixels):
    alive, most = weakref.WeakSet(), []

    def counting(capture, classes):
        alive.add(capture)  # freed by its last reference, without a collection of cycles
        most.append(len(alive))
        return SEED(capture, classes)

    runner = ModelRunner(model, SEED.requires)
    chosen = Views(scales=(1.0, 0.5), flip=True)
    with torch.no_grad():
        reader = MultiViewReader(runner, pixels, None, runner(pixels))
        reader.seeds(CLASSES, [(counting, chosen)])
    assert len(most) == 4
    assert max(most) == 2  # the photo as it is given, and the view at hand


def test_wrap_joins_views_and_refiners_see_the_photo_as_it_is_given(model, pixels):
    captures = []

    def refiner(cam, capture):
        captures.append(capture)
        return cam

    chosen = Views(scales=(1.0, 0.5), flip=True)
    rgb = torch.rand(2, 3, 64, 96)
    pipeline = camkit.wrap(model, views=chosen, refine=[refiner])
    stages = pipeline.stages(pixels, rgb=rgb, classes=CLASSES)
    close(stages.seed, camkit.normalize_cam(joined(model, pixels, chosen)))
    (capture,) = captures
    assert capture is stages.capture
    assert torch.equal(capture.rgb, rgb)
    assert (capture.grid.rows, capture.grid.cols) == (4, 6)
    assert repr(chosen) in pipeline.settings["views"]


def test_an_edit_acts_in_every_view(model, pixels):
    chosen = Views(scales=(1.0, 0.5))
    with camkit.attach(model, ScaleOutput(2.0), blocks=2):
        expected = joined(model, pixels, chosen)
    close(joined(model, pixels, chosen, edit=ScaleOutput(2.0), edit_blocks=2), expected)
    assert (joined(model, pixels, chosen) - expected).abs().max() > 1e-3


def fixed_size():
    return shaken(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5))


def fixed_size_of_transformers():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=64, patch_size=16, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def notes_of(error):
    return getattr(error, "__notes__", [])


@pytest.mark.parametrize(
    ("build", "hint"),
    [
        (fixed_size, "or create the model with dynamic_img_size=True"),
        (
            fixed_size_of_transformers,
            "`call=lambda model, pixels: model(pixels, interpolate_pos_encoding=True)`",
        ),
    ],
)
def test_a_host_of_one_size_says_so(build, hint):
    with pytest.raises((AssertionError, ValueError)) as caught:
        joined(build(), torch.randn(2, 3, 64, 64), Views(scales=(1.0, 0.5)))
    (note,) = caught.value.__notes__
    assert "takes images of 64x64, the size it states, but not of 32x32" in note
    assert "camkit.load_photo(path, size=(64, 64))" in note
    assert hint in note


def raising(error):
    def hook(*_):
        raise error

    return hook


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(
    "error", [RuntimeError("its own"), torch.OutOfMemoryError("no memory")], ids=repr
)
def test_an_error_of_another_cause_has_no_note_on_the_size(side, error):
    host = fixed_size()
    host.patch_embed.register_forward_pre_hook(raising(error))
    with pytest.raises(type(error)) as caught:
        ModelRunner(host)(torch.randn(1, 3, side, side))
    assert notes_of(caught.value) == []


def test_an_error_of_a_model_of_any_size_has_no_note(model, pixels):
    model.head.register_forward_hook(raising(ValueError("its own")))
    with pytest.raises(ValueError, match="its own") as caught:
        ModelRunner(model)(pixels)
    assert notes_of(caught.value) == []


class WithText(HandMade):
    """Takes images and one word for each image."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(7, 24)
        self.sizes = []

    def forward(self, pixels, ids, *, rows):
        assert pixels.shape[-2] == rows
        self.sizes.append(tuple(pixels.shape))
        return self.head(self.tokens(pixels)[:, 0] + self.words(ids))


def call_with_text(model, pixels):
    ids = torch.full((len(pixels),), 3, device=pixels.device)
    return model(pixels, ids, rows=pixels.shape[-2])


@pytest.mark.parametrize(
    "seed", [SEED, RelevanceSeed(), GradCAMSeed(noise=SmoothGrad(2))], ids=repr
)
def test_a_model_with_a_second_input_is_called_by_the_users_function(seed):
    """The same model with the word built in, of images alone, gives the same maps."""
    host, pixels = WithText(), torch.randn(2, 3, 32, 48)
    chosen = Views(scales=(1.0, 0.5), flip=True, tiles=2, paired=True)
    classes = torch.tensor([[1, 4], [3, -1]])

    class Alone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.host = host

        def forward(self, pixels):
            return call_with_text(self.host, pixels)

    found = camkit.wrap(host, seed=seed, views=chosen, refine=[], call=call_with_text)
    asked = camkit.wrap(Alone(), seed=seed, views=chosen, refine=[])
    stages = found.stages(pixels, rgb=pixels, classes=classes)
    assert {(2, 3, 32, 48), (4, 3, 16, 24), (2, 3, 16, 24)} <= set(host.sizes)
    close(stages.cam, asked.stages(pixels, rgb=pixels, classes=classes).cam)
    assert stages.cam.any()


def test_a_class_with_its_own_token_is_joined_too():
    host, pixels = OneTokenPerClass(class_tokens=5), torch.randn(2, 3, 16, 24)
    seed, chosen = ClassAttentionSeed(), Views(flip=True)
    plain = alone(host, pixels, seed=seed)
    mirrored = alone(host, pixels.flip(-1), seed=seed).flip(-1)
    close(joined(host, pixels, chosen, seed=seed), plain + mirrored)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scales": (0.5, 2.0)}, r"positive and hold 1.0.*got \(0.5, 2.0\)"),
        ({"scales": (1.0, -1.0)}, "positive and hold 1.0"),
        ({"scales": ()}, "positive and hold 1.0"),
        ({"tiles": 0}, "at least 1, got 0"),
        ({"join": "mean"}, 'must be "sum" or "max".*got \'mean\''),
        ({"join_flip": "min"}, "'min'"),
        ({"normalize": "never"}, "got 'never'"),
        ({"join_at": "file"}, 'must be "grid" or "image", got \'file\''),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words, no_shape_checks):
    with pytest.raises(ValueError, match=words):
        Views(**settings)
