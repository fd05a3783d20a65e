"""wrap(model): one call gives seed, maps and mask, and the model comes back as it was."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import state_of
from hosts import HandMade, shaken
from torch import nn

import camkit
from camkit import (
    CaptureError,
    GradientSeed,
    Propagate,
    UnsupportedModelError,
    Vocabulary,
    normalize_cam,
    photo_from_array,
    resize_cam,
    to_mask,
    watch,
    wrap,
)
from camkit.edits import ScaleOutput, StaticCalibration
from camkit.refiners import Normalize
from camkit.seeds import (
    AttentionRolloutSeed,
    ClassAttentionSeed,
    ClassWeightSeed,
    EigenCAMSeed,
    HybridAttentionSeed,
    RelevanceSeed,
    TokenCutSeed,
    Views,
)

NAMES = Vocabulary(("cat", "dog, hound", "horse", "cow", "sheep"))


def vit(outputs=5, **options):
    settings = {"depth": 3, "embed_dim": 48, "num_heads": 3, "dynamic_img_size": True}
    return shaken(
        timm.create_model("vit_tiny_patch16_224", num_classes=outputs, **settings | options)
    )


@pytest.fixture
def model():
    return vit()


@pytest.fixture
def photo():
    """50 x 90 pixels, given to the model as 64 x 112."""
    colours = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    return photo_from_array(colours, size=(64, 112))


def test_seed_lies_on_the_grid_and_maps_and_mask_at_the_photos_size(model, photo):
    result = wrap(model)(photo, classes=[1, 4, 0])
    assert result.seed.shape == (1, 3, 4, 7)
    assert result.cam.shape == (1, 3, 50, 90)
    assert result.mask.shape == photo.size == (50, 90)
    for maps in (result.seed, result.cam):
        assert maps.min() >= 0.0
        assert maps.max() <= 1.0


def test_a_pixel_holds_class_plus_one_where_that_class_wins(model, photo):
    classes = [3, 1]
    # a score that some pixels of the random model's maps do not reach
    score = round(float(wrap(model)(photo, classes=classes).cam[0].amax(0).quantile(0.3)), 3)
    result = wrap(model, background_score=score)(photo, classes=classes)
    maps, mask = result.cam[0].tolist(), result.mask.tolist()
    expected = [
        [
            0
            if max(maps[0][y][x], maps[1][y][x]) <= score
            else classes[int(maps[1][y][x] > maps[0][y][x])] + 1
            for x in range(90)
        ]
        for y in range(50)
    ]
    assert mask == expected
    assert {value for row in mask for value in row} == {0, 2, 4}


@pytest.mark.parametrize(
    "seed", [ClassAttentionSeed(), ClassWeightSeed(), GradientSeed(), RelevanceSeed()], ids=repr
)
def test_the_call_equals_its_steps_by_hand(model, photo, seed):
    refine = (Propagate(steps=2, blocks=2), Normalize(mode="minmax"))
    result = wrap(model, seed=seed, refine=refine, background_score=0.4)(photo, classes=[1, 4])
    classes = torch.tensor([[1, 4]])
    with watch(model, gradients=True) as seen:
        logits = model(photo.pixels)
    first = normalize_cam(seed(seen.capture, classes))
    cam = normalize_cam(Propagate(steps=2, blocks=2)(first, seen.capture), mode="minmax")
    cam = resize_cam(cam, photo.size)
    torch.testing.assert_close(result.seed, first.detach())
    torch.testing.assert_close(result.cam, cam.detach().clamp(0, 1))
    torch.testing.assert_close(result.logits, logits.detach())
    assert torch.equal(result.mask, to_mask(result.cam, classes, background_score=0.4)[0])


def test_a_batch_equals_its_photos_one_by_one(model):
    pixels = torch.randn(2, 3, 64, 96)
    classes = torch.tensor([[1, 4], [2, -1]])
    pipeline = wrap(model)
    both = pipeline.stages(pixels, rgb=pixels, classes=classes)
    first = pipeline.stages(pixels[:1], rgb=pixels[:1], classes=classes[:1])
    second = pipeline.stages(pixels[1:], rgb=pixels[1:], classes=classes[1:, :1])
    torch.testing.assert_close(both.cam[0], first.cam[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(both.cam[1, :1], second.cam[0], rtol=1e-3, atol=1e-4)
    assert not both.cam[1, 1].any()


def test_names_and_indices_ask_for_the_same_classes(model, photo):
    pipeline = wrap(model, vocabulary=NAMES)
    named = pipeline(photo, classes=["Hound", "sheep"])
    numbered = pipeline(photo, classes=[1, 4])
    assert named.classes == numbered.classes == (1, 4)
    assert named.names == ("dog, hound", "sheep")
    assert named.legend == {2: "dog, hound", 5: "sheep"}
    assert torch.equal(named.cam, numbered.cam)


def test_a_vocabulary_that_gathers_outputs_scores_their_union(model, photo):
    vocabulary = Vocabulary(("pet", "cattle"), members=((0, 1), (3, 4)))
    result = wrap(model, vocabulary=vocabulary)(photo)
    with torch.no_grad():
        mass = model(photo.pixels).softmax(-1)[0]
    assert result.names == ("pet" if mass[:2].sum() > mass[3:].sum() else "cattle",)


def test_without_classes_the_likeliest_output_is_taken(model, photo):
    with torch.no_grad():
        expected = int(model(photo.pixels).argmax())
    assert wrap(model)(photo).classes == (expected,)


@pytest.mark.parametrize(
    ("vocabulary", "classes", "words"),
    [
        (NAMES, ["hrose"], 'no class is called "hrose"; did you mean "horse"'),
        (NAMES, [], "name at least one class, got none"),
        (NAMES, [5], "a class index must lie in 0 to 4, got 5"),
        (NAMES, [-1], "a class index must lie in 0 to 4, got -1"),
        (NAMES, ["dog", 1], "are the same class"),
        (None, [], "name at least one class, got none"),
        (None, ["cat"], "'cat' is a name, but the pipeline has no vocabulary"),
        (None, [5], r"must lie in 0 to 4 \(or be -1 for none\), got 5"),
        (None, [-1], r"must be indices from 0, none twice, got \[-1\]"),
        (None, [2, 2], r"must be indices from 0, none twice, got \[2, 2\]"),
    ],
)
@pytest.mark.parametrize("seed", [None, ClassAttentionSeed()], ids=["gradient", "attention"])
def test_classes_that_cannot_be_asked_are_refused(model, photo, seed, vocabulary, classes, words):
    before = state_of(model)
    with pytest.raises(ValueError, match=words):
        wrap(model, seed=seed, vocabulary=vocabulary)(photo, classes=classes)
    assert state_of(model) == before


def test_one_name_or_number_is_the_class_of_every_photo(model, photo):
    named = wrap(model, vocabulary=NAMES)
    expected = named(photo, classes=[NAMES.names[1]])
    for request in (NAMES.names[1], 1, np.int64(1), [np.int32(1)], np.array([1])):
        assert torch.equal(named(photo, classes=request).cam, expected.cam)
    with pytest.raises(ValueError, match="is a name, but the pipeline has no vocabulary"):
        wrap(model)(photo, classes="cat")


def test_a_size_that_patches_do_not_divide_is_refused(model):
    photo = photo_from_array(np.zeros((50, 90, 3), np.uint8), size=(50, 90), multiple=10)
    with pytest.raises(
        ValueError, match=r"50x90 cannot be cut into patches of 16x16; .*multiple=16"
    ):
        wrap(model)(photo)


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan")])
def test_a_background_score_outside_the_unit_interval_is_refused(model, score):
    with pytest.raises(ValueError, match=rf"`background_score` must lie in \[0, 1\], got {score}"):
        wrap(model, background_score=score)


def test_a_convolutional_network_is_refused_when_it_is_wrapped():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    with pytest.raises(UnsupportedModelError, match="no attention found in Sequential"):
        wrap(model)


@pytest.mark.parametrize(
    ("place", "words"),
    [("patch_embed.proj.weight", "hold NaN or inf"), ("head.bias", "scores hold NaN or inf")],
)
def test_broken_weights_are_refused_with_words(model, photo, place, words):
    with torch.no_grad():
        model.get_parameter(place)[1] = float("nan")
    before = [module.training for module in model.modules()]
    with pytest.raises((CaptureError, UnsupportedModelError), match=words):
        wrap(model)(photo, classes=[0])
    assert [module.training for module in model.modules()] == before


def test_modes_flags_gradients_and_hooks_are_as_before(photo):
    model = vit(proj_drop_rate=0.5)
    model(photo.pixels).sum().backward()
    model.train()
    model.blocks[1].eval()
    model.blocks[0].requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    before = state_of(model)
    pipeline = wrap(model)
    first, second = pipeline(photo, classes=[1]), pipeline(photo, classes=[1])
    assert state_of(model) == before
    assert torch.equal(first.cam, second.cam)  # dropout was off


@pytest.mark.parametrize("edit", [None, ScaleOutput(2.0)], ids=["plain", "edited"])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt("stop")], ids=repr)
def test_a_forward_that_raises_leaves_the_model_as_it_was(photo, error, edit):
    def stop(*_):
        raise error

    model = vit(proj_drop_rate=0.5).train()
    model.blocks[1].eval()
    model.blocks[2].attn.qkv.register_forward_hook(stop)
    before = state_of(model)
    with pytest.raises(type(error), match="stop"):
        wrap(model, edit=edit)(photo, classes=[1])
    assert state_of(model) == before


def test_a_refiner_that_raises_leaves_the_model_as_it_was(model, photo):
    def broken(cam, capture):
        raise ZeroDivisionError("mine")

    model.train()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError, match="mine"):
        wrap(model, refine=[broken])(photo, classes=[1])
    assert state_of(model) == before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_changes_nothing(model, photo, mode, frozen):
    expected = wrap(model)(photo, classes=[1, 2])
    model.requires_grad_(not frozen)
    with mode():
        before = state_of(model)
        inside = photo_from_array((photo.rgb[0].permute(1, 2, 0) * 255).round().byte().numpy())
        wrap(model)(inside, classes=[1])  # a photo made in the same mode
        found = wrap(model)(photo, classes=[1, 2])
        assert state_of(model) == before
    assert torch.equal(found.cam, expected.cam)
    assert torch.equal(found.mask, expected.mask)
    assert not found.cam.requires_grad
    assert not found.logits.requires_grad


class RunsWithGradients(HandMade):
    """Turns gradients on by itself, whatever its caller wants."""

    def forward(self, pixels):
        with torch.enable_grad():
            return super().forward(pixels)


def test_a_photo_made_in_inference_mode_suits_a_host_that_turns_gradients_on(photo):
    pipeline = wrap(RunsWithGradients())
    expected = pipeline(photo, classes=[1])
    with torch.inference_mode():
        found = pipeline(replace(photo, pixels=photo.pixels * 1), classes=[1])
    assert torch.equal(found.cam, expected.cam)


def test_half_precision_weights_give_maps_close_to_full_ones(model, photo):
    expected = wrap(model)(photo, classes=[1])
    found = wrap(model.bfloat16())(photo, classes=[1])
    assert found.cam.dtype == torch.float32
    assert (found.seed - expected.seed).abs().mean() < 0.05


def test_a_class_has_the_same_value_whatever_the_other_classes_are(photo):
    model = vit(outputs=300)
    refined = wrap(model, vocabulary=[f"class {index}" for index in range(300)])
    both = refined(photo, classes=[299, 7])
    assert both.legend == {300: "class 299", 8: "class 7"}
    assert both.mask.dtype == torch.int32
    assert set(both.mask.unique().tolist()) <= {0, 300, 8}
    wins = both.cam[0, 0] > both.cam[0, 1]
    assert bool(((both.mask == 300) <= wins).all())
    alone = refined(photo, classes=[7])
    assert (alone.legend, alone.mask.dtype) == ({8: "class 7"}, torch.uint8)


@pytest.mark.parametrize(("index", "dtype"), [(253, torch.uint8), (254, torch.int32)])
def test_the_last_class_that_a_byte_holds_is_253(photo, index, dtype):
    result = wrap(vit(outputs=255), background_score=0.5)(photo, classes=[index])
    assert result.legend == {index + 1: str(index)}
    assert set(result.mask.unique().tolist()) == {0, index + 1}
    assert result.mask.dtype == dtype


def test_an_edit_acts_during_the_call_only(model, photo):
    plain = model(photo.pixels)
    expected = wrap(model)(photo, classes=[1])
    same = wrap(model, edit=ScaleOutput(1.0))(photo, classes=[1])
    other = wrap(model, edit=ScaleOutput(3.0))(photo, classes=[1])
    assert torch.equal(same.cam, expected.cam)
    assert (other.cam - expected.cam).abs().max() > 0.01
    assert torch.equal(model(photo.pixels), plain)


def test_logits_under_an_edit_are_those_of_the_edited_model(model, photo):
    result = wrap(model, edit=ScaleOutput(0.0), seed=ClassAttentionSeed())(photo, classes=[1])
    for block in model.blocks:
        block.attn.register_forward_hook(lambda *call: call[2] * 0.0)
    torch.testing.assert_close(result.logits, model(photo.pixels).detach())


def test_a_host_outside_timm_works_too(photo):
    host = HandMade()
    result = wrap(host, seed=GradientSeed())(photo, classes=[2])
    with watch(host, gradients=True) as seen:
        host(photo.pixels)
    expected = GradientSeed()(seen.capture, torch.tensor([[2]]))
    assert result.seed.shape == (1, 1, 8, 14)  # patches of 8
    assert expected.max() > 0
    torch.testing.assert_close(result.seed, normalize_cam(expected))


def test_settings_tell_what_led_to_the_result(model):
    settings = wrap(
        model, seed=RelevanceSeed(), edit=ScaleOutput(2.0), refine=[Normalize()]
    ).settings
    assert settings["seed"] == "RelevanceSeed()"
    assert settings["edit"] == "ScaleOutput(factor=2.0)"
    assert settings["refine"] == [repr(Normalize())]
    assert settings["background_score"] == 0.55
    assert settings["model"] == "VisionTransformer"
    assert settings["environment"]["torch"] == torch.__version__


PACKAGE = Path(camkit.__file__).parent


def test_every_public_name_says_what_it_is():
    for name in (n for n in vars(camkit) if n[0] != "_" and n != "jaxtyping"):
        thing = getattr(camkit, name)
        assert inspect.getdoc(thing), f"camkit.{name} has no docstring"
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            assert not thing.__doc__.startswith(f"{name}("), "the docstring dataclass makes is none"


def test_a_file_is_no_longer_than_700_lines_and_says_what_is_in_it():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 700, path
        assert ast.get_docstring(ast.parse(text)), f"{path} opens with no docstring"


def test_at_most_27_names_are_at_top_level():
    modules = {name for name in vars(camkit) if inspect.ismodule(getattr(camkit, name))}
    public = [n for n in vars(camkit) if n[0] != "_" and n not in modules | {"TYPE_CHECKING"}]
    ours = [n for n in public if getattr(camkit, n).__module__.startswith("camkit.")]
    assert len(ours) <= 27, sorted(ours)


HEADLESS = [ClassAttentionSeed(), AttentionRolloutSeed(), TokenCutSeed(), EigenCAMSeed()]


@pytest.mark.parametrize("seed", HEADLESS, ids=repr)
def test_a_model_without_a_head_serves_seeds_that_read_no_scores(seed, photo):
    headless, whole = vit(0), vit()
    headless.load_state_dict(whole.state_dict(), strict=False)
    found = wrap(headless, seed=seed, vocabulary=NAMES)(photo, classes=["dog", "sheep"])
    expected = wrap(whole, seed=seed, vocabulary=NAMES)(photo, classes=["dog", "sheep"])
    assert torch.equal(found.cam, expected.cam)
    assert torch.equal(found.mask, expected.mask)
    assert (found.classes, found.names, found.legend) == ((1, 4), NAMES_ASKED, expected.legend)
    assert found.logits.shape == (1, 0)
    assert found.manifest()["most_probable_output"] is None


NAMES_ASKED = ("dog, hound", "sheep")


def test_without_head_and_vocabulary_classes_are_any_numbers(photo, tmp_path):
    found = wrap(vit(0), seed=ClassAttentionSeed(), views=Views(flip=True))(photo, classes=[7])
    assert (found.classes, found.names, found.legend) == ((7,), ("7",), {8: "7"})
    assert set(found.mask.unique().tolist()) <= {0, 8}
    assert (found.save(tmp_path) / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("seed", "classes"),
    [(GradientSeed(), [1]), (None, [1]), (ClassAttentionSeed(), None)],
    ids=["a seed of scores", "the default", "the most probable class"],
)
def test_where_scores_are_needed_the_error_names_the_argument(seed, classes, photo):
    with pytest.raises(CaptureError, match=r"no class scores: .*`scores=lambda output"):
        wrap(vit(0), seed=seed)(photo, classes=classes)


def test_a_class_outside_the_vocabulary_of_a_headless_model_is_refused(photo):
    with pytest.raises(ValueError, match="0 to 4, got 5"):
        wrap(vit(0), seed=ClassAttentionSeed(), vocabulary=NAMES)(photo, classes=[5])


def replace_block(model):
    model.blocks[1] = vit().blocks[1]


def replace_attention(model):
    model.blocks[2].attn = vit().blocks[2].attn


def reset_head(model):
    model.reset_classifier(7)


def write_past_the_version(model):
    model.blocks[0].mlp.fc1.weight.data.mul_(2.0)


@pytest.mark.parametrize(
    "change", [replace_block, replace_attention, reset_head, write_past_the_version]
)
def test_a_model_that_is_changed_between_photos_is_seen_as_it_is(change, photo):
    model = vit()
    pipeline = camkit.wrap(model, seed=HybridAttentionSeed(), edit=StaticCalibration())
    before = pipeline(photo, classes=[1])
    change(model)
    fresh = camkit.wrap(model, seed=HybridAttentionSeed(), edit=StaticCalibration())
    found, expected = pipeline(photo, classes=[1]), fresh(photo, classes=[1])
    assert torch.equal(found.cam, expected.cam)
    assert torch.equal(found.logits, expected.logits)
    assert found.settings == expected.settings
    assert before.settings["weights_sha256"] != found.settings["weights_sha256"]
