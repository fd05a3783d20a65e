"""Scores of patches and their exact shares in the host's score, for every pooling."""

import copy

import pytest
import torch
import zoo
from helpers import capture_of
from hosts import HandMade, OneTokenPerClass, shaken, tiny
from torch import nn

from camkit import watch
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import (
    ClassAttentionSeed,
    ClassWeightSeed,
    ContributionSeed,
    GroupedGeM,
    MaxPooling,
    MeanPooling,
    PatchHeadSeed,
    ProductSeed,
    RankPooling,
)
from camkit.vocabulary import Vocabulary

CLASSES = torch.tensor([[1, 4, 0], [3, 0, 2]])
RULES = [
    MeanPooling(),
    MaxPooling(),
    GroupedGeM((3.0,)),
    GroupedGeM((1.0, 2.5, 7.0)),
    RankPooling(),
    RankPooling(0.5),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("patches", [1, 17])
def test_the_parts_of_patches_add_up_to_the_pooled_vector(rule, patches):
    values = torch.randn(2, patches, 12, dtype=torch.float64)
    torch.testing.assert_close(rule.parts(values).sum(1), rule.pool(values))


def test_ggem_is_the_generalised_mean_of_each_group():
    values = torch.tensor([[[1.0, 2.0, -5.0, 4.0], [3.0, 2.0, 8.0, 0.0]]])
    pooled = GroupedGeM((2.0, 3.0), floor=1e-6).pool(values)
    expected = [(10 / 2) ** 0.5, 2.0, (512 / 2) ** (1 / 3), (64 / 2) ** (1 / 3)]
    torch.testing.assert_close(pooled, torch.tensor([expected]))


def test_ggem_lies_between_the_mean_and_the_maximum_of_positive_values():
    values = torch.rand(2, 50, 6, dtype=torch.float64) + 0.1
    torch.testing.assert_close(GroupedGeM((1.0,)).pool(values), values.mean(1))
    torch.testing.assert_close(
        GroupedGeM((2000.0,)).pool(values), values.amax(1), rtol=3e-3, atol=0
    )


def test_rank_pooling_weighs_by_order():
    parts = RankPooling(0.5).parts(torch.tensor([[[1.0], [3.0], [2.0]]]))[0, :, 0]
    torch.testing.assert_close(parts, torch.tensor([0.25 * 1, 3.0, 0.5 * 2]) / 1.75)


def test_a_channel_belongs_to_the_patch_that_is_its_maximum():
    parts = MaxPooling().parts(torch.tensor([[[1.0, 5.0], [2.0, -1.0]]]))
    assert parts.tolist() == [[[0.0, 5.0], [2.0, 0.0]]]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: GroupedGeM(()), "must hold positive numbers"),
        (lambda: GroupedGeM((2.0, -1.0)), "must hold positive numbers"),
        (lambda: GroupedGeM(floor=0.0), "must be positive, got 0"),
        (lambda: GroupedGeM((1.0,) * 5).pool(torch.rand(1, 2, 12)), "12 channels evenly, got 5"),
        (lambda: RankPooling(0.0), r"must lie in \(0, 1\], got 0"),
        (lambda: ContributionSeed(nodes=0), "at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


class Pooled(HandMade):
    """Pools its patches by a rule; the head has no bias, so shares add up to the whole score."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule
        self.head = nn.Linear(24, 5, bias=False)

    def forward(self, pixels):
        return self.head(self.rule.pool(self.tokens(pixels)[:, 1:]))


class MaxPooled(HandMade):
    """As ToCo: maximum over patches, then a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(24, 5, 1, bias=False)

    def forward(self, pixels):
        return self.head(self.tokens(pixels)[:, 1:].amax(1)[..., None, None]).flatten(1)


class RankPooled(HandMade):
    """As MCTformer+: a convolution scores patches, whose scores are pooled by rank."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(24, 5, 3, padding=1)

    def forward(self, pixels):
        rows, cols = pixels.shape[2] // 8, pixels.shape[3] // 8
        scores = self.head(self.tokens(pixels)[:, 1:].mT.unflatten(2, (rows, cols)))
        ordered = scores.flatten(2).sort(-1, descending=True).values
        weights = 0.996 ** torch.arange(ordered.shape[-1])
        return (ordered * weights).sum(-1) / weights.sum()


@pytest.mark.parametrize(
    ("model", "pooling"),
    [
        (lambda: Pooled(MeanPooling()), None),
        (lambda: Pooled(GroupedGeM((3.0, 1.5))), GroupedGeM((3.0, 1.5))),
        (lambda: Pooled(RankPooling(0.9)), RankPooling(0.9)),
        (MaxPooled, None),
        (RankPooled, RankPooling()),
    ],
    ids=["mean", "ggem", "rank", "max", "rank of scores"],
)
def test_contributions_add_up_to_the_score_of_the_host(model, pooling):
    host, pixels = model().eval(), torch.randn(2, 3, 16, 24)
    capture = capture_of(host, pixels, scores=lambda output: output)
    found = ContributionSeed(pooling).contributions(capture, CLASSES)
    torch.testing.assert_close(found.sum(-1), host(pixels).gather(1, CLASSES).detach())
    cam = ContributionSeed(pooling)(capture, CLASSES)
    torch.testing.assert_close(cam.flatten(2), found.clamp_min(0))


@pytest.mark.parametrize("family", ["average pooled", "learned bias"])
def test_behind_a_norm_contributions_add_up_to_the_score_less_its_offsets(family):
    model, pixels = tiny(family)
    found = ContributionSeed().contributions(capture_of(model, pixels), CLASSES).sum(-1)
    offset = model.head(model.fc_norm.bias)
    torch.testing.assert_close(found, (model(pixels) - offset).gather(1, CLASSES).detach())


def scored(name):
    kinds = {"siglip": "vit_base_patch16_siglip_224", "perception": "vit_pe_core_tiny_patch16_384"}
    sizes = {"embed_dim": 64, "num_heads": 4, "depth": 2, "img_size": 64, "num_classes": 5}
    model = shaken(zoo.timm_model(kinds[name], **sizes))
    return model, torch.randn(2, 3, 64, 64)


@torch.no_grad()
def silenced(model, pixels):
    """Scores of a copy whose pooling attention returns nothing."""
    twin = copy.deepcopy(model)
    twin.attn_pool.proj.register_forward_pre_hook(lambda _, args: (args[0] * 0,))
    return twin(pixels)


def test_shares_of_an_attention_head_add_up_to_what_its_attention_is_worth():
    model, pixels = scored("siglip")
    capture = capture_of(model, pixels)
    worth = (model(pixels) - silenced(model, pixels))[:, 3:4].detach()
    asked = torch.tensor([[3], [3]])
    found = ContributionSeed(nodes=16).contributions(capture, asked).sum(-1)
    torch.testing.assert_close(found, worth, rtol=1e-3, atol=1e-3)


def test_a_head_that_is_linear_behind_its_attention_needs_one_node():
    model, pixels = scored("siglip")
    model.attn_pool.mlp = nn.Identity()
    model.attn_pool.norm = nn.Identity()
    capture = capture_of(model, pixels)
    worth = (model(pixels) - silenced(model, pixels)).gather(1, CLASSES).detach()
    found = ContributionSeed(nodes=1).contributions(capture, CLASSES).sum(-1)
    torch.testing.assert_close(found, worth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["siglip", "perception"])
@torch.no_grad()
def test_an_attention_head_scores_each_patch_as_if_it_were_the_only_token(name):
    model, pixels = scored(name)
    tokens = model.forward_features(pixels)[:, model.num_prefix_tokens :]
    alone = [model.forward_head(tokens[:, [i]]) for i in range(tokens.shape[1])]
    found = capture_of(model, pixels).patch_scores()
    torch.testing.assert_close(found, torch.stack(alone, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_classifier_of_class_token_and_mean_scores_a_patch_as_both():
    entry = zoo.ZOO["transformers dinov2"]
    model, pixels = shaken(entry.build()), torch.randn(2, 3, 64, 64)
    with watch(model) as seen:
        model(pixel_values=pixels)
    tokens = model.dinov2(pixel_values=pixels).last_hidden_state[:, 1:]
    expected = model.classifier(torch.cat([tokens, tokens], -1))
    torch.testing.assert_close(seen.capture.patch_scores(), expected, rtol=1e-4, atol=1e-4)


def test_a_group_of_outputs_shares_what_its_outputs_do():
    model, pixels = tiny("average pooled")
    groups = Vocabulary(("pair", "one"), members=((0, 3), (2,)))
    found = ContributionSeed().contributions(
        capture_of(model, pixels, vocabulary=groups), torch.tensor([[0, 1]] * 2)
    )
    each = ContributionSeed().contributions(
        capture_of(model, pixels), torch.tensor([[0, 3, 2]] * 2)
    )
    share = model(pixels)[:, [0, 3]].softmax(-1).detach()
    pair = (share[..., None] * each[:, :2]).sum(1)
    torch.testing.assert_close(found, torch.stack([pair, each[:, 2]], 1))


@pytest.mark.parametrize(
    ("model", "pooling"),
    [(lambda: tiny("vit")[0], None), (lambda: Pooled(MeanPooling()), GroupedGeM())],
    ids=["class token", "another pooling"],
)
def test_a_score_without_exact_shares_is_refused(model, pooling):
    capture = capture_of(model().eval(), torch.randn(2, 3, 64, 64))
    with pytest.raises(UnsupportedModelError, match="patches have no exact share"):
        ContributionSeed(pooling)(capture, CLASSES)


def test_contributions_without_scores_say_what_is_missing():
    entry = zoo.ZOO["timm dinov2"]
    with pytest.raises(CaptureError, match="no class scores"):
        ContributionSeed()(capture_of(entry.build(), torch.randn(2, 3, *entry.shape)), CLASSES)


class PatchHead(OneTokenPerClass):
    """As MCTformer-V2: one token a class, and a convolution that scores patches."""

    def __init__(self):
        super().__init__(class_tokens=5)
        self.head = nn.Conv2d(24, 5, 3, padding=1)

    def maps(self, pixels, tokens=None):
        tokens = self.tokens(pixels) if tokens is None else tokens
        patches = tokens[:, 5:].mT
        return self.head(patches.unflatten(2, (pixels.shape[2] // 8, pixels.shape[3] // 8)))

    def forward(self, pixels):
        tokens = self.tokens(pixels)
        patches = tokens[:, 5:].mean(1)
        return tokens[:, :5].mean(-1), patches, self.maps(pixels, tokens).mean((2, 3))


@pytest.mark.parametrize("root", [False, True])
def test_class_tokens_times_patch_head_is_the_product_of_both(root):
    model, pixels = PatchHead().eval(), torch.randn(2, 3, 16, 24)
    capture = capture_of(model, pixels)
    patch = model.maps(pixels).relu().detach()
    expected = torch.stack([patch[i, row] for i, row in enumerate(CLASSES)])
    head = PatchHeadSeed()(capture, CLASSES)
    torch.testing.assert_close(head, expected)
    attended = ClassAttentionSeed()(capture, CLASSES)
    product = ProductSeed(ClassAttentionSeed(), PatchHeadSeed(), root=root)
    expected = (attended * expected).sqrt() if root else attended * expected
    torch.testing.assert_close(product(capture, CLASSES), expected)


def test_a_host_without_a_patch_head_is_sent_elsewhere():
    with pytest.raises(
        UnsupportedModelError, match=r"no head for patches: .*; use ClassWeightSeed"
    ):
        PatchHeadSeed()(capture_of(*tiny("vit")), CLASSES)


@pytest.mark.parametrize("seed", [ContributionSeed(nodes=1), ClassWeightSeed()], ids=repr)
def test_padded_slots_are_empty_and_leave_the_others(seed):
    capture = capture_of(*scored("siglip"))
    padded = torch.tensor([[1, -1, 0], [-1, 0, -1]])
    found = seed(capture, padded)
    assert not found[padded < 0].any()
    torch.testing.assert_close(found[padded >= 0], seed(capture, CLASSES)[padded >= 0])


def test_sharing_a_score_leaves_the_model_as_it_was():
    model, pixels = scored("siglip")
    before = model(pixels)
    ContributionSeed(nodes=1)(capture_of(model, pixels), CLASSES)
    assert torch.equal(model(pixels), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scores_of_some_classes_are_those_among_the_scores_of_all():
    model, pixels = scored("siglip")
    groups = Vocabulary(("one", "pair", "three"), members=((4,), (0, 3), (1, 2, 3)))
    for vocabulary in (None, groups):
        capture = capture_of(model, pixels, vocabulary=vocabulary)
        every = capture.patch_scores()
        torch.testing.assert_close(capture.patch_scores([2, 0]), every[..., [2, 0]])
