"""Seeds for models without a classifier, on patches whose grouping is known."""

from dataclasses import replace

import pytest
import torch
from hosts import tiny

from camkit import watch
from camkit.capture import Anatomy, Capture
from camkit.capture.attention import ExplicitAttention, FusedAttention
from camkit.errors import CaptureError
from camkit.grid import Grid
from camkit.seeds import (
    ClassAttentionSeed,
    LOSTSeed,
    PrototypeSeed,
    TokenCutSeed,
)

ROWS, COLS = 4, 6
SEEDS = [TokenCutSeed(), LOSTSeed(), PrototypeSeed()]
EVERY = torch.tensor([[0, 7]])


def of_keys(keys, class_query=None):
    """A capture of one block with these patch keys and a class token in front."""
    keys = torch.cat([torch.zeros_like(keys[:, :1]), keys], 1)
    queries = torch.zeros_like(keys)
    if class_query is not None:
        queries[:, 0] = class_query
    attention = FusedAttention(queries[:, None], keys[:, None], 1.0)
    return Capture((attention,), ("attn",), Anatomy(class_tokens=(0,)), Grid(ROWS, COLS))


def thing_mask():
    mask = torch.zeros(ROWS, COLS)
    mask[1:3, 2:4] = 1.0
    return mask


def two_groups(noise=0.05):
    """Keys of a thing of 2x2 patches, at right angles to those of the background."""
    mask = thing_mask().flatten()[:, None]
    keys = mask * torch.tensor([0.0, 3.0, 0.0]) + (1 - mask) * torch.tensor([3.0, 0.0, 0.0])
    return (keys + noise * torch.randn(keys.shape))[None]


@pytest.mark.parametrize("seed", [TokenCutSeed(), LOSTSeed(count=4)], ids=repr)
def test_the_smaller_of_two_groups_is_the_thing(seed):
    keys = two_groups()
    keys[..., 1] -= 0.5 * (1 - thing_mask().flatten())  # a little against each other, for LOST
    found = seed(of_keys(keys), EVERY)
    for cam in found[0]:
        assert torch.equal((cam > 0.5 * cam.max()).float(), thing_mask())


def test_the_cut_is_the_second_solution_of_the_generalised_problem():
    keys = torch.randn(1, ROWS * COLS, 8)
    unit = keys[0].double() / keys[0].double().norm(dim=-1, keepdim=True)
    weights = torch.where(unit @ unit.T > 0.1, 1.0, 1e-3).double()
    degree = weights.sum(-1).diag()
    values, vectors = torch.linalg.eig(torch.linalg.inv(degree) @ (degree - weights))
    vector = vectors[:, values.real.argsort()[1]].real
    vector = vector * vector[vector.abs().argmax()].sign()
    expected = (vector - vector.mean()).clamp_min(0)
    found = TokenCutSeed(threshold=0.1, weak=1e-3)(of_keys(keys), EVERY)[0, 0].flatten()
    torch.testing.assert_close(
        found / found.max(), (expected / expected.max()).float(), rtol=1e-3, atol=1e-3
    )


def test_lost_joins_the_patches_that_are_like_the_loneliest():
    keys = torch.randn(1, ROWS * COLS, 5)
    products = (keys[0] @ keys[0].T).tolist()
    fewest = sorted(range(24), key=lambda i: (sum(p >= 0 for p in products[i]), i))
    joined = [j for j in fewest[:7] if products[fewest[0]][j] >= 0]
    expected = torch.tensor([max(sum(products[j][i] for j in joined), 0.0) for i in range(24)])
    found = LOSTSeed(count=7)(of_keys(keys), EVERY)[0, 1].flatten()
    torch.testing.assert_close(found, expected)


def test_a_prototype_is_the_weighted_mean_of_patches_pointed_at():
    keys = torch.randn(1, ROWS * COLS, 5)
    capture = of_keys(keys, class_query=torch.tensor([1.0, 0.5, 0.0, 0.0, -1.0]))
    unit = keys[0] / keys[0].norm(dim=-1, keepdim=True)
    weights = ClassAttentionSeed()(capture, EVERY)[0, 0].flatten()
    mean = sum(float(w) * u for w, u in zip(weights, unit, strict=True))
    likeness = torch.stack([torch.dot(u, mean) / mean.norm() for u in unit])
    expected = (likeness - likeness.mean()).clamp_min(0)
    found = PrototypeSeed()(capture, EVERY)[0]
    torch.testing.assert_close(found[0].flatten(), expected)
    torch.testing.assert_close(found[1], found[0])


def test_a_prototype_fills_the_thing_from_one_patch_of_it():
    capture = of_keys(two_groups())

    found = PrototypeSeed(OnePatch())(capture, EVERY)[0, 0]
    assert torch.equal((found > 0.5 * found.max()).float(), thing_mask())


class OnePatch:
    """Points at one patch of the thing."""

    gradients = False

    def __call__(self, *_):
        cam = torch.zeros(1, 2, ROWS, COLS)
        cam[..., 1, 2] = 1.0
        return cam


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "explicit softmax"])
def test_maps_of_real_hosts_are_never_negative_and_padding_is_empty(family):
    model, pixels = tiny(family, num_classes=0, depth=2)
    with watch(model) as seen:
        model(pixels)
    for plain in SEEDS:
        seed = replace(plain, features="tokens") if family == "explicit softmax" else plain
        found = seed(seen.capture, torch.tensor([[0, -1], [-1, 900]]))
        assert (found >= 0).all(), seed
        assert found[0, 0].max() > 0, seed
        assert not found[0, 1].any(), seed
        assert not found[1, 0].any(), seed
        assert not found.requires_grad, seed


@pytest.mark.parametrize("seed", SEEDS, ids=repr)
def test_an_image_is_seeded_the_same_beside_another(seed):
    keys = torch.randn(2, ROWS * COLS, 6)
    both = seed(of_keys(keys), torch.tensor([[0], [0]]))
    for image in range(2):
        alone = seed(of_keys(keys[image : image + 1]), torch.tensor([[0]]))
        torch.testing.assert_close(both[[image]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS, ids=repr)
def test_attention_that_hides_its_keys_says_what_to_compare_instead(seed):
    maps = torch.rand(1, 1, 25, 25).softmax(-1)
    anatomy = Anatomy(class_tokens=(0,))
    capture = Capture((ExplicitAttention(maps),), ("attn",), anatomy, Grid(ROWS, COLS))
    with pytest.raises(CaptureError, match='use `features="tokens"`'):
        seed(capture, EVERY)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TokenCutSeed(threshold=1.0), r"must lie in \[-1, 1\), got 1.0"),
        (lambda: TokenCutSeed(weak=0.0), r"must lie in \(0, 1\), got 0"),
        (lambda: LOSTSeed(count=0), "at least 1, got 0"),
        (lambda: PrototypeSeed(features="values"), 'be "keys" or "tokens", got .values.'),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words, no_shape_checks):
    with pytest.raises(ValueError, match=words):
        build()


def test_all_are_seeds_without_gradients():
    assert not any(seed.requires.gradients for seed in SEEDS)
