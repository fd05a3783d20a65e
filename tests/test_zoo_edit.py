"""Every host family: an edit does what the same change does when made by hand."""

import copy

import pytest
import torch
from test_zoo import opened, plain
from zoo import ZOO, reweighed

from camkit import UnsupportedModelError, attach, watch
from camkit.edits import PairBias, ScaleOutput

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
KEYS = 40  # more than any host of the zoo has
ONE_OF_EACH_KIND = (
    "timm vit",
    "timm beit",
    "timm parallel scaling",
    "timm cait",
    "torchvision",
    "open_clip own attention",
    "transformers vit",
    "transformers vit eager",
)


class Tilt:
    """Adds fixed log-weights to the keys of every block; pooling queries are left alone."""

    def __init__(self, weights):
        self.weights = weights

    def log_weights(self, _, attention, __):
        weights = self.weights[..., : attention.shape[3]]
        return torch.zeros_like(weights) if attention.shape[2] == 1 else weights


def furthest(one, other):
    """The largest change over all outputs."""
    pairs = zip(plain(one), plain(other), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def by_hand(model, factor):
    """A copy whose first two attention modules, by the name of their type, are scaled by hooks."""
    model = copy.deepcopy(model)
    names = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Attention", "Attn", "AttentionRope"))
        and "text" not in name
    ]
    # of nested ones the outer, which projects
    inner = [name for name in names if name.rpartition(".")[0] in names]
    modules = [model.get_submodule(name) for name in names if name not in inner]

    def scale(_, __, output):
        if isinstance(output, tuple):
            return (output[0] * factor, *output[1:])
        return output * factor

    for module in modules[:2]:
        module.register_forward_hook(scale)
    return model


@pytest.mark.parametrize("name", ZOO)
def test_log_weights_on_keys_tilt_the_maps_of_the_host(name):
    entry, model, call = opened(name)
    weights = torch.randn(2, KEYS)
    with torch.no_grad():
        before = call(model)
        expected = entry.tilted(model, call, weights)
        with attach(model, Tilt(weights)):
            tilted = call(model)
        after = call(model)
    assert furthest(expected, before) > 1e-3
    for one, two in zip(plain(tilted), plain(expected), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
    assert furthest(after, before) == 0.0


@pytest.mark.parametrize("name", ZOO)
def test_log_weights_of_zero_move_no_output(name):
    _, model, call = opened(name)
    with torch.no_grad():
        before = call(model)
        with attach(model, Tilt(torch.zeros(2, KEYS))):
            assert furthest(call(model), before) <= 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_each_head_can_have_log_weights_of_its_own(name):
    entry, model, call = opened(name)
    with torch.no_grad():
        heads = entry.maps(model, call)[0].shape[1]
        weights = torch.randn(2, heads, KEYS)
        expected = entry.tilted(model, call, weights)
        with attach(model, Tilt(weights)):
            tilted = call(model)
        same_for_all = entry.tilted(model, call, weights.mean(1))
    for one, two in zip(plain(tilted), plain(expected), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
    assert furthest(tilted, same_for_all) > 1e-3


class TiltPairs:
    """Adds the products of fixed features to the logits of every pair of tokens."""

    def __init__(self, queries, keys):
        self.queries, self.keys = queries, keys

    def pair_bias(self, _, attention, __):
        tokens = attention.shape[2]
        return PairBias(self.queries[..., :tokens, :], self.keys[..., :tokens, :])


def pairs_in_the_host(name, *, heads=None):
    """Outputs before, under the edit, by hand and after; and the maps that a watch recorded."""
    entry, model, call = opened(name)
    shape = (2, KEYS, 5) if heads is None else (2, heads, KEYS, 5)
    queries, keys = torch.randn(2, *shape).unbind(0)
    bias = queries @ keys.mT
    bias = bias[:, None] if heads is None else bias
    with torch.no_grad():
        before, maps = call(model), entry.maps(model, call)
        expected = entry.tilted(model, call, bias)
        with attach(model, TiltPairs(queries, keys), blocks="all"), watch(model) as s:
            tilted = call(model)
        after = call(model)
    first = next(place for place, m in enumerate(maps) if m.shape[2] > 1)
    return (before, tilted, expected, after), reweighed(maps[first], bias), s


@pytest.mark.parametrize("name", ZOO)
def test_a_bias_of_pairs_tilts_the_maps_of_the_host_and_of_the_capture(name):
    (before, tilted, expected, after), first_map, seen = pairs_in_the_host(name)
    assert furthest(expected, before) > 1e-3
    for one, two in zip(plain(tilted), plain(expected), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
    assert furthest(after, before) == 0.0
    recorded = next(c for c in seen.passes[0].blocks if c.shape[2] > 1)
    rows = recorded.rows(range(recorded.shape[2]))
    torch.testing.assert_close(rows, first_map, **CLOSE)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
    torch.testing.assert_close(recorded.head_mean(), first_map.mean(1), **CLOSE)
    torch.testing.assert_close(recorded.columns([0, 2]), first_map[..., [0, 2]], **CLOSE)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_each_head_can_have_a_bias_of_its_own(name):
    entry, model, call = opened(name)
    with torch.no_grad():
        heads = entry.maps(model, call)[0].shape[1]
    (_, tilted, expected, _), _, _ = pairs_in_the_host(name, heads=heads)
    for one, two in zip(plain(tilted), plain(expected), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "timm parallel scaling"])
def test_scaled_blocks_give_what_plain_hooks_give(name):
    _, model, call = opened(name)
    with torch.no_grad():
        before = call(model)
        expected = call(by_hand(model, 2.0))
        with attach(model, ScaleOutput(2.0), blocks=[0, 1]):
            scaled = call(model)
    assert furthest(expected, before) > 1e-3
    for one, two in zip(plain(scaled), plain(expected), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


def words():
    return torch.randint(1, 40, (2, 8))


@pytest.mark.parametrize(
    "edit", [Tilt(torch.randn(2, KEYS)), ScaleOutput(2.0)], ids=["keys", "out"]
)
@pytest.mark.parametrize(
    ("name", "embed"),
    [
        ("open_clip", lambda model, text: model.encode_text(text)),
        ("transformers clip whole", lambda model, text: model.get_text_features(input_ids=text)),
    ],
)
def test_a_text_tower_is_not_edited(name, embed, edit):
    _, model, call = opened(name)
    text = words()
    with torch.no_grad():
        before, image = embed(model, text), call(model)
        with attach(model, edit):
            assert furthest(embed(model, text), before) == 0.0
            assert furthest(call(model), image) > 1e-3


def test_a_text_tower_is_not_edited_in_a_call_with_images_and_text():
    _, model, _ = opened("open_clip")
    pixels, text = torch.randn(2, 3, 64, 64), words()
    with torch.no_grad():
        image, words_alone, _ = model(pixels, text)
        with attach(model, Tilt(torch.randn(2, KEYS))):
            tilted, words_beside, _ = model(pixels, text)
    assert torch.equal(words_beside, words_alone)
    assert (tilted - image).abs().max() > 1e-3


def test_a_block_that_holds_its_mlp_takes_edits_of_keys_only():
    _, model, _ = opened("timm parallel scaling")
    with pytest.raises(UnsupportedModelError, match="an edit of keys can"):
        attach(model, ScaleOutput(2.0))
