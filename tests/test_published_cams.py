"""Class maps of published codebases, written out in torch, against the settings that give them."""

import pytest
import torch
import torch.nn.functional as F
from forks import CLASS_TOKEN, CLASSES, DIM, Block, ReturnsItsMap, Vit
from helpers import capture_of
from hosts import shaken, tiny
from torch import nn

import camkit
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import ClassWeightSeed

ALL = torch.arange(CLASSES).expand(2, -1)


class ToCo(nn.Module):
    """Patches pooled by their maximum, then a 1x1 convolution: of the last block, of an inner one.

    ``auxiliary`` is the index of the inner block.
    """

    def __init__(self, auxiliary=-3):
        super().__init__()
        self.encoder, self.auxiliary = Vit(ReturnsItsMap, special=CLASS_TOKEN), auxiliary
        self.encoder.blocks.extend(Block(ReturnsItsMap()) for _ in range(2))
        self.classifier = nn.Conv2d(DIM, CLASSES, 1, bias=False)
        self.aux_classifier = nn.Conv2d(DIM, CLASSES, 1, bias=False)

    def features(self, pixels):
        tokens = self.encoder.patch_embed(pixels)
        tokens = torch.cat([self.encoder.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        leaving = []
        for block in self.encoder.blocks:
            tokens = block(tokens)[0]
            leaving.append(tokens)
        grid = pixels.shape[2] // 8, pixels.shape[3] // 8
        both = self.encoder.norm(tokens), leaving[self.auxiliary]
        return [each[:, 1:].mT.unflatten(-1, grid) for each in both]

    def maps(self, pixels):
        """Signed class maps of the last and of the inner block."""
        last, inner = self.features(pixels)
        return F.conv2d(last, self.classifier.weight), F.conv2d(inner, self.aux_classifier.weight)

    def forward(self, pixels):
        last, inner = self.features(pixels)
        scores = self.classifier(last.amax((2, 3), keepdim=True)).flatten(1)
        return scores, last, self.aux_classifier(inner.amax((2, 3), keepdim=True)).flatten(1)


@pytest.fixture
def toco():
    return shaken(ToCo())


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_the_class_map_of_toco_is_the_positive_part_of_its_convolution(toco, size):
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        last, inner = toco.maps(pixels)
    for maps, layer in ((last, None), (inner, -3), (inner, 1)):
        seed = ClassWeightSeed(cut="zero", layer=layer)
        capture = capture_of(toco, pixels, seed)
        torch.testing.assert_close(seed(capture, ALL), maps.clamp_min(0))
        signed = ClassWeightSeed(cut=None, layer=layer)
        torch.testing.assert_close(signed(capture, ALL), maps)
    assert last.min() < 0 < last.max()  # so that the cut matters
    assert not torch.allclose(last, inner, atol=0.1)


def test_classes_of_a_vocabulary_are_scored_in_an_inner_block_too(toco):
    pixels, names = torch.randn(2, 3, 32, 48), camkit.Vocabulary(("a", "b"), members=((1,), (0,)))
    seed = ClassWeightSeed(cut=None, layer=-3)
    found = seed(capture_of(toco, pixels, seed, vocabulary=names), torch.tensor([[0], [1]]))
    _, inner = toco.maps(pixels)
    own = F.conv2d(toco.features(pixels)[1], toco.aux_classifier.weight)
    torch.testing.assert_close(found[0, 0], own[0, 1].detach())
    torch.testing.assert_close(found[1, 0], inner[1, 0].detach())


def test_a_block_that_no_classifier_reads_is_refused(toco):
    pixels = torch.randn(2, 3, 32, 48)
    seed = ClassWeightSeed(layer=-2)
    with pytest.raises(UnsupportedModelError, match="no classifier that reads the tokens of this"):
        seed(capture_of(toco, pixels, seed), ALL)
    plain = tiny("vit")
    with pytest.raises(UnsupportedModelError, match="which takes the classifier of the last block"):
        seed(capture_of(*plain, seed), ALL)


def test_an_inner_layer_must_exist_and_be_recorded(toco):
    pixels = torch.randn(2, 3, 32, 48)
    capture = capture_of(toco, pixels, ClassWeightSeed(layer=-3))
    with pytest.raises(ValueError, match="`layer` must lie in -4 to 3, got 4"):
        ClassWeightSeed(layer=4)(capture, ALL)
    with pytest.raises(CaptureError, match="watch the forward with"):
        ClassWeightSeed(layer=-3)(capture_of(toco, pixels, ClassWeightSeed()), ALL)


def test_a_cut_that_does_not_exist_is_refused(no_shape_checks):
    with pytest.raises(ValueError, match='must be "mean", "zero" or None, got \'max\''):
        ClassWeightSeed(cut="max")
