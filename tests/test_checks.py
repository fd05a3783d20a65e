"""Arguments are checked where they enter, and the error says what to write."""

import functools
import re

import numpy as np
import pytest
import timm
import torch

import camkit
from camkit.contrib import LogitLensSeed
from camkit.refiners import Blur


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **small).eval()


WRONG = {
    "a class as seed": ({"seed": camkit.GradientSeed}, "add brackets: GradientSeed()"),
    "a class as edit": ({"edit": camkit.DOEI}, "add brackets: DOEI()"),
    "a class as refiner": ({"refine": [camkit.DenseCRF]}, "add brackets: DenseCRF()"),
    "a text as seed": ({"seed": "gradient"}, "got the text 'gradient'; camkit.Method.from_words"),
    "a text as chain": ({"refine": "crf"}, "got the text 'crf'; camkit.Method.from_words"),
    "a text in a chain": ({"refine": ["crf"]}, "got the text 'crf'"),
    "a refiner as seed": ({"seed": Blur()}, "got a refiner; give it as refine=[...]"),
    "a seed as refiner": ({"refine": [camkit.GradientSeed()]}, "got a seed; give it as seed=..."),
    "an edit as refiner": ({"refine": [camkit.DOEI()]}, "got an edit; give it as edit=..."),
    "a refiner as edit": ({"edit": Blur()}, "got a refiner"),
    "views as seed": ({"seed": camkit.Views()}, "got camkit.Views; give it as views=..."),
    "scales as views": ({"views": (0.5, 1.0)}, "such as camkit.Views(flip=True), got (0.5, 1.0)"),
    "a number as seed": ({"seed": 3}, "or a function of your own, got 3"),
    "a number as edit": ({"edit": 5}, "or a function of your own, got 5"),
    "a text as score": ({"background_score": "0.5"}, "must be a number in [0, 1], got '0.5'"),
    "a text as blocks": (
        {"edit": camkit.DOEI(), "edit_blocks": "3"},
        "`edit_blocks` must be a number of blocks or a list of their indices, got '3'",
    ),
    "a number as scores": ({"scores": 3}, "`scores` must be a function, got 3"),
    "a number as call": ({"call": 3}, "`call` must be a function, got 3"),
    "one name as modules": ({"modules": "attn"}, "a list of names, such as ['attn']"),
    "one position": ({"class_tokens": 0}, "`class_tokens` must be a list of positions"),
    "a number as grid": ({"grid": 14}, "`grid` must be rows and columns of patches"),
    "a text as names": ({"vocabulary": "cat"}, "a vocabulary must be a list of names"),
    "a number as photos": ({"photos": 3}, "`photos` must be a camkit.photo.PhotoSettings"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_of_wrap_is_refused_with_the_fix(model, arguments, words, no_shape_checks):
    with pytest.raises(TypeError, match=re.escape(words)):
        camkit.wrap(model, **arguments)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("vit_tiny_patch16_224", "create it first: timm.create_model('vit_tiny_patch16_224'"),
        (timm.models.VisionTransformer, "got the class VisionTransformer; add brackets"),
        (None, "must be a torch.nn.Module, got None"),
    ],
)
def test_what_is_no_model_is_refused_at_every_door(wrong, words, no_shape_checks):
    doors = (camkit.wrap, camkit.watch, lambda m: camkit.attach(m, camkit.DOEI()))
    for door in doors:
        with pytest.raises(TypeError, match=re.escape(words)):
            door(wrong)


def test_a_wrong_edit_is_refused_by_attach(model, no_shape_checks):
    for edit, words in ((camkit.DOEI, "add brackets"), (5, "got 5"), (Blur(), "got a refiner")):
        with pytest.raises(TypeError, match=words):
            camkit.attach(model, edit)
    assert not any(module._forward_hooks for module in model.modules())


def test_numbers_of_numpy_and_single_refiners_are_taken(model, no_shape_checks):
    with camkit.watch(model, blocks=np.int64(2)) as seen, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert len(seen.capture.blocks) == 2
    for blocks in (np.int64(2), np.array([1, 2]), range(1, 3), [np.int32(1), 2]):
        with camkit.attach(model, camkit.edits.ScaleOutput(2.0), blocks=blocks) as handle:
            assert handle.settings["blocks"] == ["blocks.1.attn", "blocks.2.attn"]
    refined = camkit.wrap(model, seed=LogitLensSeed(1), refine=camkit.chain(Blur(1.0)))
    assert refined.method.refine == (camkit.chain(Blur(1.0)),)
    assert camkit.wrap(model, refine=Blur(1.0), seed=camkit.GradientSeed()).method.refine == (
        Blur(1.0),
    )
    assert camkit.Method(background_score=np.float32(0.5)).background_score == 0.5


def test_functions_of_the_user_are_stages(model):
    seed = camkit.GradientSeed()
    refined = camkit.wrap(
        model,
        seed=functools.partial(camkit.GradientSeed.__call__, seed),
        refine=[lambda cam, _: cam],
    )
    assert len(refined.method.refine) == 1
