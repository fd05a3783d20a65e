"""Research forks: camkit sees and tilts what each one computes, whatever form it gave it."""

import copy

import oracles
import pytest
import torch
from forks import FORKS, GRID, MODULES, PrivateCopy, SeCo, attention_of, written_out
from hosts import shaken
from torch import nn

from camkit import attach, watch
from camkit.contrib import LogitLensSeed
from camkit.edits import ScaleOutput
from camkit.errors import CaptureError, UnsupportedModelError
from camkit.grid import Grid
from camkit.seeds import (
    ClassWeightSeed,
    EigenCAMSeed,
    GradientSeed,
    PatchHeadSeed,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ALL = torch.arange(5).expand(3, 5)  # every class, of every image
IMAGES = torch.arange(3.0)[:, None, None]
SCORED = [name for name, fork in FORKS.items() if fork.scores]


@pytest.fixture(params=FORKS)
def name(request):
    return request.param


def opened(name):
    fork = FORKS[name]
    model, pixels = fork.build()
    return fork, model, pixels, lambda host: fork.call(host, pixels)


def watched(name, model):
    return watch(model, **FORKS[name].options)


def attached(name, model, edit):
    options = FORKS[name].options
    return attach(model, edit, **{key: options[key] for key in options if key != "grid"})


def seen_by(name, model, pixels, **options):
    with watch(model, **FORKS[name].options, **options) as seen:
        FORKS[name].call(model, pixels)
    return seen.capture


def tensors(output):
    return list(output) if isinstance(output, tuple) else [output]


def log_weights(images, keys, strength=2.0):
    """Another weight for every key of every image."""
    return strength * torch.arange(images * keys).sin().view(images, keys)


class Tilt:
    def __init__(self, strength=2.0):
        self.strength = strength

    def log_weights(self, tokens, attention, anatomy):  # noqa: ARG002
        return log_weights(attention.shape[0], attention.shape[3], self.strength)


def tilted(fork, model, pixels):
    """The written-out fork under `Tilt`."""
    keys = written_out(fork, model, pixels)[1][0].shape[3]
    return written_out(fork, model, pixels, log_weights(len(pixels), keys))


def test_the_written_out_fork_returns_what_the_fork_does(name):
    fork, model, pixels, call = opened(name)
    expected = tensors(written_out(fork, model, pixels)[0])
    for mine, theirs in zip(tensors(call(model)), expected, strict=True):
        torch.testing.assert_close(mine, theirs.float(), **CLOSE)


def test_captured_maps_are_the_written_out_ones(name):
    fork, model, pixels, _ = opened(name)
    blocks = seen_by(name, model, pixels).blocks
    _, maps = written_out(fork, model, pixels)
    for block, whole in zip(blocks, (m.float() for m in maps), strict=True):
        assert block.shape == whole.shape
        torch.testing.assert_close(block.rows([0, 7]), whole[:, :, [0, 7]], atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(block.columns([1, 9]), whole[..., [1, 9]], atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(block.head_mean(), whole.mean(1), atol=2e-6, rtol=1e-4)


def test_token_roles_and_grid_are_found(name):
    fork, model, pixels, _ = opened(name)
    capture = seen_by(name, model, pixels)
    anatomy = capture.anatomy
    assert (anatomy.class_tokens, anatomy.distillation_tokens) == fork.roles
    assert (anatomy.register_tokens, anatomy.other_tokens) == ((), ())
    assert capture.grid == Grid(*fork.options.get("grid", GRID))


@pytest.mark.parametrize(
    "use", [watched, lambda *told: attached(*told, Tilt(0.0))], ids=["watched", "weights of one"]
)
def test_outputs_stay_and_come_back_to_the_same_bits_without_a_hook(name, use):
    _, model, _, call = opened(name)
    before = tensors(call(model))
    with use(name, model):
        during = tensors(call(model))
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    assert not any(getattr(module, kind) for module in model.modules() for kind in kinds)
    assert torch._C._len_torch_function_stack() == 0
    for one, two, three in zip(before, during, tensors(call(model)), strict=True):
        torch.testing.assert_close(two, one, **CLOSE)
        assert torch.equal(three, one)


@pytest.mark.parametrize("name", SCORED)
def test_class_scores_are_those_the_fork_returns(name):
    _, model, pixels, call = opened(name)
    assert torch.equal(seen_by(name, model, pixels).scores, tensors(call(model))[0])


@pytest.mark.parametrize("name", [name for name in FORKS if name not in SCORED])
def test_an_embedding_is_not_taken_for_class_scores(name):
    _, model, pixels, _ = opened(name)
    with pytest.raises(CaptureError, match="no class scores"):
        seen_by(name, model, pixels).scores  # noqa: B018


def test_tilted_keys_give_what_the_written_out_fork_says(name):
    fork, model, pixels, call = opened(name)
    plain, _ = written_out(fork, model, pixels)
    expected, _ = tilted(fork, model, pixels)
    with attached(name, model, Tilt()):
        found = tensors(call(model))
    for one, two, three in zip(found, tensors(expected), tensors(plain), strict=True):
        torch.testing.assert_close(one, two.float(), **CLOSE)
        assert not torch.allclose(two, three, atol=1e-3)


@pytest.mark.parametrize("edit_first", [True, False], ids=["edit first", "watch first"])
def test_tilted_maps_are_seen_as_they_were_used_in_either_order(name, edit_first):
    fork, model, pixels, call = opened(name)
    _, maps = tilted(fork, model, pixels)
    handles = [attached(name, model, Tilt())] if edit_first else []
    with watched(name, model) as seen:
        handles = handles or [attached(name, model, Tilt())]
        call(model)
    for block, whole in zip(seen.capture.blocks, maps, strict=True):
        torch.testing.assert_close(block.head_mean(), whole.mean(1).float(), **CLOSE)


def by_image(tokens, output, attention, anatomy):
    """Images are the first axis, whatever the fork's own order."""
    return output * IMAGES


@pytest.mark.parametrize("edit", [ScaleOutput(2.0), by_image], ids=["twice", "by image"])
def test_an_edited_output_is_what_a_plain_hook_makes_of_it(name, edit):
    _, model, _, call = opened(name)
    twin = copy.deepcopy(model)

    def scale(module, _, output):
        by_hand = IMAGES if edit is by_image else torch.tensor([[[2.0]]])
        if isinstance(module, (PrivateCopy, nn.MultiheadAttention)):
            by_hand = by_hand.transpose(0, 1)
        return (output[0] * by_hand, *output[1:]) if isinstance(output, tuple) else output * by_hand

    for module in attention_of(twin):
        module.register_forward_hook(scale)
    with attached(name, model, edit):
        found = tensors(call(model))
    for mine, theirs in zip(found, tensors(call(twin)), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_each_class_of_mctformer_is_seeded_by_the_row_of_its_own_token():
    fork, model, pixels, _ = opened("mctformer")
    found = GradientSeed()(seen_by("mctformer", model, pixels, gradients=True), ALL).flatten(2)
    (scores, _), maps = written_out(fork, model, pixels)
    for c in range(5):
        expected = oracles.gradient_seed(scores, maps, [c] * 3, [c], list(range(5, 29)))
        torch.testing.assert_close(found[:, c].double(), expected, atol=1e-8, rtol=1e-3)


def test_toco_patches_are_scored_by_the_convolution_behind_its_pooling():
    _, model, pixels, _ = opened("toco")
    capture = seen_by("toco", model, pixels)
    tokens = model.encoder.forward_features(pixels)[:, 1:]
    expected = torch.einsum("bnd,cd->bcn", tokens, model.classifier.weight[:, :, 0, 0])
    torch.testing.assert_close(capture.patch_scores().mT, expected, **CLOSE)
    above = (expected - expected.mean(-1, keepdim=True)).clamp_min(0)
    torch.testing.assert_close(ClassWeightSeed()(capture, ALL).flatten(2), above, **CLOSE)


def test_a_teacher_that_does_not_run_hides_nothing_of_its_student():
    model, pixels = shaken(SeCo()), torch.randn(3, 3, 32, 48)
    with torch.no_grad(), watch(model, requires=LogitLensSeed().requires) as seen:
        model(pixels)
    tokens = model.encoder.forward_features(pixels)[:, 1:]
    expected = torch.einsum("bnd,cd->bnc", tokens, model.classifier.weight[:, :, 0, 0])
    torch.testing.assert_close(seen.capture.patch_scores(), expected, **CLOSE)
    assert [call.name for call in seen.capture.leaving] == [f"encoder.{m}" for m in MODULES]
    with pytest.raises(UnsupportedModelError, match=r"\[6\] channels for 5 classes.*ClassWeight"):
        PatchHeadSeed()(seen.capture, ALL)
    with torch.no_grad(), watch(model, requires=EigenCAMSeed().requires) as seen:
        model(pixels)
    with pytest.raises(CaptureError, match=r"teacher's, perhaps.; name the attention that runs"):
        EigenCAMSeed()(seen.capture, ALL)
    mine = [f"encoder.{name}" for name in MODULES]
    with torch.no_grad(), watch(model, modules=mine, requires=EigenCAMSeed().requires) as seen:
        model(pixels)
    assert EigenCAMSeed()(seen.capture, ALL).amax() > 0


def test_the_text_tower_of_clip_is_neither_watched_nor_edited():
    _, model, _, call = opened("openai clip")
    text = torch.arange(7).view(1, 7)
    expected = model.encode_text(text)
    with watch(model) as seen, attach(model, ScaleOutput(3.0)):
        call(model)
        assert torch.equal(model.encode_text(text), expected)
    assert seen.capture.names == ("visual.blocks.0.attn", "visual.blocks.1.attn")


def test_checkpointed_training_is_edited_forwards_and_backwards():
    fork, model, pixels, call = opened("checkpointed")
    pixels.requires_grad_()
    (expected,) = torch.autograd.grad(tilted(fork, model, pixels)[0].square().sum(), pixels)
    with attach(model.train(), Tilt()):
        call(model).square().sum().backward()
    torch.testing.assert_close(pixels.grad, expected, **CLOSE)


def test_a_checkpointed_class_is_seeded_in_training_as_in_evaluation():
    _, model, pixels, _ = opened("checkpointed")
    expected = GradientSeed()(seen_by("checkpointed", model, pixels, gradients=True), ALL)
    capture = seen_by("checkpointed", model.train(), pixels, gradients=True)
    torch.testing.assert_close(GradientSeed()(capture, ALL), expected)


@pytest.mark.parametrize("use", [watch, lambda model: attach(model, ScaleOutput())])
def test_a_model_of_its_own_form_is_refused_with_what_was_expected(use):
    _, model, _, _ = opened("own")
    words = r"no attention found in Vit: .* head count .*num_heads.* query, key and value"
    with pytest.raises(UnsupportedModelError, match=words):
        use(model)


def test_class_tokens_of_an_unknown_name_are_asked_for():
    fork, model, _, call = opened("own")
    said = {key: value for key, value in fork.options.items() if key != "class_tokens"}
    with watch(model, **said) as seen:
        call(model)
    with pytest.raises(CaptureError, match="or name the tokens with `class_tokens=`"):
        seen.capture.class_to_patch()


def test_the_grid_of_patches_that_no_convolution_cuts_is_measured():
    fork, model, _, call = opened("own")
    said = {key: value for key, value in fork.options.items() if key != "grid"}
    with watch(model, **said) as seen:
        call(model)
    assert (seen.capture.grid.rows, seen.capture.grid.cols) == fork.options["grid"]


def watched_in_training(model, call):
    with watch(model.train()) as seen:
        call(model)
    return seen.capture


def edited_in_training(model, call):
    with attach(model.train(), ScaleOutput()):
        call(model)


@pytest.mark.parametrize("measured_before", [False, True])
@pytest.mark.parametrize("use", [watched_in_training, edited_in_training])
def test_attention_that_training_goes_past_is_not_passed_over_in_silence(use, measured_before):
    _, model, pixels, call = opened("dinov3 repository")
    if measured_before:
        seen_by("dinov3 repository", model, pixels)
    words = "none of its attention modules did|no attention module ran"
    with pytest.raises(CaptureError, match=words):
        use(model, call)


def test_blocks_can_be_named_where_training_goes_past_their_attention():
    fork, model, pixels, call = opened("dinov3 repository")
    names = ["blocks.0", "blocks.1"]
    with watch(model.train(), modules=names) as seen:
        call(model)
    for block, whole in zip(seen.capture.blocks, written_out(fork, model, pixels)[1], strict=True):
        torch.testing.assert_close(block.head_mean(), whole.mean(1).float(), **CLOSE)
    with attach(model, Tilt(), modules=names):
        torch.testing.assert_close(call(model), tilted(fork, model, pixels)[0].float(), **CLOSE)
