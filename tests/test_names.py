"""Names of classes: those a model states, those a user gives, first guesses, mask values."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import camkit
from camkit import Vocabulary
from camkit.data import OBJECTS_IN_IMAGENET, VOC_CLASSES, VOC_IN_IMAGENET, imagenet_vocabulary
from camkit.names import read_vocabulary, vocabulary_of
from camkit.seeds import PredictedClasses


def vit(outputs, **options):
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
    return timm.create_model("vit_tiny_patch16_224", num_classes=outputs, **small, **options).eval()


def test_a_classifier_of_imagenet_brings_its_names():
    assert vocabulary_of(vit(1000)) is imagenet_vocabulary()
    assert vocabulary_of(vit(3)) is None
    assert vocabulary_of(vit(0)) is None
    large = vocabulary_of(vit(11821))  # ImageNet-12k, in timm's order
    assert (len(large), large.names[0]) == (11821, "benthos")


def test_labels_of_transformers_are_names():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    labels = {0: "cat", 1: "dog"}
    for id2label, expected in ((labels, ("cat", "dog")), (None, None)):
        given = {"id2label": id2label} if id2label else {"num_labels": 5}
        config = transformers.ViTConfig(intermediate_size=64, **small, **given)
        found = vocabulary_of(transformers.ViTForImageClassification(config))
        assert (None if found is None else found.names) == expected


def test_groups_hold_every_output_of_imagenet_once():
    names = imagenet_vocabulary()
    held = sorted(output for index in names.candidates for output in names.members[index])
    assert held == list(range(1000))
    assert len(set(names.values)) == len(names)
    assert names.names[1000:1020] == VOC_CLASSES == tuple(VOC_IN_IMAGENET)
    assert [names.value(i) for i in range(1000, 1020)] == list(range(1, 21))  # as in VOC's masks
    assert names.value(281) == 1281


@pytest.mark.parametrize("word", ["snake", "monkey", "bear", "fox", "lizard"])
def test_a_group_of_wordnet_holds_the_kinds_that_its_name_says(word):
    names = imagenet_vocabulary().names
    first = {i for i in range(1000) if names[i].split(",")[0].lower().split()[-1] == word}
    assert len(first) > 1
    assert first <= set(OBJECTS_IN_IMAGENET[word])


@pytest.mark.parametrize(
    ("given", "names", "members"),
    [
        (["a", "b"], ("a", "b"), None),
        ({0: "a", 1: "b"}, ("a", "b"), None),
        ({"0": "a", "1": "b"}, ("a", "b"), None),  # JSON has no other keys
        ({2: "b", 1: "a"}, ("a", "b"), ((1,), (2,))),
        ({"a": [0, 2], "b": 1}, ("a", "b"), ((0, 2), (1,))),
        ({"a": np.array([0, 2]), "b": np.int64(1)}, ("a", "b"), ((0, 2), (1,))),
        (Vocabulary(("a", "b")), ("a", "b"), None),
    ],
)
def test_a_vocabulary_is_read_off_lists_and_dicts(given, names, members):
    found = Vocabulary.of(given)
    assert (found.names, found.members) == (names, members)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("cat", TypeError, r"a list of names such as \[\"cat\", \"dog\"\], .* got 'cat'"),
        (["a", 3], TypeError, "must hold texts, got 3 among them"),
        ({"a": "b"}, TypeError, "must have outputs as keys"),
        ({"a": [0.5], "b": ["x"]}, TypeError, "must hold the output or outputs of each name"),
        (["a", " "], ValueError, "no name may be blank"),
        ([], ValueError, "at least one name"),
        (7, TypeError, "must be a list of names"),
    ],
)
def test_what_is_no_vocabulary_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        Vocabulary.of(given)


def test_names_are_checked_against_the_outputs():
    assert read_vocabulary(["x", "y", "z"], vit(3)).names == ("x", "y", "z")
    chosen = read_vocabulary(["dog", "tabby"], vit(1000))
    assert chosen.members == (VOC_IN_IMAGENET["dog"], (281,))
    for names, words in (
        (["x", "y"], "has 2 names, but the model has 3 outputs"),
        ({"x": 3}, "names output 3, but the model has 3"),
    ):
        with pytest.raises(ValueError, match=words):
            read_vocabulary(names, vit(3))
    with pytest.raises(ValueError, match='no class is called "shep"; did you mean "sheep"'):
        read_vocabulary(["shep", "cat"], vit(1000))


class Fixed(nn.Module):
    """A ViT whose scores of ImageNet are these, whatever the image."""

    def __init__(self, scores):
        super().__init__()
        self.inner, self.num_classes = vit(1000), 1000
        self.register_buffer("scores", scores)

    def forward(self, pixels):
        return self.inner(pixels) * 1e-6 + self.scores


def scores_of(**probabilities):
    scores = torch.full((1000,), 1e-6)
    for output, value in probabilities.items():
        scores[int(output[1:])] = value
    return scores.log()


def test_sister_classes_add_up_to_the_first_guess():
    # one chair leads, but five cats hold more together
    scores = scores_of(_559=0.25, _281=0.12, _282=0.12, _283=0.12, _284=0.12, _285=0.12)
    photo = camkit.photo_from_array(np.zeros((32, 32, 3), np.uint8), size=32)
    refined = camkit.wrap(Fixed(scores), seed=camkit.GradientSeed(), refine=[])
    assert refined(photo).names == ("cat",)
    assert refined(photo).legend == {8: "cat"}
    likely = refined(photo, classes=PredictedClasses(0.2, "softmax"))
    assert likely.names == ("cat", "chair")  # no output, no kind of cat beside the cat
    single = camkit.wrap(Fixed(scores), seed=camkit.GradientSeed(), vocabulary=list("ab") * 500)
    assert single(photo).classes == (559,)


def test_a_large_group_needs_more_than_a_small_one():
    # 118 dogs hold 0.42 together, divided by 118 ** 0.1 = 1.61 that is less than 0.32
    dogs = {f"_{output}": 0.42 / 118 for output in VOC_IN_IMAGENET["dog"]}
    scores = scores_of(_339=0.32, **dogs)
    names = imagenet_vocabulary()
    assert names.names[int(names.score(scores).argmax())] == "dog"
    assert names.names[int(names.for_guesses(names.score(scores)).argmax())] == "horse"
    divided = names.for_guesses(names.score(scores)) - names.score(scores)
    dog = names.index("dog")
    assert float(divided[dog].exp()) == pytest.approx(118**-0.1)
    assert float(divided[names.index("horse")]) == 0.0
    assert float(divided[281]) == -torch.inf  # a tabby is no guess, a cat is


def test_labels_may_be_given_for_the_outputs_alone():
    photo = camkit.photo_from_array(np.zeros((32, 32, 3), np.uint8), size=32)
    refined = camkit.wrap(vit(1000), seed=camkit.GradientSeed(), refine=[])
    labels = torch.zeros(1, 1000, dtype=torch.bool)
    labels[0, [5, 281]] = True
    assert refined(photo, classes=labels).classes == (5, 281)
    with pytest.raises(ValueError, match="labels must have 1088 columns"):
        refined(photo, classes=labels[:, :999])
