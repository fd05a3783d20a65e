"""Patches and texts in one space, on tiny CLIP and SigLIP models with both towers."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from hosts import shaken
from optional import open_clip, transformers
from torch import nn

from camkit import attach, watch
from camkit.edits import StaticCalibration
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.seeds import JointSpace, TextClasses, TextSimilaritySeed

VISION = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 16, "image_size": 64}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
SIDES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIDES |= {"intermediate_size": 64}
NAMES = ["cat", "dog", "horse"]
CLASSES = torch.tensor([[1, 0, 2], [2, 0, 1]])


def words(prompts):
    """A tokenizer that gives every text its own numbers; the last is the largest, as in CLIP."""
    rows = [[1 + sum(map(ord, text[i : i + 4])) % 47 for i in range(0, 28, 4)] for text in prompts]
    return torch.tensor([[*row, 49] for row in rows])


def as_mapping(prompts):
    return {"input_ids": words(prompts)}


def transformed(kind, config, **more):
    vision = {**SIDES, "image_size": 64, "patch_size": 16}
    ends = {"bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0}
    text = {**SIDES, "vocab_size": 50, "max_position_embeddings": 8, **ends}
    settings = getattr(transformers, config)(vision_config=vision, text_config=text, **more)
    return getattr(transformers, kind)(settings)


def build(name):
    """A model with shaken weights, and how its towers are called."""
    if name == "open_clip":
        model = shaken(open_clip.model.CLIP(16, VISION, TEXT))
        return model, words, model.encode_image
    if name == "transformers clip":
        model = shaken(transformed("CLIPModel", "CLIPConfig", projection_dim=16))
    else:
        model = shaken(transformed("SiglipModel", "SiglipConfig"))
    return model, as_mapping, lambda x: model.get_image_features(pixel_values=x)


@pytest.fixture(scope="module", params=["open_clip", "transformers clip", "transformers siglip"])
def opened(request):
    model, tokenize, encode = build(request.param)
    text = TextClasses.from_prompts(model, NAMES, tokenize=tokenize, background=("sky", "road"))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), watch(model, scores=text.scores) as seen:
        encode(pixels)
    return model, tokenize, text, pixels, seen.capture


def host_logits(model, tokenize, pixels, prompts):
    """Image-text logits by the model's own forward."""
    with torch.no_grad():
        if hasattr(model, "encode_image"):
            image, text, scale = model(pixels, tokenize(prompts))
            return scale * image @ text.T
        return model(pixel_values=pixels, **tokenize(prompts)).logits_per_image


def test_scores_of_one_prompt_are_the_logits_of_the_model(opened):
    model, tokenize, _, pixels, capture = opened
    text = TextClasses.from_prompts(model, NAMES, tokenize=tokenize, templates=["a {}"])
    expected = host_logits(model, tokenize, pixels, [f"a {name}" for name in NAMES])
    embedded = text.known_space().images(capture)
    torch.testing.assert_close(text.logits(embedded), expected, rtol=1e-4, atol=1e-4)


def test_the_space_embeds_images_as_the_model_does(opened):
    _, _, text, _, capture = opened
    found = text.logits(text.known_space().images(capture))
    torch.testing.assert_close(found, capture.scores, rtol=1e-4, atol=1e-4)


def test_a_class_is_the_mean_of_its_prompts_each_of_length_one(opened):
    model, tokenize, *_ = opened
    synonyms = ["cat, kitten"]
    found = TextClasses.from_prompts(model, synonyms, tokenize=tokenize, templates=["a {}", "{}s"])
    prompts = ["a cat", "cats", "a kitten", "kittens"]
    single = [
        TextClasses.from_prompts(model, [p], tokenize=tokenize, templates=["{}"]).embeddings[0]
        for p in prompts
    ]
    expected = F.normalize(torch.stack(single).mean(0), dim=-1)
    torch.testing.assert_close(found.embeddings[0], expected)


def patch_cosines(model, text, capture, pixels):
    """The path of a class token, or of a pooling head, written out for single patches."""
    with torch.no_grad():
        if hasattr(model, "visual"):
            visual = model.visual
            tokens = visual.ln_post(visual.transformer(visual._embeds(pixels)))[:, 1:]
            embedded = tokens @ visual.proj
        else:
            tower = model.vision_model
            states = tower(pixel_values=pixels).last_hidden_state
            if hasattr(model, "visual_projection"):
                embedded = model.visual_projection(tower.post_layernorm(states[:, 1:]))
            else:  # SigLIP's last states are behind its norm
                embedded = torch.stack([tower.head(states[:, [i]]) for i in range(16)], 1)
    every = torch.cat([text.embeddings, text.background])
    return F.normalize(embedded, dim=-1) @ every.T


def expected_scores(variant, cosines, whole, scale):
    if variant == "softmax":
        return (scale * cosines).softmax(-1)[..., :3]
    if variant == "similarity":
        return cosines[..., :3]
    sure = (2 * whole).softmax(-1)
    weights = sure / sure.mean(-1, keepdim=True)
    found = torch.zeros(2, 16, 3)
    for image in range(2):
        for patch in range(16):
            weighted = weights[image] * cosines[image, patch]
            found[image, patch] = (weighted - weighted.mean())[:3]
    return found


@pytest.mark.parametrize("variant", ["similarity", "softmax", "surgery"])
def test_patches_are_compared_with_texts_as_the_class_token_is(opened, variant):
    model, _, text, pixels, capture = opened
    cosines = patch_cosines(model, text, capture, pixels)
    embedded = text.known_space().images(capture)
    whole = embedded @ torch.cat([text.embeddings, text.background]).T
    expected = expected_scores(variant, cosines, whole, text.scale)
    seed = TextSimilaritySeed(text, variant=variant)
    torch.testing.assert_close(seed.scores(capture), expected, rtol=1e-4, atol=1e-4)
    maps = torch.stack([expected[i, :, row].T for i, row in enumerate(CLASSES)])
    if variant != "softmax":
        maps = (maps - maps.mean(-1, keepdim=True)).clamp_min(0)
    torch.testing.assert_close(seed(capture, CLASSES).flatten(2), maps, rtol=1e-4, atol=1e-4)


def test_surgery_removes_the_products_that_all_texts_share_channel_by_channel(opened):
    _, _, text, _, capture = opened
    patches = text.known_space().patches(capture)
    every = torch.cat([text.embeddings, text.background])
    sure = (2 * text.known_space().images(capture) @ every.T).softmax(-1)
    products = patches[:, :, None] * every * (sure / sure.mean(-1, keepdim=True))[:, None, :, None]
    expected = (products - products.mean(2, keepdim=True)).sum(-1)[..., :3]
    found = TextSimilaritySeed(text).scores(capture)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_maps_of_excel_are_those_of_its_formula():
    """Channels of unit length over all tokens; products less their mean; min-max with the class."""
    model, tokenize, _ = build("open_clip")
    text = TextClasses.from_prompts(model, NAMES, tokenize=tokenize, background=("sky", "road"))
    pixels, normed = torch.randn(2, 3, 64, 64), []
    model.visual.ln_post.register_forward_hook(lambda *call: normed.append(call[-1]))
    calibrated = attach(model.visual, StaticCalibration(), blocks=2)
    with torch.no_grad(), calibrated, watch(model.visual, scores=text.scores) as seen:
        model.encode_image(pixels)
    tokens = normed[-1] @ model.visual.proj
    tokens = tokens / tokens.pow(2).sum(1, keepdim=True).sqrt()
    every = torch.cat([text.embeddings, text.background])
    sure = (2 * tokens[:, 0] @ every.T).softmax(-1)
    products = tokens[:, :, None] * every * (sure / sure.mean(-1, keepdim=True))[:, None, :, None]
    scores = (products - products.mean(2, keepdim=True)).sum(-1)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    expected = ((scores - low) / (high - low))[:, 1:]
    seed = TextSimilaritySeed(text, variant="excel")
    found = seed(seen.capture, CLASSES)
    for image, classes in enumerate(CLASSES.tolist()):
        for slot, index in enumerate(classes):
            plane = expected[image, :, index].view(4, 4).detach()
            torch.testing.assert_close(found[image, slot], plane, rtol=1e-4, atol=1e-5)


def test_excel_needs_a_class_token(opened):
    _, _, text, _, capture = opened
    if text.known_space().pools:
        with pytest.raises(ValueError, match="class token, which a model that pools by attention"):
            TextSimilaritySeed(text, variant="excel")
    else:
        several = replace(capture, anatomy=replace(capture.anatomy, class_tokens=(0, 1)))
        with pytest.raises(CaptureError, match="needs one class token, but this model has 2"):
            TextSimilaritySeed(text, variant="excel")(several, CLASSES)


@pytest.mark.parametrize("variant", ["similarity", "softmax", "surgery"])
def test_permuted_prompts_give_permuted_scores(opened, variant):
    model, tokenize, text, _, capture = opened
    order = [2, 0, 1]
    permuted = TextClasses.from_prompts(
        model, [NAMES[i] for i in order], tokenize=tokenize, background=("road", "sky")
    )
    found = TextSimilaritySeed(permuted, variant=variant).scores(capture)
    expected = TextSimilaritySeed(text, variant=variant).scores(capture)[..., order]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_text_that_all_classes_share_leaves_nothing_after_surgery(opened):
    *_, capture = opened
    text = opened[2]
    same = TextClasses(("a", "b"), text.embeddings[[0, 0]], space=text.space)
    found = TextSimilaritySeed(same).scores(capture)
    torch.testing.assert_close(found, torch.zeros(2, 16, 2), atol=1e-6, rtol=0)


def test_padded_classes_are_empty_and_unknown_ones_refused(opened):
    *_, capture = opened
    seed = TextSimilaritySeed(opened[2])
    found = seed(capture, torch.tensor([[1, -1], [-1, 0]]))
    assert not found[0, 1].any()
    assert not found[1, 0].any()
    assert found[0, 0].max() > 0
    with pytest.raises(ValueError, match="must lie in 0 to 2"):
        seed(capture, torch.tensor([[3], [0]]))


def test_calibration_changes_patches_and_not_the_image(opened):
    model, _, text, pixels, capture = opened
    run = model.encode_image if hasattr(model, "encode_image") else model.get_image_features
    with attach(model, StaticCalibration(), blocks=1), torch.no_grad(), watch(model) as seen:
        run(pixels)
    space = text.known_space()
    assert not torch.allclose(space.patches(seen.capture), space.patches(capture), atol=1e-3)
    if capture.anatomy.class_tokens:
        assert torch.equal(space.images(seen.capture), space.images(capture))


class TimmTower(nn.Module):
    """As open_clip's TimmModel: a trunk and a projection."""

    def __init__(self):
        super().__init__()
        sizes = {"embed_dim": 64, "num_heads": 4, "depth": 2, "img_size": 64, "num_classes": 0}
        self.trunk = timm.create_model("vit_base_patch16_siglip_224", **sizes)
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Linear(64, 16))

    def forward(self, x):
        return self.head(self.trunk(x))


@torch.no_grad()
def test_timm_towers_of_open_clip_are_embedded_as_their_model_does():
    host = nn.Module()
    host.visual = shaken(TimmTower())
    pixels = torch.randn(2, 3, 64, 64)
    with watch(host.visual) as seen:
        expected = F.normalize(host.visual(pixels), dim=-1)
    found = JointSpace.of(host).images(seen.capture)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_another_form_is_refused_with_a_way_out():
    with pytest.raises(UnsupportedModelError, match=r"camkit.seeds.JointSpace\(\(norm.forward"):
        JointSpace.of(nn.Linear(3, 3))


def test_texts_without_a_space_say_what_to_give(opened):
    *_, capture = opened
    with pytest.raises(ValueError, match=r"JointSpace\.of"):
        TextSimilaritySeed(TextClasses(("a", "b"), torch.eye(2, 16)))(capture, CLASSES * 0)


def test_tokens_that_no_block_returned_are_missed_with_words(opened):
    _, _, text, _, capture = opened
    with pytest.raises(CaptureError, match="tokens that leave the last block were not recorded"):
        text.known_space().patches(replace(capture, tail=()))


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: TextClasses((), torch.zeros(0, 4)), "one row for each of the 0 names"),
        (lambda: TextClasses(("a",), torch.ones(2, 4)), "each of the 1 names, got 2"),
        (lambda: TextClasses(("a",), torch.zeros(1, 4)), "finite rows that are not zero"),
        (lambda: TextClasses(("a",), torch.ones(1, 4), torch.ones(1, 3)), "as wide as"),
        (lambda: TextClasses(("a",), torch.ones(1, 4), scale=0.0), "must be positive, got 0"),
        (
            lambda: TextSimilaritySeed(TextClasses(("a",), torch.ones(1, 4))),
            "needs at least two",
        ),
        (
            lambda: TextSimilaritySeed(TextClasses(("a",), torch.ones(1, 4)), variant="cosine"),
            '`variant` must be "similarity", "softmax", "surgery" or "excel", got .cosine.',
        ),
    ],
)
def test_classes_and_settings_that_cannot_be_are_refused(build_it, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        build_it()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": "cat"}, "list of at least one name, got 'cat'"),
        ({"names": []}, "list of at least one name"),
        ({"names": [" , "]}, "must not be blank"),
        ({"names": ["cat"], "templates": ["a photo"]}, "in the place of the name, got .'a photo'"),
    ],
)
def test_prompts_that_cannot_be_are_refused(opened, options, message, no_shape_checks):
    model, tokenize, *_ = opened
    with pytest.raises(ValueError, match=message):
        TextClasses.from_prompts(model, tokenize=tokenize, **options)


def test_a_model_without_a_text_tower_says_to_embed_the_prompts_oneself():
    with pytest.raises(UnsupportedModelError, match="embed the prompts"):
        TextClasses.from_prompts(nn.Linear(3, 3), ["cat"], tokenize=words)
