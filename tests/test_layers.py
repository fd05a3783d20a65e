"""Logit lens, fusion of layers, the layer that agrees best, and concepts."""

from itertools import pairwise

import pytest
import torch
from helpers import capture_of
from hosts import HandMade, tiny
from torch import nn

import camkit
from camkit import GradientSeed, Vocabulary
from camkit.contrib import (
    BestAgreementSeed,
    BlockSeed,
    ConceptBank,
    CRAFTSeed,
    LogitLensSeed,
)
from camkit.contrib.craft import (
    amounts_of,
    least_squares,
    semi_nmf,
    sobol_pairs,
    swapped,
    total_sobol,
)
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import (
    ClassWeightSeed,
    FusedSeed,
    GatedProductSeed,
    RelevanceSeed,
)

CLASSES = torch.tensor([[1, 4, 0], [3, -1, 2]])
PICTURE = camkit.Capture.of_picture(torch.zeros(1, 3, 1, 4))


def evidence(scores):
    """Scores ``(b, n, C)`` as maps of CLASSES, zero below the mean and where padded."""
    picked = torch.stack([s[:, row.clamp_min(0)].T for s, row in zip(scores, CLASSES, strict=True)])
    maps = (picked - picked.mean(-1, keepdim=True)).clamp_min(0)
    return maps.masked_fill((CLASSES < 0)[:, :, None], 0)


@pytest.mark.parametrize(
    "family", ["vit", "explicit softmax", "dinov2 registers", "average pooled"]
)
def test_the_lens_is_the_hosts_own_norm_and_head_on_an_inner_block(family):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels, LogitLensSeed(0))
    left = []
    hooks = [
        block.register_forward_hook(lambda *call: left.append(call[-1])) for block in model.blocks
    ]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    for layer in (0, -2, -1):
        with torch.no_grad():
            scores = model.head(model.fc_norm(model.norm(left[layer][:, capture.patches])))
        found = LogitLensSeed(layer)(capture, CLASSES).flatten(2)
        torch.testing.assert_close(found, evidence(scores))


@pytest.mark.parametrize("family", ["vit", "average pooled"])
def test_at_the_last_block_the_lens_is_the_class_weight_seed(family):
    model, pixels = tiny(family)
    capture = capture_of(model, pixels, LogitLensSeed(-1))
    expected = ClassWeightSeed()(capture, CLASSES)
    torch.testing.assert_close(LogitLensSeed(-1)(capture, CLASSES), expected)


class MaxPooled(nn.Module):
    """As ToCo: the classifier is a 1x1 convolution behind a maximum over the patches."""

    def __init__(self):
        super().__init__()
        self.encoder = tiny("vit", num_classes=0)[0]
        self.classifier = nn.Conv2d(48, 5, 1, bias=False)

    def forward(self, pixels):
        tokens = self.encoder.forward_features(pixels)[:, 1:]
        maps = tokens.mT.unflatten(2, (4, 6))
        return self.classifier(nn.functional.adaptive_max_pool2d(maps, 1)).flatten(1)


def test_the_lens_reads_inner_patches_by_a_convolution_too():
    host, pixels, seed = MaxPooled(), torch.randn(2, 3, 64, 96), LogitLensSeed(0)
    capture = capture_of(host, pixels, seed)
    left = []
    hook = host.encoder.blocks[0].register_forward_hook(lambda *call: left.append(call[-1]))
    with torch.no_grad(), hook:
        host(pixels)
        patches = host.encoder.norm(left[0][:, 1:]).mT.unflatten(2, (4, 6))
        scores = host.classifier(patches).flatten(2).mT
    torch.testing.assert_close(seed(capture, CLASSES).flatten(2), evidence(scores))


def test_the_lens_takes_groups_of_outputs():
    model, pixels = tiny("vit")
    groups = Vocabulary(("a", "b"), members=((0, 3), (2,)))
    seed = LogitLensSeed(1)
    capture = capture_of(model, pixels, seed, vocabulary=groups)
    plain = capture_of(model, pixels, seed)
    one = seed(capture, torch.tensor([[1], [1]]))
    torch.testing.assert_close(one, seed(plain, torch.tensor([[2], [2]])))


def test_the_lens_needs_its_tokens_and_a_classifier():
    model, pixels = tiny("vit")
    seed = LogitLensSeed()
    with pytest.raises(CaptureError, match=r"LogitLensSeed reads; watch.*requires=seed.requires"):
        seed(capture_of(model, pixels), CLASSES)
    with pytest.raises(ValueError, match="must lie in -3 to 2, got 3"):
        LogitLensSeed(3)(capture_of(model, pixels, seed), CLASSES)

    class Scaled(HandMade):
        def forward(self, pixels):
            return 3 * super().forward(pixels)

    host = Scaled()
    with pytest.raises((UnsupportedModelError, CaptureError)):
        seed(capture_of(host, torch.randn(2, 3, 16, 24), seed), CLASSES)


def test_watching_what_leaves_the_blocks_changes_nothing_and_builds_no_graph():
    model, pixels = tiny("vit")
    expected = model(pixels)
    with camkit.watch(model, requires=LogitLensSeed().requires) as seen:
        found = model(pixels)
    assert torch.equal(found, expected)
    assert not any(call.node.requires_grad for call in seen.capture.leaving)
    assert len(seen.capture.leaving) == 3


def test_a_seed_of_some_blocks_is_the_seed_with_those_watched_alone():
    model, pixels = tiny("vit")
    classes = CLASSES[:, :1]
    whole = capture_of(model, pixels, GradientSeed())
    part = capture_of(model, pixels, GradientSeed(), blocks=[0, 2])
    found = BlockSeed(GradientSeed(), (-1, 0))(whole, classes)
    torch.testing.assert_close(found, GradientSeed()(part, classes))
    with pytest.raises(ValueError, match="-3 to 2, as 3 were watched, got 3"):
        BlockSeed(GradientSeed(), (3,))(whole, classes)


class Fixed:
    """A seed whose maps are known."""

    def __init__(self, maps):
        self.maps = maps

    def __call__(self, *_):
        return self.maps


def maps_of(*rows):
    return torch.tensor(rows).view(1, 1, 1, -1)


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        ("mean", [0.5, 0.75, 0.625]),
        ("max", [1.0, 1.0, 1.0]),
        ("product", [0.0, 0.5**0.5, 0.25**0.5]),
    ],
)
def test_fusion_worked_by_hand(join, expected):
    one, other = maps_of(2.0, 1.0, 0.5), maps_of(0.0, 3.0, 3.0)
    found = FusedSeed((Fixed(one), Fixed(other)), join)(PICTURE, torch.tensor([[0]]))
    torch.testing.assert_close(found, maps_of(*expected))


@pytest.mark.parametrize(
    ("other", "trust", "expected"),
    [
        ((2.0, 1.0, 0.0), 1.0, [1.0, 0.25 * 0.5, 0.0]),  # the root of the first: all of it
        ((0.0, 1.0, 2.0), 9.0, [1.0, 0.25, 0.0]),  # the opposite: none of it
        ((3.0, 0.0, 3.0), 9.0, [1.0, 0.25, 0.0]),  # unrelated: none of it
        ((1.0, 0.5, 0.5), 0.5, [1.0, 0.25 * 0.5 ** (0.75**0.5 / 2), 0.0]),  # correlation 0.866
        ((0.0, 0.0, 0.0), 9.0, [1.0, 0.25, 0.0]),  # nothing was seen
        ((1.0, 1.0, 1.0), 9.0, [1.0, 0.25, 0.0]),  # everything alike
    ],
)
def test_a_seed_is_multiplied_as_far_as_the_other_agrees(other, trust, expected):
    seed = GatedProductSeed(Fixed(maps_of(4.0, 1.0, 0.0)), Fixed(maps_of(*other)), trust)
    found = seed(PICTURE, torch.tensor([[0]]))
    torch.testing.assert_close(found, maps_of(*expected), atol=1e-6, rtol=1e-5)


def test_a_layer_without_evidence_is_no_evidence_in_a_fusion():
    one, other = maps_of(0.0, 0.0), maps_of(0.0, 4.0)
    found = FusedSeed((Fixed(one), Fixed(other)))(PICTURE, torch.tensor([[0]]))
    torch.testing.assert_close(found, maps_of(0.0, 0.5))


def test_the_layer_that_agrees_best_is_taken_for_each_image_and_class():
    """Overlaps by hand: of the reference's two patches, A has one of three, B both of three."""
    reference = maps_of(1.0, 1.0, 0.0, 0.0)
    wide = maps_of(1.0, 0.9, 0.8, 0.0)  # overlap 2 of 3
    shifted = maps_of(0.0, 1.0, 1.0, 0.0)  # overlap 1 of 3
    candidates = (Fixed(shifted), Fixed(wide))
    seed = BestAgreementSeed(candidates, Fixed(reference))
    assert torch.equal(seed(PICTURE, torch.tensor([[0]])), wide)
    turned = torch.cat([maps_of(1.0, 1.0, 0.0, 0.0), maps_of(0.0, 1.0, 1.0, 0.0)], 1)
    both = BestAgreementSeed(
        (Fixed(torch.cat([shifted, shifted], 1)), Fixed(torch.cat([wide, wide], 1))), Fixed(turned)
    )
    assert torch.equal(both(PICTURE, torch.tensor([[0, 1]])), torch.cat([wide, shifted], 1))


def test_without_a_reference_the_odd_one_out_is_not_taken():
    like, alike, odd = maps_of(1.0, 1.0, 0.0), maps_of(1.0, 0.9, 0.1), maps_of(0.0, 0.0, 1.0)
    seed = BestAgreementSeed((Fixed(odd), Fixed(like), Fixed(alike)))
    assert torch.equal(seed(PICTURE, torch.tensor([[0]])), like)


def test_seeds_of_seeds_need_what_their_parts_need():
    fused = FusedSeed((LogitLensSeed(0), LogitLensSeed(-1)))
    model, pixels = tiny("vit")
    capture = capture_of(model, pixels, fused)
    parts = [LogitLensSeed(layer)(capture, CLASSES) for layer in (0, -1)]
    tops = [part.amax((-2, -1), keepdim=True).clamp_min(1e-8) for part in parts]
    expected = (parts[0] / tops[0] + parts[1] / tops[1]) / 2
    torch.testing.assert_close(fused(capture, CLASSES), expected)
    assert BestAgreementSeed((fused, GradientSeed())).requires.gradients
    assert not FusedSeed((ClassWeightSeed(),)).requires.gradients
    both = BestAgreementSeed((LogitLensSeed(), RelevanceSeed())).requires
    assert both.gradients
    assert both.leaving


def test_a_fusion_runs_in_a_pipeline():
    model, _ = tiny("vit")
    pixels = torch.randn(1, 3, 64, 96)
    fused = FusedSeed((LogitLensSeed(0), GradientSeed()), "max")
    stages = camkit.wrap(model, seed=fused, refine=[]).stages(pixels, rgb=pixels, classes=1)
    capture = capture_of(model, pixels, fused)
    expected = camkit.normalize_cam(fused(capture, torch.tensor([[1]])))
    torch.testing.assert_close(stages.cam, expected)


@pytest.mark.parametrize("shape", [(2, 30, 12), (1, 8, 20)])
def test_factorisation_never_gets_worse(shape):
    data = torch.randn(shape).double()
    errors = []
    for steps in (1, 2, 4, 8, 16, 32):
        amounts, directions = semi_nmf(data, 4, steps=steps)
        assert (amounts >= 0).all()
        errors.append(float((data - amounts @ directions).square().sum()))
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert errors[-1] < float((data - data.mean(1, keepdim=True)).square().sum())


def test_exact_parts_are_found():
    """Rows made of two directions, the pure ones among them, are explained without rest."""
    directions = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.0, 3.0]]).double()
    amounts = torch.rand(1, 40, 2).double()
    amounts[0, 0], amounts[0, 1] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    data = amounts @ directions
    found, parts = semi_nmf(data, 2, steps=200)
    assert float((data - found @ parts).norm() / data.norm()) < 1e-2
    torch.testing.assert_close(
        amounts_of(data, directions[None], steps=2000), amounts, atol=1e-3, rtol=0
    )


def test_directions_are_the_least_squares_ones():
    data, amounts = torch.randn(1, 9, 4).double(), torch.rand(1, 9, 3).double()
    expected = torch.linalg.lstsq(amounts, data).solution
    torch.testing.assert_close(least_squares(data, amounts), expected, rtol=1e-4, atol=1e-5)


def test_data_of_one_value_does_not_break_it():
    amounts, directions = semi_nmf(torch.ones(1, 6, 3), 4)
    torch.testing.assert_close(amounts @ directions, torch.ones(1, 6, 3), atol=1e-3, rtol=0)


def test_total_sobol_indices_of_a_linear_function():
    """Of a sum of independent terms the index of each is its share of the variance."""
    weights = torch.tensor([1.0, 2.0, -3.0])
    first, second = sobol_pairs(3, 4096, torch.zeros(()))
    changed = torch.stack([points @ weights for points in swapped(first, second)])
    found = total_sobol(first @ weights, changed)
    torch.testing.assert_close(found, weights**2 / 14, atol=0.01, rtol=0)


def test_total_sobol_indices_count_what_acts_together():
    """For x * y on the unit square both indices are 4/7: 3/7 alone, 1/7 together."""
    first, second = sobol_pairs(2, 4096, torch.zeros(()))
    changed = torch.stack([points.prod(1) for points in swapped(first, second)])
    found = total_sobol(first.prod(1), changed)
    torch.testing.assert_close(found, torch.full((2,), 4 / 7), atol=0.02, rtol=0)


def test_concepts_of_a_linear_host_matter_by_the_square_of_what_they_add():
    host, pixels = tiny("average pooled")
    host.fc_norm, pixels = nn.Identity(), pixels[:1]
    seed = CRAFTSeed(rank=3, designs=512)
    capture = capture_of(host, pixels, seed)
    patches = capture.leaving[-1].tokens[:, capture.patches]
    amounts, directions = semi_nmf(patches, 3)
    added = amounts.mean(1)[0] * (directions[0] @ host.head.weight[2]).detach()
    weights = (added**2 / added.square().sum()).masked_fill(added < 0, 0.0)
    expected = (amounts[0] @ weights).view(4, 4)
    found = seed(capture, torch.tensor([[2]]))[0, 0]
    torch.testing.assert_close(found, expected, rtol=0.08, atol=0.02 * float(expected.max()))


def test_learnt_concepts_serve_other_images():
    model, pixels = tiny("vit")
    capture = capture_of(model, pixels, CRAFTSeed())
    patches = capture.leaving[-1].tokens[:, capture.patches]
    concepts = ConceptBank.of(patches.flatten(0, 1), rank=5)
    assert concepts.directions.shape == (5, 48)
    seed = CRAFTSeed(concepts)
    both = seed(capture, CLASSES)
    single = seed(capture_of(model, pixels[1:], seed), CLASSES[1:])
    torch.testing.assert_close(both[1:], single, rtol=1e-3, atol=1e-4)
    assert not both[1, 1].any()
    assert (both >= 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BlockSeed(GradientSeed(), ()), "at least one block, got none"),
        (lambda: FusedSeed(()), "at least one seed, got none"),
        (lambda: FusedSeed((GradientSeed(),), "sum"), "got 'sum'"),
        (lambda: GatedProductSeed(GradientSeed(), RelevanceSeed(), 0.0), "above 0, got 0"),
        (lambda: BestAgreementSeed((GradientSeed(),)), "at least two seeds, got 1"),
        (
            lambda: BestAgreementSeed((GradientSeed(), RelevanceSeed()), threshold=1.0),
            r"\(0, 1\), got 1.0",
        ),
        (lambda: CRAFTSeed(rank=0), "at least 1, got 0"),
        (lambda: CRAFTSeed(designs=1), "at least 2, got 1"),
        (lambda: semi_nmf(torch.zeros(1, 3, 2), 4), "1 to the 3 rows, got 4"),
    ],
)
def test_settings_that_mean_nothing_are_refused(call, words, no_shape_checks):
    with pytest.raises(ValueError, match=words):
        call()
