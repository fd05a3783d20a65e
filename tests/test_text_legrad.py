"""LeGrad against texts, on tiny CLIP and SigLIP models, beside each block written out."""

import pytest
import torch
import torch.nn.functional as F
from helpers import capture_of
from test_text_similarity import NAMES, build

import camkit
from camkit.errors import CaptureError

CLASSES = torch.tensor([[1, 0], [2, -1]])
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def opened(name):
    model, tokenize, encode = build(name)
    return model, camkit.seeds.TextClasses.from_prompts(model, NAMES, tokenize=tokenize), encode


def blocks_of(model):
    if hasattr(model, "visual"):
        return list(model.visual.transformer.resblocks)
    return list(model.vision_model.encoder.layers)


def passed(model, encode):
    """Tokens that enter and leave each block."""
    kept = []
    hooks = [
        block.register_forward_hook(lambda _, given, left: kept.append((given[0], left)))
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        encode(PIXELS)
    for hook in hooks:
        hook.remove()
    return kept


def left_by(block, tokens):
    """What a block makes of tokens, with its attention maps as leaves; and these maps."""
    if hasattr(block, "attn"):
        attention, norms = block.attn, (block.ln_1, block.ln_2)
        inwards = F.linear(norms[0](tokens), attention.in_proj_weight, attention.in_proj_bias)
        three = inwards.chunk(3, -1)
    else:
        attention, norms = block.self_attn, (block.layer_norm1, block.layer_norm2)
        normed = norms[0](tokens)
        three = [getattr(attention, f"{part}_proj")(normed) for part in "qkv"]
    q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in three)
    maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).detach().requires_grad_()
    middle = tokens + attention.out_proj((maps @ v).transpose(1, 2).flatten(2))
    return middle + block.mlp(norms[1](middle)), maps


def likeness(model, text, token):
    if hasattr(model, "visual"):
        embedded = model.visual.ln_post(token) @ model.visual.proj
    else:
        embedded = model.visual_projection(model.vision_model.post_layernorm(token))
    return text.scale * F.normalize(embedded, dim=-1) @ text.embeddings.T


@pytest.mark.parametrize("token", ["mean", "class"])
@pytest.mark.parametrize("name", ["open_clip", "transformers clip"])
def test_each_block_answers_for_the_likeness_of_its_own_token(name, token):
    model, text, encode = opened(name)
    seed = camkit.seeds.LeGradSeed(token=token, text=text)
    found = seed(capture_of(model, PIXELS, seed, call=encode), CLASSES).flatten(2)
    expected = torch.zeros(2, 2, 16)
    for block, (tokens, after) in zip(blocks_of(model), passed(model, encode), strict=True):
        left, maps = left_by(block, tokens)
        torch.testing.assert_close(left, after)
        scored = left.mean(1) if token == "mean" else left[:, 0]
        scores = likeness(model, text, scored)
        for image, row in enumerate(CLASSES):
            for slot, index in enumerate(row):
                if index >= 0:
                    (slope,) = torch.autograd.grad(scores[image, index], maps, retain_graph=True)
                    rows = slope[image] if token == "mean" else slope[image, :, :1]
                    expected[image, slot] += rows.clamp_min(0).mean((0, 1))[1:] / 2
    assert expected[0].amin(1).min() >= 0 < expected[0].amax()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_pooling_head_answers_for_the_tokens_of_each_block():
    model, text, encode = opened("transformers siglip")
    seed = camkit.seeds.LeGradSeed(token="pool", text=text)
    found = seed(capture_of(model, PIXELS, seed, call=encode), CLASSES).flatten(2)
    tower = model.vision_model
    head, expected = tower.head, torch.zeros(2, 2, 16)
    for _, left in passed(model, encode):
        tokens = tower.post_layernorm(left)
        inwards = zip(
            (head.probe.expand(2, -1, -1), tokens, tokens),
            head.attention.in_proj_weight.chunk(3),
            head.attention.in_proj_bias.chunk(3),
            strict=True,
        )
        q, k, v = (F.linear(*each).unflatten(-1, (4, -1)).transpose(1, 2) for each in inwards)
        maps = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).detach().requires_grad_()
        pooled = head.attention.out_proj((maps @ v).transpose(1, 2).flatten(2))[:, 0]
        pooled = pooled + head.mlp(head.layernorm(pooled))
        scores = text.scale * F.normalize(pooled, dim=-1) @ text.embeddings.T
        for image, row in enumerate(CLASSES):
            for slot, index in enumerate(row):
                if index >= 0:
                    (slope,) = torch.autograd.grad(scores[image, index], maps, retain_graph=True)
                    expected[image, slot] += slope[image, :, 0].clamp_min(0).mean(0) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_token_that_does_not_fit_the_texts_is_refused_at_once():
    _, clip, _ = opened("open_clip")
    _, siglip, _ = opened("transformers siglip")
    with pytest.raises(ValueError, match=r"this `text` `token` must be .*, got 'pool'"):
        camkit.seeds.LeGradSeed(token="pool", text=clip)
    with pytest.raises(ValueError, match="as the head pools by attention, got 'mean'"):
        camkit.seeds.LeGradSeed(text=siglip)


def test_a_forward_that_was_watched_for_less_is_refused():
    model, text, encode = opened("open_clip")
    with torch.no_grad(), camkit.watch(model) as seen:
        encode(PIXELS)
    with pytest.raises(CaptureError, match="does not hold the tokens that leave each block"):
        camkit.seeds.LeGradSeed(text=text)(seen.capture, CLASSES)
