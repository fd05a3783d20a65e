"""Class maps of published codebases, written out in torch, against the settings that give them."""

import pytest
import torch
import torch.nn.functional as F
from forks import CLASS_TOKEN, CLASSES, DIM, Block, ReturnsItsMap, Vit
from helpers import capture_of
from hosts import shaken, tiny
from torch import nn

import camkit
from camkit import Views, normalize_cam
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import ClassWeightSeed, ModelRunner, MultiViewReader

ALL = torch.arange(CLASSES).expand(2, -1)


def joined(model, pixels, seed, views, classes=ALL):
    runner = ModelRunner(model, requires=seed.requires)
    with torch.no_grad():
        reader = MultiViewReader(runner, pixels, None, runner(pixels))
        return reader.seeds(classes, [(seed, views)])[seed, views]


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


def multi_scale(toco, pixels, scales):
    """ToCo's multi-scale maps: signed maps at image size, the larger of both, positive, summed."""
    size, sums = pixels.shape[2:], [0, 0]
    for scale in scales:
        resized = F.interpolate(pixels, scale_factor=scale, mode="bilinear")
        both = [toco.maps(resized), toco.maps(resized.flip(-1))]
        for place in (0, 1):
            plain, turned = (F.interpolate(maps[place], size, mode="bilinear") for maps in both)
            sums[place] = sums[place] + torch.maximum(plain, turned.flip(-1)).relu()
    lowered = [maps - maps.amin((2, 3), keepdim=True) for maps in sums]
    return [maps / (maps.amax((2, 3), keepdim=True) + 1e-5) for maps in lowered]


AS_TOCO = Views((1.0, 0.5, 1.5), flip=True, join_flip="max", join_at="image", antialias=False)


@pytest.mark.parametrize("paired", [False, True])
def test_views_joined_at_the_size_of_the_image_are_tocos(toco, paired):
    pixels = torch.randn(2, 3, 32, 48)
    views = Views(**{**vars(AS_TOCO), "paired": paired})
    with torch.no_grad():
        expected = multi_scale(toco, pixels, views.scales)
    for layer, maps in ((None, expected[0]), (-3, expected[1])):
        cam = joined(toco, pixels, ClassWeightSeed(cut=None, layer=layer), views)
        assert cam.shape == (2, CLASSES, 32, 48)
        found = normalize_cam(cam, mode="minmax", epsilon=1e-5)
        torch.testing.assert_close(found, maps, rtol=0, atol=1e-5)


def test_a_pipeline_joins_at_the_size_of_the_image(toco):
    pixels, rgb = torch.randn(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    steps = (camkit.refiners.Normalize("minmax"),)
    seed = ClassWeightSeed(cut=None)
    pipeline = camkit.wrap(toco, seed=seed, views=AS_TOCO, refine=steps)
    stages = pipeline.stages(pixels, rgb=rgb, classes=ALL)
    expected = multi_scale(toco, pixels, AS_TOCO.scales)[0]
    torch.testing.assert_close(stages.cam, expected.detach(), rtol=0, atol=1e-4)  # no epsilon
