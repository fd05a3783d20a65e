"""Methods: what wrap decides on without settings, and methods in words."""

import ast
import copy
import gc
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import state_of
from hosts import shaken
from torch import nn

import camkit
from camkit import (
    DOEI,
    CamkitError,
    GradientSeed,
    Method,
    Pipeline,
    Vocabulary,
    normalize_cam,
    photo_from_array,
    wrap,
)
from camkit.capture import Capture
from camkit.contrib import LogitLensSeed
from camkit.edits import RandomGates, ScaleOutput, StaticCalibration
from camkit.method import CALIBRATED, EDITS, GRADIENT, POOLED, REFINERS, SEEDS
from camkit.refiners import AtReducedSize, Blur, Normalize
from camkit.seeds import ClassWeightSeed, HybridAttentionSeed, LOSTSeed

HYBRID = HybridAttentionSeed()
SCORE = CALIBRATED.method.background_score


def vit(depth, **options):
    torch.manual_seed(0)
    settings = {"embed_dim": 48, "num_heads": 3, "num_classes": 5, "img_size": 48}
    return shaken(timm.create_model("vit_tiny_patch16_224", depth=depth, **settings | options))


@pytest.fixture(scope="module")
def deep():
    return vit(6)


@pytest.fixture(scope="module")
def photo():
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return photo_from_array(colours, size=(48, 48))


def same(found, wanted):
    return torch.equal(found.cam, wanted.cam) and torch.equal(found.mask, wanted.mask)


def test_a_classifier_on_the_class_token_is_calibrated(deep, photo):
    found = wrap(deep)(photo, classes=[1, 3])
    asked = wrap(
        deep, seed=HYBRID, edit=StaticCalibration(of="k"), edit_blocks=4, background_score=SCORE
    )
    assert same(found, asked(photo, classes=[1, 3]))
    assert found.settings == asked.settings
    assert "StaticCalibration" in found.settings["edit"]
    found = wrap(deep)(photo, classes=[0, 1, 2, 3, 4])  # of some class they differ
    plain = wrap(deep, seed=GradientSeed())(photo, classes=[0, 1, 2, 3, 4])
    assert not torch.equal(found.cam, plain.cam)
    assert torch.allclose(found.logits, plain.logits, atol=1e-6)  # the classifier is left alone


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"depth": 5}, id="few blocks"),
        pytest.param({"depth": 6, "global_pool": "avg"}, id="pooled beside a class token"),
        pytest.param({"depth": 6, "class_token": False, "global_pool": "map"}, id="pooling query"),
    ],
)
def test_others_are_read_by_their_gradients(options, photo):
    model = vit(**options)
    found = wrap(model)(photo, classes=[1, 3])
    asked = wrap(model, seed=GradientSeed())(photo, classes=[1, 3])
    assert same(found, asked)
    assert found.settings == asked.settings
    assert found.settings["background_score"] == GRADIENT.method.background_score


POOLED_VIT = {"class_token": False, "global_pool": "avg", "fc_norm": True}


@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(POOLED_VIT, id="mean"),
        pytest.param(POOLED_VIT | {"global_pool": "max"}, id="maximum"),
        pytest.param(POOLED_VIT | {"fc_norm": False}, id="a norm before"),
    ],
)
def test_pooled_patches_are_scored_by_the_classifier(options, depth, photo):
    model = vit(depth, **options)
    found = wrap(model)(photo, classes=[1, 3])
    asked = wrap(model, seed=ClassWeightSeed(), background_score=POOLED.method.background_score)
    assert same(found, asked(photo, classes=[1, 3]))
    assert found.settings == asked.settings


def test_a_host_that_casts_its_scores_is_read_as_well(photo):
    model = vit(2, **POOLED_VIT).bfloat16()
    pipeline = wrap(model, scores=lambda output: output.float())
    found, exact = pipeline(photo, classes=[1]), wrap(vit(2, **POOLED_VIT))(photo, classes=[1])
    assert found.settings["seed"] == exact.settings["seed"] == repr(ClassWeightSeed())
    assert (found.cam - exact.cam).abs().mean() < 0.05


def test_a_head_that_takes_all_tokens_in_a_row_is_read_by_gradients(photo):
    torch.manual_seed(0)
    tokens = vit(2, num_classes=0, global_pool="")
    model = nn.Sequential(tokens, nn.Flatten(), nn.Linear(10 * 48, 5)).eval()
    found = wrap(model)(photo, classes=[1])
    assert found.settings["seed"] == "GradientSeed()"
    assert same(found, wrap(model, seed=GradientSeed())(photo, classes=[1]))


def test_what_was_tried_is_let_go_at_once(photo):
    model = vit(5)
    gc.collect()
    before = captures()
    gc.disable()
    try:
        wrap(model)(photo, classes=[1])
        after = captures()
    finally:
        gc.enable()
    assert after == before


def captures():
    return sum(type(one) is Capture for one in gc.get_objects())


def test_why_a_model_is_not_calibrated_is_told(photo, caplog):
    model = vit(6)
    for block in model.blocks:
        block.attn.fused_attn = False
    with caplog.at_level(logging.INFO, "camkit"):
        found = wrap(model)(photo, classes=[2])
    assert found.settings["seed"] == "GradientSeed()"
    assert "VisionTransformer does not support HybridAttentionSeed" in caplog.text
    assert "the host writes its attention out" in caplog.text
    (reason,) = found.passed_over
    assert reason.startswith("HybridAttentionSeed(")
    assert "the host writes its attention out" in reason
    assert found.manifest()["passed_over"] == [reason]


def test_nothing_is_passed_over_where_the_first_preset_works(deep, photo):
    assert wrap(deep)(photo, classes=[1]).passed_over == ()
    assert wrap(vit(2), seed=ClassWeightSeed())(photo, classes=[1]).passed_over == ()


def test_each_preset_that_is_passed_over_has_its_reason(photo):
    pipeline = wrap(vit(5, **POOLED_VIT))
    calibrated, gradient = pipeline(photo, classes=[1]).passed_over
    assert "under StaticCalibration" in calibrated
    assert "was tuned for 6 attention blocks or more, not 5" in calibrated
    assert gradient.startswith("GradientSeed(): this model has no class token")
    assert f"not {gradient}" in str(pipeline)
    assert pipeline.passed_over == (calibrated, gradient)


class WithTeacher(nn.Module):
    """A student and a teacher of the same form, of which the student alone runs."""

    def __init__(self, depth):
        super().__init__()
        self.student, self.teacher = vit(depth), vit(depth)

    def forward(self, pixels):
        return self.student(pixels)


def test_a_model_beside_an_idle_teacher_gets_its_preset_or_the_reason(photo):
    found = wrap(WithTeacher(6).eval())(photo, classes=[1])
    asked = wrap(vit(6))(photo, classes=[1])
    assert found.passed_over or same(found, asked)


def test_blocks_of_an_idle_teacher_do_not_count(photo):
    (reason,) = wrap(WithTeacher(4).eval())(photo, classes=[1]).passed_over
    assert "was tuned for 6 attention blocks or more, not 4" in reason


def test_custom_scores_pass_over_what_explains_the_classifier(deep, photo):
    found = wrap(deep)(photo, classes=[lambda output: output[2] - output[4]])
    calibrated, pooled = found.passed_over
    assert "explains the model's own classifier, not texts or custom scores" in calibrated
    assert pooled.startswith("ClassWeightSeed(")


def test_it_is_tried_once_for_all_photos(deep, photo):
    calls = []
    handle = deep.register_forward_hook(lambda *_: calls.append(1))
    pipeline = wrap(deep)
    pipeline(photo, classes=[1])
    tried = len(calls)
    pipeline(photo, classes=[1])
    pipeline(photo, classes=[2])
    handle.remove()
    assert (tried, len(calls)) == (3, 5)


def test_a_score_of_ones_own_is_read_by_gradients(deep, photo):
    own = [lambda output: output[2] - output[4]]
    found = wrap(deep)(photo, classes=own)
    assert same(found, wrap(deep, seed=GradientSeed())(photo, classes=own))
    pipeline = wrap(deep)
    pipeline(photo, classes=[1])
    assert pipeline(photo, classes=own).settings["seed"] == "GradientSeed()"
    assert "HybridAttention" in pipeline(photo, classes=[1]).settings["seed"]


def test_a_batch_is_what_its_photos_are(deep, photo):
    """In double: on a random model the last map is nearly flat, and min-max stretches rounding."""
    model, pixels = copy.deepcopy(deep).double(), photo.pixels.double()
    pixels = torch.cat([pixels, pixels.flip(-1)])
    rgb = torch.cat([photo.rgb, photo.rgb.flip(-1)]).double()
    both = wrap(model).stages(pixels, rgb=rgb, classes=torch.tensor([[1], [3]]))
    single = wrap(model).stages(pixels[1:], rgb=rgb[1:], classes=torch.tensor([[3]]))
    torch.testing.assert_close(both.cam[1:], single.cam, rtol=0, atol=1e-9)


def test_what_is_asked_for_is_kept(deep, photo):
    assert wrap(deep, background_score=0.0)(photo).settings["background_score"] == 0.0
    shallow = wrap(vit(2), background_score=0.3)(photo).settings
    assert (shallow["background_score"], shallow["seed"]) == (0.3, "GradientSeed()")
    edited = wrap(deep, edit=ScaleOutput(1.5))(photo).settings
    assert (edited["seed"], edited["edit_blocks"]) == ("GradientSeed()", 3)
    weighed = wrap(deep, seed=ClassWeightSeed())(photo).settings
    assert (weighed["seed"], weighed["edit"]) == (repr(ClassWeightSeed()), "None")


def test_grouped_outputs_are_read_together(deep, photo):
    groups = Vocabulary(("cat", "dog"), members=((0, 1), (2, 3, 4)))
    found = wrap(deep, vocabulary=groups)(photo, classes=["dog"])
    asked = wrap(
        deep, vocabulary=groups, seed=HYBRID, edit=StaticCalibration(of="k"), edit_blocks=4,
        background_score=SCORE,
    )  # fmt: skip
    assert same(found, asked(photo, classes=["dog"]))


def test_the_model_is_as_it_was(deep, photo):
    deep.train()
    before = state_of(deep)
    wrap(deep)(photo, classes=[1])
    assert state_of(deep) == before
    assert deep.training
    deep.eval()


def test_the_method_is_shown_before_and_after_it_is_decided(deep, photo):
    pipeline = wrap(deep, refine=[])
    assert "method decided at the first photo" in str(pipeline)
    assert repr(pipeline) == "Pipeline(VisionTransformer, method decided at the first photo)"
    with pytest.raises(CamkitError, match="decided at the first photo; call the pipeline"):
        _ = pipeline.method
    result = pipeline(photo, classes=[1])
    assert pipeline.method == replace(CALIBRATED.method, refine=())
    assert str(pipeline) == f"Pipeline(VisionTransformer, {pipeline.method!r})"
    stages = f"HybridAttentionSeed, StaticCalibration, background_score={SCORE}"
    assert repr(pipeline) == f"Pipeline(VisionTransformer, {stages})"
    assert pipeline.settings == result.settings


def test_deciding_needs_no_classes(deep, photo):
    pipeline = wrap(deep)
    assert pipeline.decide(photo.pixels, photo.rgb) == CALIBRATED.method == pipeline.method


def test_a_pipeline_around_a_method_is_what_wrap_makes_of_its_fields(deep, photo):
    method = Method(ClassWeightSeed(), edit=ScaleOutput(1.5), edit_blocks=2, background_score=0.4)
    found = Pipeline(deep, method)(photo, classes=[1, 3])
    asked = wrap(
        deep, seed=ClassWeightSeed(), edit=ScaleOutput(1.5), edit_blocks=2, background_score=0.4
    )
    assert asked.method == method
    assert same(found, asked(photo, classes=[1, 3]))


def test_words_name_the_stages_of_a_method():
    words = {"seed": "lost:count=3", "edit": "gates", "edit_blocks": None}
    method = Method.from_words(**words, refine=["blur:2+normalize:minmax,reduced=0.5"])
    assert method.seed == LOSTSeed(count=3)
    assert (method.edit, method.edit_blocks) == (RandomGates(DOEI.as_drawn()), None)
    assert method.refine == (Blur(2.0), AtReducedSize(Normalize("minmax"), scale=0.5))
    assert Method.from_words() == Method(GradientSeed()) == GRADIENT.method


def test_every_short_name_makes_a_method():
    for name in SEEDS:
        assert type(Method.from_words(seed=name).seed) is SEEDS[name]
    for name in EDITS:
        assert type(Method.from_words(edit=name).edit) is EDITS[name]
    for name in REFINERS:
        assert type(Method.from_words(refine=[name]).refine[0]) is REFINERS[name]


def test_a_dotted_path_names_any_class_or_function():
    assert Method.from_words(seed="camkit.contrib.LogitLensSeed:1").seed == LogitLensSeed(1)
    function = Method.from_words(refine=["camkit.refiners.normalize.normalize_cam"]).refine[0]
    assert function is normalize_cam
    with pytest.raises(ValueError, match=r"camkit\.Nothing: cannot import this seed"):
        Method.from_words(seed="camkit.Nothing")


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"background_score": 1.5}, ValueError, r"must lie in \[0, 1\], got 1.5"),
        (
            {"seed": GradientSeed},
            TypeError,
            r"must be a seed, .* got the class GradientSeed; add brackets: GradientSeed\(\)",
        ),
        (
            {"refine": (Normalize(), Blur)},
            TypeError,
            r"must be a refiner, .* got the class Blur; add brackets: Blur\(\)",
        ),
    ],
)
def test_a_method_that_cannot_be_used_is_refused(settings, error, words, no_shape_checks):
    with pytest.raises(error, match=words):
        Method(**settings)


PACKAGE = Path(camkit.__file__).parent


def parsed(path):
    """Parse a file; Python 3.11 fails if it was interrupted in the same work (gh-106905)."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except SystemError:
        return ast.parse(path.read_text(encoding="utf-8"))


def test_no_frozen_class_holds_a_collection_to_write_into():
    trees = [parsed(path) for path in PACKAGE.rglob("*.py")]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef) and any(
            "frozen=True" in ast.unparse(d) for d in node.decorator_list
        ):
            written = [ast.unparse(line) for line in node.body if isinstance(line, ast.AnnAssign)]
            hidden = [w for w in written if w.startswith("_") and "default_factory" in w]
            assert not hidden, f"{node.name}: {hidden}"
