"""Class maps of published codebases, written out in torch, against the settings that give them."""

import pytest
import torch
import torch.nn.functional as F
from forks import CLASS_TOKEN, CLASSES, DIM, Block, ReturnsItsMap, Vit
from helpers import capture_of
from hosts import Block as BlockOfHost, OneTokenPerClass, shaken, tiny
from torch import nn

import camkit
from camkit import GradientSeed, Propagate, Views, normalize_cam
from camkit.capture import WatchSpec
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.refiners import RandomWalk
from camkit.seeds import (
    ClassAttentionSeed,
    ClassWeightSeed,
    FusedSeed,
    GatedProductSeed,
    ModelRunner,
    MultiViewReader,
    PatchHeadSeed,
    ProductSeed,
    RefinedSeed,
)

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
    with pytest.raises(ValueError, match="must be \"zero\" or None, got 'mean'"):
        PatchHeadSeed(cut="mean")


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


class MCTformerPlus(OneTokenPerClass):
    """One token a class, a convolution that scores patches, and blocks that show their maps.

    ``fusion`` derives a weight for every head from its block's output, as WeakTr does.
    """

    def __init__(self, *, fusion=False):
        super().__init__(class_tokens=CLASSES, blocks=3)
        self.blocks = nn.ModuleList(ShowsItsMap() for _ in range(3))
        self.head = nn.Conv2d(24, CLASSES, 3, padding=1)
        self.fusion = nn.Sequential(nn.Linear(3 * 24, 6), nn.Sigmoid()) if fusion else None

    def forward(self, pixels):
        return self.everything(pixels)[0]

    def everything(self, pixels):
        """Scores, class attention, signed patch maps, patch attention of each block."""
        x = self.sequence(self.patch_embed(pixels).flatten(2).mT)
        maps, outputs = [], []
        for block in self.blocks:
            added, shown = block(block.norm(x))
            x = x + added
            maps.append(shown)
            outputs.append(added.mean(1))
        maps = torch.stack(maps, 1)  # images, blocks, heads, tokens, tokens
        weights = torch.ones(maps.shape[:3])
        if self.fusion is not None:
            weights = self.fusion(torch.cat(outputs, -1)).unflatten(-1, (2, 3)).mT
        weighted = (maps * weights[..., None, None]).mean(2)
        grid = pixels.shape[2] // 8, pixels.shape[3] // 8
        patches = self.head(x[:, CLASSES:].mT.unflatten(-1, grid))
        attended = weighted.mean(1)[:, :CLASSES, CLASSES:].unflatten(-1, grid)
        scores = x[:, :CLASSES].mean(-1)
        return scores, attended, patches, weighted[..., CLASSES:, CLASSES:]


class ShowsItsMap(BlockOfHost):
    def forward(self, x):
        q, k, v = (p.unflatten(-1, (2, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2), weights


def learned_weights(model):
    """Head weights as a user reads them: the latest output of the module that computes them."""
    last = model.fusion[-1]

    def read(capture):
        (call,) = [call for call in capture.tail if call.module is last]
        return call.output.unflatten(-1, (2, 3)).mT

    return read


@pytest.fixture(params=[False, True], ids=["mctformer", "weaktr"])
def per_class(request):
    """A model, its seed and the spreading of its maps."""
    model = shaken(MCTformerPlus(fusion=request.param))
    weights = learned_weights(model) if request.param else None
    seed = ProductSeed(ClassAttentionSeed(weights), PatchHeadSeed(), root=not request.param)
    return model, seed, Propagate(scale_rows=False, head_weights=weights)


def test_class_attention_times_patch_maps_spread_by_patch_attention(per_class):
    model, seed, spread = per_class
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        _, attended, patches, affinity = model.everything(pixels)
    expected = attended * patches.relu()
    expected = expected if model.fusion else expected.sqrt()
    capture = capture_of(model, pixels, seed, spread)
    torch.testing.assert_close(seed(capture, ALL), expected)
    expected = torch.einsum("bij,bkj->bki", affinity.mean(1), expected.flatten(2)).view_as(expected)
    torch.testing.assert_close(spread(seed(capture, ALL), capture), expected)
    torch.testing.assert_close(RefinedSeed(seed, (spread,))(capture, ALL), expected)


def test_each_view_is_spread_by_its_own_attention(per_class):
    """As MCTformer and WeakTr join scales and mirror images: spread, resized, summed, min-max."""
    model, seed, spread = per_class
    pixels, size, total = torch.randn(2, 3, 32, 48), (32, 48), 0
    for sides in ((32, 48), (16, 24), (48, 72)):
        small = sides[0] < 32
        resized = F.interpolate(pixels, sides, mode="bilinear", antialias=small)
        for flipped in (False, True):
            with torch.no_grad():
                _, attended, patches, affinity = model.everything(
                    resized.flip(-1) if flipped else resized
                )
            maps = attended * patches.relu()
            maps = maps if model.fusion else maps.sqrt()
            maps = (affinity.sum(1) @ maps.flatten(2).mT).mT.view_as(maps)
            maps = F.interpolate(maps, size, mode="bilinear")
            total = total + (maps.flip(-1) if flipped else maps)
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    views = Views(scales=(1.0, 0.5, 1.5), flip=True, join_at="image")
    cam = joined(model, pixels, RefinedSeed(seed, (spread,)), views)
    found = normalize_cam(cam, mode="minmax")
    torch.testing.assert_close(found, (total - low) / (high - low), rtol=0, atol=1e-5)


def test_signed_maps_of_a_patch_head_are_spread_as_in_transcam():
    model, pixels = MCTformerPlus(), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        _, _, patches, affinity = model.everything(pixels)
    expected = (affinity.mean(1) @ patches.flatten(2).mT).mT.view_as(patches)
    seed = RefinedSeed(PatchHeadSeed(cut=None), (Propagate(scale_rows=False),))
    torch.testing.assert_close(seed(capture_of(model, pixels, seed), ALL), expected)
    assert expected.min() < 0 < expected.max()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 3), r"\(2, 3, 2\), got \(2, 3\)"),
        ((2, 2, 3), r"\(2, 3, 2\), got \(2, 2, 3\)"),
        ((1, 3, 2), r"\(2, 3, 2\), got \(1, 3, 2\)"),
    ],
)
@pytest.mark.parametrize("stage", [ClassAttentionSeed, Propagate])
def test_head_weights_of_another_shape_are_refused(stage, shape, words):
    model, pixels = MCTformerPlus(), torch.randn(2, 3, 32, 48)
    capture = capture_of(model, pixels)
    read = stage(head_weights=lambda _: torch.ones(shape))
    given = (torch.rand(2, 1, 4, 6), capture) if stage is Propagate else (capture, ALL)
    with pytest.raises(ValueError, match=f"each image, watched block and head, of shape {words}"):
        read(*given)


def test_head_weights_must_be_finite():
    capture = capture_of(MCTformerPlus(), torch.randn(2, 3, 32, 48))
    with pytest.raises(ValueError, match="finite weights, got NaN or inf"):
        ClassAttentionSeed(lambda _: torch.full((2, 3, 2), torch.nan))(capture, ALL)


def test_a_stage_requires_what_its_head_weights_require():
    def read(capture):
        return torch.ones(capture.images, 3, 2)

    assert not Propagate().requires.last_patches
    assert Propagate(head_weights=read).requires == WatchSpec()  # weights may come from patches
    read.requires = WatchSpec(leaving=True)
    for stage in (ClassAttentionSeed(read), Propagate(head_weights=read)):
        assert stage.requires == WatchSpec(leaving=True)


@pytest.mark.parametrize("scale_rows", [True, False])
@pytest.mark.parametrize("blocks", [None, 2])
def test_heads_of_equal_weight_are_the_plain_mean(scale_rows, blocks):
    capture = capture_of(MCTformerPlus(), torch.randn(2, 3, 32, 48))
    cam = torch.rand(2, 2, 4, 6)
    settings = {"steps": 2, "blocks": blocks, "scale_rows": scale_rows}
    equal = Propagate(**settings, head_weights=lambda _: torch.ones(2, 3, 2))
    torch.testing.assert_close(equal(cam, capture), Propagate(**settings)(cam, capture))
    balanced = Propagate(
        blocks=blocks, balance=2, head_weights=lambda _: torch.full((2, 3, 2), 7.0)
    )
    expected = Propagate(blocks=blocks, balance=2)(cam, capture)
    torch.testing.assert_close(balanced(cam, capture), expected)


def test_head_weights_of_the_last_blocks_are_the_last_weights():
    capture = capture_of(MCTformerPlus(), torch.randn(2, 3, 32, 48))
    cam, weights = torch.rand(2, 1, 4, 6), torch.rand(2, 3, 2)
    changed = weights.clone()
    changed[:, 0] = 9.0
    last = [
        Propagate(blocks=2, scale_rows=False, head_weights=lambda _, w=w: w)(cam, capture)
        for w in (weights, changed)
    ]
    assert torch.equal(*last)
    every = Propagate(scale_rows=False, head_weights=lambda _: changed)(cam, capture)
    assert not torch.allclose(every, last[0], rtol=0.1)


def test_balanced_rows_are_scaled_rows():
    with pytest.raises(ValueError, match="excludes `scale_rows=False`; set one of the two"):
        Propagate(balance=3, scale_rows=False)


def test_refiners_of_the_grid_are_refused_behind_views_joined_at_the_size_of_the_image(toco):
    views = Views(join_at="image")
    with pytest.raises(ValueError, match=r"leave the patch grid that Propagate.*RefinedSeed"):
        camkit.wrap(toco, seed=ClassWeightSeed(), views=views)
    spread = RefinedSeed(ClassWeightSeed(), (Propagate(),))
    pipeline = camkit.wrap(toco, seed=spread, views=views, refine=())
    pixels, rgb = torch.randn(2, 3, 32, 48), torch.rand(2, 3, 32, 48)
    assert pipeline.stages(pixels, rgb=rgb, classes=ALL).cam.shape == (2, CLASSES, 32, 48)


def test_a_refined_seed_states_what_all_of_it_reads_and_keeps_empty_slots_empty(toco):
    seed = RefinedSeed(ClassWeightSeed(layer=-3), (lambda cam, _: cam + 1.0,))
    assert seed.requires.gradients  # a plain function may read anything
    assert RefinedSeed(ClassWeightSeed(layer=-3), (Propagate(),)).requires.leaving
    classes = torch.tensor([[0, -1], [-1, 2]])
    found = seed(capture_of(toco, torch.randn(2, 3, 32, 48), seed), classes)
    assert not found[classes < 0].any()
    assert found[classes >= 0].min() >= 1.0
    with pytest.raises(ValueError, match="at least one refiner, got none"):
        RefinedSeed(ClassWeightSeed(), ())


def test_settings_of_codebases_are_written_in_words():
    steps = "propagate:scale_rows=false,boxes=0.4,box_rule=clip-es+normalize:minmax,epsilon=1e-5"
    method = camkit.Method.from_words(seed="weight:cut=none,layer=-3", refine=[steps])
    assert method.seed == ClassWeightSeed(cut=None, layer=-3)
    assert method.refine == (
        Propagate(scale_rows=False, boxes=0.4, box_rule="clip-es"),
        camkit.refiners.Normalize("minmax", epsilon=1e-5),
    )


@pytest.mark.parametrize(
    "combined",
    [
        lambda seed: ProductSeed(seed, seed, root=True),
        lambda seed: FusedSeed((seed, GradientSeed()), join="product"),
        lambda seed: GatedProductSeed(seed, seed),
    ],
    ids=["product", "fused", "gated"],
)
def test_negative_scores_count_as_zero_where_maps_are_combined(toco, combined):
    signed, cut = (combined(ClassWeightSeed(cut=cut)) for cut in (None, "zero"))
    capture = capture_of(toco, torch.randn(2, 3, 32, 48), signed)
    found = signed(capture, ALL)
    assert found.isfinite().all()
    assert torch.equal(found, cut(capture, ALL))


def test_maps_that_a_model_returns_are_read_as_watched_ones():
    model, pixels, cam = MCTformerPlus(), torch.randn(2, 3, 32, 48), torch.rand(2, 1, 4, 6)
    returned = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: returned.append(call[-1][1]))
    watched = capture_of(model, pixels)
    model(pixels)
    maps = returned[-3:]
    stages = (Propagate(steps=2, balance=2), Propagate(scale_rows=False), RandomWalk())
    for heads in (maps, [each.mean(1) for each in maps]):
        given = camkit.Capture.of_attention(heads, (4, 6), class_tokens=range(CLASSES))
        for stage in stages:
            torch.testing.assert_close(stage(cam, given), stage(cam, watched))
        rows = ClassAttentionSeed()(given, ALL)
        torch.testing.assert_close(rows, ClassAttentionSeed()(watched, ALL))


def test_class_attention_of_the_last_blocks_leaves_the_earlier_ones_out():
    # one class token and two patches, two heads; the class token attends to the patches like this
    rows = [[(0.1, 0.5), (0.3, 0.1)], [(0.2, 0.4), (0.6, 0.0)], [(0.8, 0.2), (0.0, 0.6)]]
    maps = [torch.zeros(1, 2, 3, 3) for _ in rows]
    for each, heads in zip(maps, rows, strict=True):
        each[0, :, 0, 1:] = torch.tensor(heads)
    capture, first = camkit.Capture.of_attention(maps, (1, 2)), torch.tensor([[0]])
    for blocks, expected in ((1, [0.4, 0.4]), (2, [0.4, 0.3]), (None, [1 / 3, 0.3])):
        found = ClassAttentionSeed(blocks=blocks)(capture, first)
        torch.testing.assert_close(found.flatten(), torch.tensor(expected))
    only_first_head = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [1.0, 0.0]]])  # of each block
    found = ClassAttentionSeed(lambda _: only_first_head, blocks=2)(capture, first)
    torch.testing.assert_close(found.flatten(), torch.tensor([0.25, 0.15]))


def test_class_attention_of_no_block_is_refused():
    with pytest.raises(ValueError, match="at least 1, or None for all, got 0"):
        ClassAttentionSeed(blocks=0)


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ([], "at least one block, got none"),
        ([torch.rand(2, 24, 24)], r"between 25 tokens \(24 patches and 1 others.*\(2, 24, 24\)"),
        ([torch.rand(2, 25, 25), torch.rand(1, 25, 25)], "maps of 2 images.* in place 1"),
        ([torch.ones(2, 25, 25, dtype=torch.int64)], "got torch.int64"),
        ([torch.rand(25, 25)], r"got torch.float32 of shape \(25, 25\) in place 0"),
    ],
)
def test_maps_that_do_not_fit_the_grid_are_refused(maps, words):
    with pytest.raises(ValueError, match=words):
        camkit.Capture.of_attention(maps, (4, 6))
