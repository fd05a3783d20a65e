"""What can be asked of an image, and that what cannot is refused before the model runs."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import capture_of
from hosts import HandMade, OneTokenPerClass, shaken, tiny

from camkit import GradientSeed, Vocabulary, photo_from_array, wrap
from camkit.capture.scores import known_classes
from camkit.seeds import (
    ClassAttentionSeed,
    ClassWeightSeed,
    PredictedClasses,
    RelevanceSeed,
    TextClasses,
    Views,
    read_targets,
)
from camkit.seeds.token_gradients import GradCAMSeed

NAMES = Vocabulary(("cat", "dog, hound", "horse", "cow", "sheep"))


@pytest.fixture
def model():
    return tiny("vit")[0]


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 64, 96)


def slots(asked, images=2, **options):
    return read_targets(asked, images=images, **options).slots.tolist()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (3, [[3], [3]]),
        ([[1, 4], [2]], [[1, 4], [2, -1]]),
        (((1,), (2,)), [[1], [2]]),
        ([torch.tensor([1, 4]), torch.tensor([2])], [[1, 4], [2, -1]]),
        (torch.tensor([1, 4]), [[1], [4]]),
        (torch.tensor([[1, 4], [2, -1]]), [[1, 4], [2, -1]]),
        (torch.tensor([[1, 4], [2, -1]], dtype=torch.int32), [[1, 4], [2, -1]]),
        (torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]).bool(), [[1, 4], [2, -1]]),
        (torch.tensor([[0.0, 1, 0, 0, 1], [0, 0, 1, 0, 0]]), [[1, 4], [2, -1]]),
        (torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]), [[1], [-1]]),
    ],
)
def test_forms_of_one_question(asked, expected):
    assert slots(asked, known=5) == expected


def test_names_are_found_and_mixed_with_numbers():
    assert slots([["Hound", 0], ["sheep"]], vocabulary=NAMES) == [[1, 0], [4, -1]]
    assert slots(["cow", 1], images=1, vocabulary=NAMES) == [[3, 1]]


def test_zeros_and_ones_of_whole_numbers_are_indices():
    assert slots(torch.tensor([[0, 1], [1, 0]]), known=2) == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([1, 4], r"one list for each of 2 images, such as .*got 0 lists among 2 items"),
        ([], "name at least one class, got none"),
        ([[1], []], "name at least one class, got none"),
        ([[1], [2], [3]], r"one list for each of 2 images, .*got 3 lists"),
        ([[1], 2], "got 1 lists among 2 items"),
        (5, r"must lie in 0 to 4 .*got 5"),
        ([[1], [7]], "got 7"),
        ([[-1], [0]], r"indices from 0, none twice, got \[-1\]"),
        ([[1, 1], [0]], "none twice"),
        (torch.tensor([[1]]), r"one row per image \(2\), got a tensor of shape \(1, 1\)"),
        (torch.tensor([[1], [-2]]), "got -2"),
        (torch.tensor([1, 9]), "got 9"),
        (torch.zeros(2, 4), "5 columns, one per class, got 4"),
        (
            torch.full((2, 5), 0.5),
            "labels must be 0 or 1; for probabilities use camkit.seeds.PredictedClasses",
        ),
        ([["cat"], [0]], "no vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_runs(model, pixels, asked, words):
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=words):
        wrap(model).stages(pixels, rgb=pixels, classes=asked)
    assert ran == []


@pytest.mark.parametrize("asked", [1.5, {1, 2}, [[1.5], [0]], [[True], [0]], [[None], [1]]])
def test_what_is_no_class_is_a_type_error(asked, no_shape_checks):
    with pytest.raises(TypeError, match="`classes` must"):
        read_targets(asked, images=2)


def test_every_form_gives_the_same_maps(model, pixels):
    pipeline = wrap(model, refine=[])
    expected = pipeline.stages(pixels, rgb=pixels, classes=torch.tensor([[1, 4], [2, -1]])).cam
    labels = torch.zeros(2, 5)
    labels[0, [1, 4]] = labels[1, 2] = 1
    for asked in (
        [[1, 4], [2]],
        labels,
        labels.bool(),
        lambda capture: torch.tensor([[1, 4], [2, -1]]).to(capture.scores.device),
    ):
        assert torch.equal(pipeline.stages(pixels, rgb=pixels, classes=asked).cam, expected)


@pytest.mark.parametrize(
    "seed", [GradientSeed(), RelevanceSeed(), GradCAMSeed("hirescam")], ids=repr
)
def test_a_custom_score_that_is_a_class_is_that_class(model, pixels, seed):
    pipeline = wrap(model, seed=seed, refine=[])
    asked = [[lambda row: row[1], 4], [2, lambda row: row[0]]]
    found = pipeline.stages(pixels, rgb=pixels, classes=asked)
    plain = pipeline.stages(pixels, rgb=pixels, classes=[[1, 4], [2, 0]])
    torch.testing.assert_close(found.cam, plain.cam)
    assert found.classes.tolist() == [[5, 4], [2, 6]]


def test_a_difference_of_scores_explains_the_difference(model, pixels):
    """The gradient of a - b is that of a less that of b; by hand through attention."""
    pipeline = wrap(model, refine=[])
    asked = [[lambda row: row[1] - row[4]], [lambda row: row[3]]]
    found = pipeline.stages(pixels, rgb=pixels, classes=asked)
    difference = Vocabulary(("d",))

    def scores(output):
        return torch.stack([output[0, 1] - output[0, 4], output[1, 3]])[:, None]

    other = wrap(model, refine=[], scores=scores, vocabulary=difference)
    expected = other.stages(pixels, rgb=pixels, classes=[[0], [0]])
    torch.testing.assert_close(found.cam, expected.cam)


def test_classes_beside_a_custom_score_keep_their_own_token():
    host, pixels = OneTokenPerClass(class_tokens=5), torch.randn(2, 3, 16, 24)
    pipeline = wrap(host, refine=[])
    plain = pipeline.stages(pixels, rgb=pixels, classes=[[3], [1]]).cam
    both = pipeline.stages(pixels, rgb=pixels, classes=[[3, torch.sum], [1, torch.sum]]).cam
    torch.testing.assert_close(both[:, :1], plain)


def test_custom_scores_go_with_groups_views_and_results(model):
    photo = photo_from_array(
        np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), size=96
    )
    groups = Vocabulary(("pet", "cattle"), members=((0, 1), (3, 4)))
    pipeline = wrap(model, vocabulary=groups, views=Views(flip=True), background_score=0.3)

    def first_less_last(row):
        return row[0] - row[4]

    result = pipeline(photo, classes=["cattle", first_less_last])
    assert result.names == ("cattle", "first_less_last")
    assert result.classes == (1, 2)
    assert result.legend == {2: "cattle", 3: "first_less_last"}
    assert set(result.mask.unique().tolist()) <= {0, 2, 3}
    single = pipeline(photo, classes=["cattle"])
    torch.testing.assert_close(result.cam[:, :1], single.cam, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [ClassWeightSeed(), ClassAttentionSeed()], ids=repr)
def test_a_custom_score_needs_gradients(model, pixels, seed):
    with pytest.raises(ValueError, match=r"is differentiated, but .*takes no gradients"):
        wrap(model, seed=seed).stages(pixels, rgb=pixels, classes=[[torch.sum], [0]])


@pytest.mark.parametrize(
    "score",
    [lambda row: row, lambda row: float(row.detach()[0]), lambda row: row[0].detach()],
    ids=["many", "no", "cut"],
)
def test_a_score_that_is_no_number_of_the_outputs_is_refused(model, pixels, score):
    with pytest.raises(ValueError, match="must return one number from the outputs of an image"):
        wrap(model).stages(pixels, rgb=pixels, classes=[[score], [0]])


def test_present_classes_are_those_above_the_threshold(model, pixels):
    capture = capture_of(model, pixels)
    chances = capture.scores.sigmoid()
    for threshold in (0.2, 0.5, 0.9):
        found = PredictedClasses(threshold, least=0)(capture)
        for row, chance in zip(found.tolist(), chances, strict=True):
            kept = [index for index in row if index >= 0]
            assert set(kept) == set((chance >= threshold).nonzero().flatten().tolist())
            assert kept == sorted(kept, key=lambda index: -float(chance[index]))


def test_softmax_adds_up_the_outputs_of_a_class(model, pixels):
    groups = Vocabulary(("a", "b"), members=((0, 1, 2), (4,)))
    capture = capture_of(model, pixels, vocabulary=groups)
    mass = capture.outputs.softmax(1)
    share = torch.stack([mass[:, :3].sum(1), mass[:, 4]], 1)
    threshold = float(share.sort().values[:, 0].mean())
    found = PredictedClasses(threshold, "softmax", least=0)(capture)
    for row, shares in zip(found.tolist(), share, strict=True):
        expected = set((shares >= threshold).nonzero().flatten().tolist())
        assert {index for index in row if index >= 0} == expected


def test_an_image_shows_at_least_so_many_classes(model, pixels):
    capture = capture_of(model, pixels)
    order = capture.scores.argsort(1, descending=True)
    assert torch.equal(PredictedClasses(0.999999, least=2)(capture), order[:, :2])
    assert PredictedClasses(0.999999, least=0)(capture).tolist() == [[-1], [-1]]


def test_a_photo_that_shows_nothing_is_all_background(model):
    photo = photo_from_array(np.zeros((64, 96, 3), np.uint8), size=96)
    result = wrap(model)(photo, classes=PredictedClasses(0.999999, least=0))
    assert result.classes == ()
    assert result.cam.shape[1] == 0
    assert not result.mask.any()


class Embedding(HandMade):
    """Returns an embedding of the image, as CLIP's image tower."""

    def forward(self, pixels):
        return self.tokens(pixels)[:, 0]


def test_texts_are_classes_by_the_cosine_of_their_embeddings():
    host, pixels = Embedding(), torch.randn(2, 3, 16, 24)
    texts = torch.randn(3, 24)
    found = wrap(host, refine=[]).stages(
        pixels, rgb=pixels, classes=TextClasses(("x", "y", "z"), texts)
    )
    unit = F.normalize(texts, dim=1)
    by_hand = wrap(host, refine=[], scores=lambda out: 100 * F.normalize(out, dim=1) @ unit.T)
    expected = by_hand.stages(pixels, rgb=pixels, classes=[[0, 1, 2]] * 2)
    torch.testing.assert_close(found.cam, expected.cam)
    assert found.classes.tolist() == [[0, 1, 2]] * 2


def test_texts_and_scores_of_the_pipeline_are_one_too_many(pixels):
    texts = TextClasses(("x",), torch.randn(1, 24))
    with pytest.raises(ValueError, match="texts bring their own scores and names"):
        wrap(Embedding(), vocabulary=NAMES).stages(pixels, rgb=pixels, classes=texts)


def test_a_model_is_believed_about_its_classes_where_a_layer_agrees():
    host = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, num_classes=7)
    assert known_classes(host) == 7
    host.num_classes = 8
    assert known_classes(host) is None
    assert known_classes(HandMade()) is None


def test_a_model_that_counts_the_background_takes_labels_without_it():
    """As ToCo: `num_classes` is that of its decoder, one more than its classifier scores."""
    host = HandMade()
    host.decoder, host.num_classes = torch.nn.Conv2d(24, 6, 1), 6
    labels = torch.tensor([[0.0, 0, 1, 0, 0]])
    found = wrap(host).stages(
        torch.randn(1, 3, 16, 24), rgb=torch.rand(1, 3, 16, 24), classes=labels
    )
    assert found.classes.tolist() == [[2]]


def test_a_host_that_does_not_tell_its_classes_still_refuses_wrong_ones():
    host = shaken(HandMade())
    with pytest.raises(ValueError, match="must lie in 0 to 4"):
        wrap(host).stages(torch.randn(1, 3, 16, 24), rgb=torch.rand(1, 3, 16, 24), classes=5)
